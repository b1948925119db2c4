"""The calls of roost.linux that need no root."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from roost.linux import fs, mount
from roost.linux.fs import Fallocate, Resolve


def test_rename_noreplace_and_exchange(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("1")
    two.symlink_to("nowhere")
    with pytest.raises(FileExistsError):
        fs.rename_noreplace(str(one), str(two))
    fs.rename_exchange(str(one), str(two))
    assert two.read_text() == "1" and one.is_symlink()
    fd = os.open(tmp_path, os.O_RDONLY)
    fs.rename_noreplace("two", "three", source_fd=fd, target_fd=fd)
    os.close(fd)
    assert (tmp_path / "three").read_text() == "1"


def test_openat2_keeps_to_its_rules(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "outside").write_text("outside")
    (tmp_path / "root/inside").write_text("inside")
    (tmp_path / "root/absolute").symlink_to("/inside")
    (tmp_path / "root/up").symlink_to("../outside")
    fd = os.open(tmp_path / "root", os.O_RDONLY)

    def read(path: str, resolve: Resolve) -> bytes:
        opened = fs.openat2(fd, path, os.O_RDONLY, resolve)
        try:
            assert not os.get_inheritable(opened)
            return os.read(opened, 100)
        finally:
            os.close(opened)

    assert read("absolute", Resolve.IN_ROOT) == b"inside"
    with pytest.raises(FileNotFoundError):
        read("up", Resolve.IN_ROOT)
    for path in ("up", "../outside", "/etc/passwd"):
        with pytest.raises(OSError, match=os.strerror(errno.EXDEV)):
            read(path, Resolve.BENEATH)
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        read("absolute", Resolve.BENEATH | Resolve.NO_SYMLINKS)
    assert read("inside", Resolve.BENEATH | Resolve.NO_SYMLINKS) == b"inside"
    os.close(fd)


def test_fallocate_allocates_and_can_leave_the_size(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        fs.fallocate(file.fileno(), 0, 1 << 20, Fallocate.KEEP_SIZE)
        assert os.fstat(file.fileno()).st_size == 0 and os.fstat(file.fileno()).st_blocks >= 2048
        fs.fallocate(file.fileno(), 0, 1 << 20)
        assert os.fstat(file.fileno()).st_size == 1 << 20
        fs.fallocate(file.fileno(), 0, 1 << 20, Fallocate.PUNCH_HOLE | Fallocate.KEEP_SIZE)
        assert os.fstat(file.fileno()).st_blocks < 2048
        fs.syncfs(file.fileno())


def test_errors_carry_errno_and_path() -> None:
    with pytest.raises(OSError) as caught:
        mount.unmount("/nowhere/at/all")
    assert caught.value.errno in (errno.ENOENT, errno.EPERM) and caught.value.filename == "/nowhere/at/all"
    with pytest.raises(OSError) as caught:
        fs.syncfs(-1)
    assert caught.value.errno == errno.EBADF


def test_mountinfo_with_spaces_and_optional_fields() -> None:
    text = (
        "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:7 - ext3 /dev/root rw,errors=continue\n"
        r"40 36 0:5 / /a\040b\134c rw - tmpfs some\040name rw,size=1k" + "\n"
        "broken line\n"
    )
    first, second = mount.parse_mountinfo(text)
    assert (first.device, first.root, first.target, first.fstype) == ("98:0", "/mnt1", "/mnt2", "ext3")
    assert (second.target, second.source, second.super_options) == ("/a b\\c", "some name", "rw,size=1k")


def test_mountpoints_and_magic() -> None:
    assert mount.is_mountpoint("/proc") and not mount.is_mountpoint("/proc/self/fd")
    assert fs.magic("/proc") == 0x9FA0
