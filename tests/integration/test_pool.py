"""The pool on real btrfs: made, adopted, killed at every step, grown, filled, with the host's disk full under it."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from roost.errors import EngineFailed, HostDiskFull, InvalidRequest, PoolBroken, PoolFull, VolumeNotFound
from roost.linux import btrfs, fs, loop, mount
from roost.node import pool as pool_module
from roost.node.pool import Pool
from roost.runtimes.protocol import VolumeName
from roost.settings import PoolSettings, Settings

MiB = 1 << 20
A, B = VolumeName("roost-ta-home"), VolumeName("roost-tb-home")


def settings(state: Path, **pool: object) -> Settings:
    values = {"initial_bytes": 256 * MiB, "step_bytes": 64 * MiB, "reserve_bytes": 64 * MiB, **pool}
    return Settings(state_dir=state, pool=PoolSettings.model_validate(values))


@pytest.fixture
def state() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="roost-test-pool-", dir="/var/tmp"))
    yield folder
    clear(folder)


def clear(folder: Path) -> None:
    for entry in reversed(mount.mounts()):
        if entry.target.startswith(str(folder)):
            mount.unmount(entry.target, detach=True)
    for image in [*folder.rglob("*.img"), *folder.rglob("*.img.new")]:
        deadline = time.monotonic() + 10
        while (device := loop.find(image)) is not None:
            device.close()
            assert time.monotonic() < deadline, f"{image} stays attached"
            time.sleep(0.02)
    shutil.rmtree(folder)


@pytest.fixture
def pool(state: Path) -> Pool:
    made = Pool(settings(state))
    made.open()
    return made


def fill(file: Path, size: int) -> int | None:
    """Write and fsync; the errno it failed with, if any."""
    try:
        with open(file, "wb", buffering=0) as target:
            for _ in range(size // MiB):
                target.write(os.urandom(MiB))
            os.fsync(target.fileno())
    except OSError as error:
        return error.errno
    return None


# --- open, close


def test_a_new_pool_is_a_full_file_mounted_without_discard(pool: Pool, state: Path) -> None:
    image = state / "node/pool.img"
    assert image.stat().st_blocks * 512 >= image.stat().st_size == 256 * MiB
    entry = mount.mount_at(pool.root)
    assert entry is not None and entry.fstype == "btrfs"
    assert "noatime" in entry.options and "discard" not in entry.super_options
    device = loop.find(image)
    assert device is not None
    with device:
        assert device.direct_io()
    assert pool.root.stat().st_mode & 0o777 == 0o700
    assert pool.snapshots_dir.is_dir()
    usage = pool.usage()
    assert (usage.native, usage.quotas, usage.grown_bytes) == (False, True, 256 * MiB)
    pool.close()
    assert mount.mount_at(pool.root) is None and loop.find(image) is None
    pool.close()


def test_it_is_adopted_while_mounted_and_mounted_again_after(pool: Pool, state: Path) -> None:
    pool.create(A, 0, {"roost.dev/workspace": "ta"})
    (pool.path(A) / "file").write_text("kept")
    inode = (state / "node/pool.img").stat().st_ino
    for close_first in (False, True):
        if close_first:
            pool.close()
        again = Pool(settings(state))
        again.open()
        assert (again.path(A) / "file").read_text() == "kept"
        assert again.labels(A) == {"roost.dev/workspace": "ta"}
        assert (state / "node/pool.img").stat().st_ino == inode
        assert len([e for e in mount.mounts() if e.target == str(pool.root)]) == 1


def test_a_pool_whose_file_is_still_in_use_gets_no_second_device(pool: Pool, state: Path) -> None:
    pool.create(A, 0, {})
    elsewhere = state / "elsewhere"
    elsewhere.mkdir()
    mount.bind(pool.path(A), elsewhere)
    mount.unmount(pool.root)  # the superblock lives on in the bind mount, as under a running container
    again = Pool(settings(state))
    again.open()
    (again.path(A) / "x").write_text("one file system")
    assert (elsewhere / "x").read_text() == "one file system"
    with pytest.raises(PoolBroken, match="elsewhere"):
        again.close()
    assert mount.is_mountpoint(pool.root)
    mount.unmount(elsewhere)
    again.close()


def test_close_names_who_has_files_open(pool: Pool) -> None:
    pool.create(A, 0, {})
    with open(pool.path(A) / "held", "w"):
        with pytest.raises(PoolBroken, match=f"pid {os.getpid()}"):
            pool.close()
    pool.close()


def test_a_pool_that_does_not_mount_is_never_formatted(state: Path) -> None:
    image = state / "node/pool.img"
    image.parent.mkdir()
    image.write_bytes(b"precious" * (16 * MiB // 8))
    with pytest.raises(PoolBroken, match="cannot be mounted"):
        Pool(settings(state)).open()
    assert image.read_bytes()[:8] == b"precious"
    assert loop.find(image) is None


def test_something_else_at_the_mount_point_is_refused(state: Path) -> None:
    root = state / "node/pool"
    root.mkdir(parents=True)
    mount.mount("tmpfs", root, "tmpfs")
    with pytest.raises(PoolBroken, match="tmpfs"):
        Pool(settings(state)).open()


def test_a_sparse_file_from_a_backup_is_allocated_again(pool: Pool, state: Path) -> None:
    pool.create(A, 0, {})
    (pool.path(A) / "x").write_text("x")
    pool.close()
    image = state / "node/pool.img"
    copy = state / "node/copy.img"
    subprocess.run(["cp", "--sparse=always", image, copy], check=True, timeout=60)
    copy.replace(image)
    assert image.stat().st_blocks * 512 < image.stat().st_size
    pool.open()
    assert image.stat().st_blocks * 512 >= image.stat().st_size
    assert (pool.path(A) / "x").read_text() == "x"


def test_without_room_on_the_host_nothing_is_made(state: Path) -> None:
    mount.mount("tmpfs", state, "tmpfs", data="size=300m")
    with pytest.raises(HostDiskFull):
        Pool(settings(state)).open()
    assert [entry.name for entry in (state / "node").iterdir()] == ["pool.lock"]
    Pool(settings(state, reserve_bytes=16 * MiB)).open()


def test_native_on_btrfs_leaves_the_hosts_quotas_alone(state: Path) -> None:
    image = state / "host.img"
    with open(image, "wb") as file:
        fs.fallocate(file.fileno(), 0, 300 * MiB)
    subprocess.run(["mkfs.btrfs", "-q", str(image)], check=True, timeout=60, capture_output=True)
    host = state / "host"
    host.mkdir()
    with loop.attach(image) as device:
        mount.mount(device.path, host, "btrfs")
    pool = Pool(settings(host))
    pool.open()
    pool.create(A, 10 * MiB, {})
    assert pool.usage().native and not pool.usage().quotas and pool.usage().grown_bytes == 0
    assert not (host / "node/pool.img").exists()
    assert [(v.name, v.used_bytes, v.limit_bytes) for v in pool.list()] == [(A, None, 0)]
    pool.trash(A)
    pool.purge(A)
    assert pool.list() == []
    pool.close()

    with _folder(host) as fd:
        assert not btrfs.quota_state(fd).enabled
        btrfs.enable_simple_quotas(fd)
    with_quotas = Pool(settings(host))
    with_quotas.open()
    with_quotas.create(B, 10 * MiB, {})
    assert with_quotas.usage().quotas
    assert fill(with_quotas.path(B) / "x", 20 * MiB) == errno.EDQUOT


# --- volumes


def test_a_volume_is_made_once_and_adjusted(pool: Pool) -> None:
    pool.create(A, 20 * MiB, {"a": "1"})
    home = pool.path(A)
    state = home.stat()
    assert (state.st_uid, state.st_gid, state.st_mode & 0o7777) == (0, 0, 0o755)
    assert list(home.iterdir()) == []
    (home / "mine").write_text("x")
    pool.create(A, 40 * MiB, {"a": "2"})
    assert (home / "mine").exists() and pool.labels(A) == {"a": "2"}
    assert [v.limit_bytes for v in pool.list()] == [40 * MiB]


def test_a_limit_holds_can_be_raised_and_room_comes_back(pool: Pool) -> None:
    pool.create(A, 20 * MiB, {})
    pool.create(B, 0, {})
    assert fill(pool.path(A) / "x", 40 * MiB) == errno.EDQUOT
    assert fill(pool.path(B) / "x", 40 * MiB) is None
    used = {v.name: v.used_bytes for v in pool.list()}
    assert 15 * MiB < (used[A] or 0) <= 20 * MiB and (used[B] or 0) >= 40 * MiB
    pool.create(A, 60 * MiB, {})
    assert fill(pool.path(A) / "x", 40 * MiB) is None
    pool.create(A, 20 * MiB, {})
    (pool.path(A) / "x").unlink()  # a full HOME can be emptied
    assert fill(pool.path(A) / "x", 10 * MiB) is None


def test_a_subvolume_made_inside_does_not_escape_the_limit_nor_the_purge(pool: Pool) -> None:
    pool.create(A, 20 * MiB, {})
    with _folder(pool.path(A)) as fd:
        btrfs.create_subvolume(fd, "inner")
    with _folder(pool.path(A) / "inner") as fd:
        btrfs.create_subvolume(fd, "innermost")
    assert fill(pool.path(A) / "inner/innermost/x", 40 * MiB) == errno.EDQUOT
    pool.trash(A)
    pool.purge(A)  # though it is full
    assert pool.list() == [] and list(pool.trash_dir.iterdir()) == []


def test_trash_restore_purge(pool: Pool) -> None:
    pool.create(A, 20 * MiB, {"a": "1"})
    (pool.path(A) / "file").write_text("kept")
    pool.purge(A)
    assert (pool.path(A) / "file").exists(), "purge takes only what is in the trash"
    before = time.time()
    pool.trash(A)
    pool.trash(A)
    with pytest.raises(VolumeNotFound):
        pool.path(A)
    [info] = pool.list()
    assert info.trashed_at is not None and before <= info.trashed_at <= time.time()
    with pytest.raises(EngineFailed, match="trash"):
        pool.create(A, 0, {})
    pool.restore(A)
    pool.restore(A)
    [info] = pool.list()
    assert info.trashed_at is None and info.limit_bytes == 20 * MiB
    assert (pool.path(A) / "file").read_text() == "kept" and pool.labels(A) == {"a": "1"}
    assert fill(pool.path(A) / "x", 40 * MiB) == errno.EDQUOT
    pool.trash(A)
    pool.purge(A)
    pool.purge(A)
    pool.trash(A)
    assert pool.list() == []
    with pytest.raises(VolumeNotFound):
        pool.restore(A)


@pytest.mark.parametrize("name", ["", "..", ".x", "a/b", "../a", "a\n"])
def test_a_name_cannot_lead_elsewhere(pool: Pool, name: str) -> None:
    for verb in (pool.path, pool.trash, pool.restore, pool.purge):
        with pytest.raises(InvalidRequest):
            verb(VolumeName(name))


# --- killed at every step

POINTS = [
    "pool.make.allocated",
    "pool.make.formatted",
    "pool.make.renamed",
    "pool.open.attached",
    "pool.open.mounted",
    "pool.open.quotas",
    "pool.create.recorded",
    "pool.create.made",
    "pool.create.limited",
    "pool.create.done",
    "pool.trash.recorded",
    "pool.trash.renamed",
    "pool.restore.renamed",
    "pool.restore.recorded",
    "pool.purge.deleted",
    "pool.grow.allocated",
    "pool.grow.extended",
    "pool.grow.capacity",
    "pool.grow.resized",
    "pool.trim.shrunk",
    "pool.trim.truncated",
]
STORY = """
import sys
from pathlib import Path
from roost.node.pool import Pool
from roost.settings import PoolSettings, Settings
M = 1 << 20
pool = Pool(Settings(state_dir=Path(sys.argv[1]), pool=PoolSettings(
    initial_bytes=256 * M, step_bytes=64 * M, reserve_bytes=64 * M)))
pool.open()
pool.create("keep", 0, {"k": "1"})
(pool.path("keep") / "file").exists() or (pool.path("keep") / "file").write_text("kept")
for volume in pool.list():
    if volume.trashed_at is not None:
        pool.restore(volume.name)
pool.create("a", 20 * M, {"a": "1"})
pool.trash("a")
pool.restore("a")
pool.trash("a")
pool.purge("a")
pool._image.grow()
pool._image.shrink(256 * M)
pool.create("b", 20 * M, {"b": "1"})
"""


def test_every_point_of_the_pool_is_in_the_list() -> None:
    folder = Path(pool_module.__file__).parent
    text = "".join((folder / name).read_text() for name in ("pool.py", "pool_image.py"))
    found = set(re.findall(r'faults\.point\("(pool\.[a-z.]+)"\)', text))
    for verb in ("trash", "restore"):
        found |= {f"pool.{verb}.recorded", f"pool.{verb}.renamed"}
    assert found == set(POINTS)


@pytest.mark.parametrize("point", POINTS)
def test_killed_at(state: Path, point: str) -> None:
    def tell(crash: str = "") -> int:
        env = {**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path)), "ROOST_CRASH_AT": crash}
        return subprocess.run(
            [sys.executable, "-c", STORY, str(state)], env=env, timeout=60, check=False, stderr=sys.stderr
        ).returncode

    later = not point.startswith(("pool.make", "pool.open", "pool.create"))
    assert tell(point) == -signal.SIGKILL
    image = state / "node/pool.img"
    inode = image.stat().st_ino if image.exists() else None
    assert (inode is None) == (point in ("pool.make.allocated", "pool.make.formatted"))
    pool = Pool(settings(state))
    pool.open()
    with _folder(pool.root) as fd:
        assert 0 <= image.stat().st_size - btrfs.device_bytes(fd) < MiB, "what was cut off was not finished"
    if later:
        assert (pool.path(VolumeName("keep")) / "file").read_text() == "kept"
        assert all(v.trashed_at is not None or v.name != A for v in pool.list())
    assert tell() == 0
    assert inode in (None, image.stat().st_ino)
    assert (pool.path(VolumeName("keep")) / "file").read_text() == "kept"
    assert {v.name: v.limit_bytes for v in pool.list()} == {"b": 20 * MiB, "keep": 0}
    assert fill(pool.path(VolumeName("b")) / "x", 40 * MiB) == errno.EDQUOT
    assert not (state / "node/pool.img.new").exists()
    with _folder(pool.root) as fd:
        assert image.stat().st_size - btrfs.device_bytes(fd) < MiB
    assert image.stat().st_blocks * 512 >= image.stat().st_size
    # (btrfs check of btrfs-progs 6.2 does not know simple quotas)
    scrub = ["btrfs", "scrub", "start", "-B", "-r", str(pool.root)]
    checked = subprocess.run(scrub, timeout=60, check=False, capture_output=True, text=True)
    assert checked.returncode == 0 and "no errors found" in checked.stdout, checked.stdout + checked.stderr
    pool.close()


# --- room


def test_it_grows_before_it_is_full_and_refuses_when_it_cannot(state: Path) -> None:
    pool = Pool(settings(state, max_bytes=448 * MiB))
    pool.open()
    pool.create(A, 0, {})
    victim = VolumeName("roost-tv-home")
    pool.create(victim, MiB, {})
    (pool.path(victim) / "file").write_text("x")
    assert not pool.grow_if_needed()
    sizes = []
    for number in range(8):
        assert fill(pool.path(A) / str(number), 45 * MiB) is None
        pool.grow_if_needed()
        sizes.append(pool.usage().grown_bytes)
    assert sizes == sorted(sizes) and sizes[-1] == 448 * MiB
    assert fill(pool.path(A) / "last", 100 * MiB) == errno.ENOSPC
    with pytest.raises(PoolFull):
        pool.ensure_room()
    with pytest.raises(PoolFull):
        pool.create(B, 0, {})
    assert [v.name for v in pool.list()] == [A, victim]
    # and yet everything that frees room, or changes what is there, works
    pool.create(A, 10 * MiB, {"adjusted": "yes"})
    pool.trash(A)
    pool.restore(A)
    pool.create(A, 0, {})
    pool.trash(victim)
    pool.purge(victim)
    assert [v.name for v in pool.list()] == [A]

    for file in pool.path(A).iterdir():
        file.unlink()
    _settle(pool)
    pool.ensure_room()
    pool.create(B, 0, {})


def test_trim_gives_back_and_leaves_no_hole(pool: Pool, state: Path) -> None:
    pool.create(A, 0, {})
    (pool.path(A) / "mine").write_text("kept")
    for number in range(6):
        assert fill(pool.path(A) / str(number), 50 * MiB) is None
        pool.grow_if_needed()
    grown = pool.usage()
    host = shutil.disk_usage(state).free
    assert grown.grown_bytes > 330 * MiB
    assert pool.trim() == 0, "there is nothing free to give back"
    for number in range(6):
        (pool.path(A) / str(number)).unlink()
    _settle(pool)
    given = pool.trim()
    assert given > 60 * MiB
    image = state / "node/pool.img"
    assert image.stat().st_size == grown.grown_bytes - given == pool.usage().grown_bytes
    assert image.stat().st_blocks * 512 >= image.stat().st_size
    assert shutil.disk_usage(state).free > host + given // 2
    assert (pool.path(A) / "mine").read_text() == "kept"
    assert fill(pool.path(A) / "again", 50 * MiB) is None


WRITER = """
import hashlib, os, sys, time
home, limit = sys.argv[1], int(sys.argv[2])
fd = os.open(home + "/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for number in range(limit):
    body = hashlib.sha256(f"{home} {number}".encode()).digest() * 4096
    try:
        while body:  # at the very end of the room a write may be short; the next one says why
            body = body[os.write(fd, body):]
        os.fsync(fd)
    except OSError as error:
        print("stopped", error.errno, flush=True)
        break
    print("synced", number, flush=True)
"""


def test_a_full_host_disk_loses_nothing_that_was_synced(state: Path) -> None:
    disk = state / "disk.img"
    with open(disk, "wb") as file:
        file.truncate(700 * MiB)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(disk)], check=True, timeout=60)
    host = state / "host"
    host.mkdir()
    with loop.attach(disk) as device:
        mount.mount(device.path, host, "ext4")
    pool = Pool(settings(host))
    pool.open()
    names = [VolumeName(f"roost-t{letter}-home") for letter in "abc"]
    for name in names:
        pool.create(name, 0, {})
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, pool.path(name), "2000"], stdout=subprocess.PIPE, text=True)
        for name in names
    ]
    try:
        for writer in writers:  # all have begun
            assert writer.stdout is not None and writer.stdout.readline().startswith("synced")
        assert fill(host / "filler", 700 * MiB) == errno.ENOSPC
        assert fill(host / "filler2", MiB) == errno.ENOSPC
        synced = []
        for writer in writers:
            assert writer.stdout is not None
            lines = writer.stdout.read().splitlines()
            assert lines[-1] == f"stopped {errno.ENOSPC}", "an honest end, not EIO, and not a read-only pool"
            synced.append(len(lines))
    finally:
        for writer in writers:
            writer.kill()
            writer.wait(timeout=10)
            assert writer.stdout is not None
            writer.stdout.close()
    with pytest.raises(HostDiskFull):
        pool.ensure_room()
    pool.close()
    pool.open()  # with the disk still full

    def intact(name: VolumeName, count: int) -> None:
        with open(pool.path(name) / "log", "rb") as log:
            for number in range(count):
                expected = hashlib.sha256(f"{pool.path(name)} {number}".encode()).digest() * 4096
                assert log.read(len(expected)) == expected, f"{name} lost record {number}"

    for name, count in zip(names, synced, strict=True):
        assert count > 10
        intact(name, count)
    (host / "filler").unlink()
    (host / "filler2").unlink(missing_ok=True)
    pool.ensure_room()
    assert pool.usage().grown_bytes > 256 * MiB
    for name, count in zip(names, synced, strict=True):
        assert fill(pool.path(name) / "more", 5 * MiB) is None
        intact(name, count)
    pool.close()


def _settle(pool: Pool) -> None:
    with _folder(pool.root) as fd:
        fs.syncfs(fd)


class _folder:
    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
