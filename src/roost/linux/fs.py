"""File system calls that Python's os module lacks: renameat2, openat2, fallocate, syncfs, and xattrs by descriptor."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Callable
from enum import IntFlag

from roost.linux._libc import check, ioctl, iowr, libc

_RENAMEAT2 = {"x86_64": 316, "aarch64": 276, "riscv64": 276}
_OPENAT2 = 437  # the same number everywhere
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_FITRIM = iowr(ord("X"), 121, 24)


class Resolve(IntFlag):
    """How openat2(2) may walk (linux/openat2.h, since Linux 5.6)."""

    NONE = 0
    NO_XDEV = 0x01
    """Never onto another mount."""
    NO_MAGICLINKS = 0x02
    NO_SYMLINKS = 0x04
    """ELOOP for any symlink on the way."""
    BENEATH = 0x08
    """EXDEV for whatever leads out of the directory."""
    IN_ROOT = 0x10
    """The directory is `/` for the walk: absolute symlinks and `..` stay inside."""


def openat2(dir_fd: int, path: str, flags: int, resolve: Resolve, mode: int = 0) -> int:
    """Open below a directory under the given rules of resolution; the descriptor is close-on-exec.

    The kernel gives EAGAIN when a rename races with the walk of `..`; that is tried again here.
    """
    how = ctypes.create_string_buffer(struct.pack("=3Q", flags | os.O_CLOEXEC, mode, int(resolve)), 24)
    for attempt in range(32):
        try:
            return check(
                libc.syscall(
                    ctypes.c_long(_OPENAT2),
                    ctypes.c_long(dir_fd),
                    ctypes.c_char_p(os.fsencode(path)),
                    how,
                    ctypes.c_size_t(24),
                ),
                path,
            )
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EINTR) or attempt == 31:
                raise
    raise AssertionError("unreachable")


def _renameat2(source_fd: int, source: str, target_fd: int, target: str, flags: int) -> None:
    check(
        libc.syscall(
            ctypes.c_long(_RENAMEAT2[os.uname().machine]),
            ctypes.c_long(source_fd),
            ctypes.c_char_p(os.fsencode(source)),
            ctypes.c_long(target_fd),
            ctypes.c_char_p(os.fsencode(target)),
            ctypes.c_ulong(flags),
        ),
        target,
    )


AT_FDCWD = -100


def rename_noreplace(source: str, target: str, *, source_fd: int = AT_FDCWD, target_fd: int = AT_FDCWD) -> None:
    """Rename, or FileExistsError if anything (a dangling symlink too) has the new name."""
    _renameat2(source_fd, source, target_fd, target, _RENAME_NOREPLACE)


def rename_exchange(source: str, target: str, *, source_fd: int = AT_FDCWD, target_fd: int = AT_FDCWD) -> None:
    """Swap two names in one step; both must exist."""
    _renameat2(source_fd, source, target_fd, target, _RENAME_EXCHANGE)


class Fallocate(IntFlag):
    """Modes of fallocate(2)."""

    ALLOCATE = 0
    KEEP_SIZE = 1
    PUNCH_HOLE = 2


def fallocate(fd: int, offset: int, length: int, mode: Fallocate = Fallocate.ALLOCATE) -> None:
    """fallocate(2) itself: EOPNOTSUPP where the file system cannot (os.posix_fallocate would write zeros instead)."""
    while True:
        try:
            check(libc.fallocate(fd, int(mode), offset, length))
            return
        except OSError as error:
            if error.errno != errno.EINTR:
                raise


def syncfs(fd: int) -> None:
    """Write out the whole file system that holds `fd`; reports write-back errors since Linux 5.8."""
    check(libc.syncfs(fd))


def fitrim(fd: int) -> int:
    """Discard all free space of the mounted file system; returns the bytes discarded."""
    buffer = ctypes.create_string_buffer(struct.pack("=3Q", 0, (1 << 64) - 1, 0), 24)
    ioctl(fd, _FITRIM, buffer)
    return int(struct.unpack("=3Q", buffer.raw)[1])


def magic(path: str | os.PathLike[str] | int) -> int:
    """`f_type` of statfs(2): the magic number of the file system (linux/magic.h)."""
    buffer = ctypes.create_string_buffer(256)
    if isinstance(path, int):
        check(libc.fstatfs(path, ctypes.addressof(buffer)))
    else:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            check(libc.fstatfs(fd, ctypes.addressof(buffer)), path)
        finally:
            os.close(fd)
    return int(struct.unpack_from("=q", buffer.raw)[0]) & 0xFFFFFFFF


def copy_xattrs(source_fd: int, target_fd: int, wanted: Callable[[str], bool]) -> list[str]:
    """Copy the extended attributes whose name is wanted, between open files or directories; returns those refused.

    A source without attributes at all (EOPNOTSUPP) is one with none.
    """
    try:
        names = os.listxattr(source_fd)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return []
    refused = []
    for name in names:
        if not wanted(name):
            continue
        try:
            os.setxattr(target_fd, name, os.getxattr(source_fd, name))
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EPERM, errno.ENODATA, errno.EINVAL, errno.E2BIG):
                raise
            refused.append(name)
    return refused
