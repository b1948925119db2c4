"""The C library, once: system calls with errno, the GIL released while they run."""

from __future__ import annotations

import ctypes
import os
from ctypes import c_char_p, c_int, c_int64, c_long, c_ulong, c_void_p

libc = ctypes.CDLL(None, use_errno=True)
libc.ioctl.argtypes = [c_int, c_ulong, c_void_p]
libc.ioctl.restype = c_int
libc.mount.argtypes = [c_char_p, c_char_p, c_char_p, c_ulong, c_char_p]
libc.umount2.argtypes = [c_char_p, c_int]
libc.syncfs.argtypes = [c_int]
libc.fallocate.argtypes = [c_int, c_int, c_int64, c_int64]
libc.syscall.restype = c_long
libc.fstatfs.argtypes = [c_int, c_void_p]


def check(result: int, path: str | bytes | os.PathLike[str] | None = None) -> int:
    """The result of a call, or OSError from errno when it is negative."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), None if path is None else os.fspath(path))
    return result


def ioctl(fd: int, request: int, argument: ctypes.Array[ctypes.c_char] | int) -> int:
    """ioctl(2) with a buffer (read back from it) or a number."""
    value = ctypes.addressof(argument) if isinstance(argument, ctypes.Array) else argument
    return check(libc.ioctl(fd, request, value))


def _ioc(direction: int, kind: int, number: int, size: int) -> int:
    # asm-generic/ioctl.h; the same on x86-64 and arm64.
    return direction << 30 | size << 16 | kind << 8 | number


def iow(kind: int, number: int, size: int) -> int:
    return _ioc(1, kind, number, size)


def ior(kind: int, number: int, size: int) -> int:
    return _ioc(2, kind, number, size)


def iowr(kind: int, number: int, size: int) -> int:
    return _ioc(3, kind, number, size)
