"""The seeder as a program, as root, on a real pool: owners, attributes, limits, SIGKILL at every named point."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from roost.home import seed as module
from roost.home import tree
from roost.linux import loop, mount
from roost.node.pool import Pool
from roost.runtimes.protocol import VolumeName
from roost.settings import PoolSettings, Settings

MiB = 1 << 20
A = VolumeName("roost-ta-home")
DIGEST = "sha256:" + "a" * 64
POINTS = sorted(
    re.findall(r'faults\.point\("([^"]+)"\)', Path(module.__file__).read_text() + Path(tree.__file__).read_text())
)


@pytest.fixture
def pool() -> Iterator[Pool]:
    folder = Path(tempfile.mkdtemp(prefix="roost-test-home-", dir="/var/tmp"))
    values = PoolSettings(initial_bytes=256 * MiB, step_bytes=64 * MiB, reserve_bytes=64 * MiB)
    made = Pool(Settings(state_dir=folder, pool=values))
    made.open()
    yield made
    image = folder / "node/pool.img"
    mount.unmount(made.root)
    deadline = time.monotonic() + 10
    while (device := loop.find(image)) is not None:
        device.close()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    shutil.rmtree(folder)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A HOME of uid 1000 with a file of root's in it."""
    home = tmp_path / "image/home/dev"
    (home / ".config/app").mkdir(parents=True)
    (home / ".config/app/settings").write_text("{}")
    (home / ".ssh").mkdir(mode=0o700)
    (home / ".ssh/id_ed25519").write_text("key")
    (home / ".ssh/id_ed25519").chmod(0o600)
    (home / "bin").mkdir()
    shutil.copy("/bin/true", home / "bin/ping")
    (home / "of-root").write_text("built as root")
    for path in [home, *home.rglob("*")]:
        if path.name != "of-root":
            os.chown(path, 1000, 1000)
    # struct vfs_ns_cap_data, revision 2: CAP_NET_RAW permitted and effective (linux/capability.h)
    os.setxattr(home / "bin/ping", "security.capability", struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0))
    os.setxattr(home / "of-root", "user.note", b"kept")
    os.setxattr(home / ".config", "user.note", b"on a directory")
    os.setxattr(home / "of-root", "trusted.secret", b"not kept")
    os.mknod(home / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    return tmp_path / "image"


def run(image: Path, volume: Path, crash: str = "", uid: int = 2000) -> tuple[int, dict[str, Any]]:
    env = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(Path(module.__file__).parents[2]),
        "ROOST_CRASH_AT": crash,
    }
    command = [sys.executable, "-m", "roost.home", "seed", "--image", str(image), "--volume", str(volume)]
    command += ["--home", "/home/dev", "--uid", str(uid), "--gid", "2001", "--image-digest", DIGEST]
    done = subprocess.run(command, env=env, capture_output=True, timeout=60, check=False)
    return done.returncode, json.loads(done.stdout) if done.stdout else {}


def test_owners_modes_and_attributes(pool: Pool, image: Path) -> None:
    pool.create(A, 0, {})
    home = pool.path(A)
    code, result = run(image, home)
    assert (code, result["state"], result["files"]) == (0, "seeded", 4)
    assert result["skipped"] == [{"path": "null", "reason": "device node"}]
    for path in [home, *home.rglob("*")]:
        if not {"seed.json", "manifest.json"} & {path.name}:
            assert (path.lstat().st_uid, path.lstat().st_gid) == (2000, 2001), path
    assert stat.S_IMODE((home / ".ssh/id_ed25519").stat().st_mode) == 0o600
    assert os.getxattr(home / "bin/ping", "security.capability")[:8] == struct.pack("<2I", 0x02000001, 1 << 13)
    assert os.getxattr(home / "of-root", "user.note") == b"kept"
    assert os.getxattr(home / ".config", "user.note") == b"on a directory"
    assert os.listxattr(home / "of-root") == ["user.note"]
    code, result = run(image, home)
    assert (code, result["state"]) == (0, "already")


@pytest.mark.parametrize("point", [point for point in POINTS if point != "home.seed.noted"])
def test_killed_at(pool: Pool, image: Path, point: str) -> None:
    pool.create(A, 0, {})
    home = pool.path(A)
    (home / "of-root").write_text("mine")
    os.chown(home / "of-root", 7, 7)
    assert run(image, home, crash=point)[0] == -signal.SIGKILL
    code, result = run(image, home)
    assert code == 0 and result["state"] in ("seeded", "already")
    assert (result["files"], result["directories"], result["kept"]) == (3, 4, 1)
    assert (home / "of-root").read_text() == "mine" and (home / "of-root").stat().st_uid == 7
    assert (home / ".ssh/id_ed25519").read_text() == "key"
    assert sorted(os.listdir(home / ".roost")) == ["manifest.json", "seed.json"]


def test_a_home_too_small_says_so_and_goes_on_with_more_room(pool: Pool, image: Path) -> None:
    (image / "home/dev/large").write_bytes(os.urandom(20 * MiB))
    pool.create(A, 10 * MiB, {})
    home = pool.path(A)
    code, result = run(image, home)
    assert code == 5 and result["error"]["code"] == "home.full"
    assert os.listdir(home) == [".roost"] and os.listdir(home / ".roost") == []
    pool.create(A, 40 * MiB, {})
    code, result = run(image, home)
    assert (code, result["state"]) == (0, "seeded")
    assert (home / "large").stat().st_size == 20 * MiB


def test_a_subvolume_of_the_users_is_left_alone(pool: Pool, image: Path) -> None:
    from roost.linux import btrfs

    pool.create(A, 0, {})
    home = pool.path(A)
    fd = os.open(home, os.O_RDONLY)
    btrfs.create_subvolume(fd, ".config")
    os.close(fd)
    code, result = run(image, home)
    assert (code, result["state"], result["kept"]) == (0, "seeded", 1)
    assert result["skipped"][-1] == {"path": ".config/app", "reason": "its directory is another file system"}
    assert os.listdir(home / ".config") == []


def test_what_cannot_be_opened_is_a_typed_error(pool: Pool, image: Path, tmp_path: Path) -> None:
    code, result = run(tmp_path / "absent", pool.homes_dir)
    assert (code, result["error"]["code"]) == (1, "home.seed_failed")
    code, result = run(image, tmp_path / "absent")
    assert (code, result["error"]["code"]) == (1, "home.seed_failed")
