"""Mounts and loop devices on the real kernel."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from roost.linux import fs, loop, mount

MiB = 1 << 20


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for entry in reversed(mount.mounts()):
        if entry.target.startswith(str(tmp_path)):
            mount.unmount(entry.target, detach=True)


def test_bind_read_only(place: Path) -> None:
    source, target = place / "source", place / "tar get"
    source.mkdir()
    target.mkdir()
    (source / "file").write_text("x")
    mount.bind(source, target, read_only=True, flags=mount.MountFlag.NOSUID)
    assert mount.is_mountpoint(target) and not mount.is_mountpoint(source)
    entry = mount.mount_at(target)
    assert entry is not None and {"ro", "nosuid"} <= set(entry.options.split(","))
    with pytest.raises(OSError) as caught:
        (target / "file").write_text("y")
    assert caught.value.errno == errno.EROFS
    (source / "file").write_text("y")
    with open(target / "file"):
        with pytest.raises(OSError) as caught:
            mount.unmount(target)
        assert caught.value.errno == errno.EBUSY
        mount.unmount(target, detach=True)
    assert not mount.is_mountpoint(target)


def _gone(image: Path) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        device = loop.find(image)
        if device is None:
            return True
        device.close()
        time.sleep(0.02)
    return False


def test_a_loop_device_is_found_by_inode_grows_and_clears_itself(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with open(image, "wb") as file:
        fs.fallocate(file.fileno(), 0, 4 * MiB)
    assert loop.find(image) is None
    with loop.attach(image) as device:
        renamed = image.rename(tmp_path / "renamed")
        found = loop.find(renamed)
        assert found is not None and found.path == device.path
        found.close()
        assert os.lseek(device.fd, 0, os.SEEK_END) == 4 * MiB
        os.truncate(renamed, 6 * MiB)
        device.set_capacity()
        assert os.lseek(device.fd, 0, os.SEEK_END) == 6 * MiB
    assert _gone(renamed)


def test_a_killed_process_leaves_no_device(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(MiB))
    code = (
        "import os, sys, pathlib; from roost.linux import loop; "
        "loop.attach(pathlib.Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(loop.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code, str(image)], env=env, timeout=30, check=False)
    assert done.returncode == -9
    assert _gone(image)
