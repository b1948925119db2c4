"""Loop devices over /dev/loop-control and ioctls (linux/loop.h; LOOP_CONFIGURE since Linux 5.8).

Every device made here has LO_FLAGS_AUTOCLEAR: it goes away by itself when the last one who has it open (our descriptor,
then the mounted file system) lets go.  So a process killed between attaching and mounting leaves no device behind.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from roost.linux._libc import ioctl

_CTL_GET_FREE = 0x4C82
_CONFIGURE = 0x4C0A
_CLR_FD = 0x4C01
_GET_STATUS64 = 0x4C05
_SET_CAPACITY = 0x4C07
_MAJOR = 7

_AUTOCLEAR = 4
_DIRECT_IO = 16

# struct loop_info64: device, inode, rdevice, offset, sizelimit; number, encrypt type, key size, flags; names, key, init
_INFO = struct.Struct("=5Q4I64s64s32s2Q")
# struct loop_config: fd, block_size, info, reserved[8]
_CONFIG = struct.Struct(f"=2I{_INFO.size}s64s")


@dataclass
class LoopDevice:
    """An attached device, held open; close it when a mount holds it instead, or to let it go."""

    path: Path
    fd: int

    def set_capacity(self) -> None:
        """Tell the device that its file has another size now."""
        ioctl(self.fd, _SET_CAPACITY, 0)

    def direct_io(self) -> bool:
        """Whether it reads and writes its file past the page cache."""
        return bool(_status(self.fd)[8] & _DIRECT_IO)

    def detach(self) -> None:
        """Let go of the file; while a mount holds the device that happens at its unmount."""
        try:
            ioctl(self.fd, _CLR_FD, 0)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
        finally:
            self.close()

    def close(self) -> None:
        """Close our descriptor; with no mount on the device it detaches itself."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> LoopDevice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _status(fd: int) -> tuple[int, ...]:
    buffer = ctypes.create_string_buffer(_INFO.size)
    ioctl(fd, _GET_STATUS64, buffer)
    return _INFO.unpack(buffer.raw)


def attach(file: Path, *, direct_io: bool = True) -> LoopDevice:
    """A free device over the whole of `file`, which detaches itself at its last close.

    Direct I/O where the file's file system can do it, silently not where it cannot (tmpfs).  Look with `find` first:
    two devices over one file are two caches of the same bytes.
    """
    flags = _AUTOCLEAR | (_DIRECT_IO if direct_io else 0)
    info = _INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, flags, os.fsencode(file)[:63], b"", b"", 0, 0)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    backing = -1
    try:
        backing = os.open(file, os.O_RDWR | os.O_CLOEXEC)
        for _ in range(64):  # between "free" and "configured" another process may take it
            number = ioctl(control, _CTL_GET_FREE, 0)
            device = LoopDevice(Path(f"/dev/loop{number}"), _open_device(number))
            try:
                ioctl(device.fd, _CONFIGURE, ctypes.create_string_buffer(_CONFIG.pack(backing, 4096, info, b"")))
            except OSError as error:
                device.close()
                if error.errno != errno.EBUSY:
                    raise OSError(error.errno, error.strerror, str(file)) from None
                continue
            return device
        raise OSError(errno.EBUSY, "every loop device was taken as it was offered", str(file))
    finally:
        os.close(control)
        if backing >= 0:
            os.close(backing)


def _open_device(number: int) -> int:
    path = f"/dev/loop{number}"
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        # A static /dev (some containers) does not grow a node for a device the kernel just made.
        os.mknod(path, 0o600 | 0o060000, os.makedev(_MAJOR, number))
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)


def find(file: Path) -> LoopDevice | None:
    """The device whose backing file is this very inode, opened; None if there is none.

    Compared by device and inode: names in sysfs are another mount namespace's or those before a rename.
    """
    wanted = file.stat()
    for entry in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
        number = int(entry.parts[3].removeprefix("loop"))
        try:
            device = LoopDevice(Path(f"/dev/loop{number}"), _open_device(number))
        except OSError:
            continue
        try:
            status = _status(device.fd)
        except OSError:  # ENXIO: detached since the listing
            device.close()
            continue
        if (status[0], status[1]) == (wanted.st_dev, wanted.st_ino):
            return device
        device.close()
    return None
