"""btrfs over its ioctls (linux/btrfs.h): subvolumes, simple quotas, size.

Simple quotas (Linux 6.7) charge an extent to the subvolume that wrote it, at the cost of a counter; the classic qgroups
walk back-references at every commit.  A subvolume made inside another one (anybody may make them in a directory that is
theirs) has a qgroup of its own and would so escape its parent's limit; but it inherits the higher-level qgroups of the
subvolume it is made in (`fs/btrfs/qgroup.c`, squota auto-inheritance).  Hence a limited volume `V` has a qgroup 1/V
with 0/V as member, and the limit is on 1/V.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import uuid
from dataclasses import dataclass
from pathlib import Path

from roost.linux import fs
from roost.linux._libc import ioctl, ior, iow, iowr

MAGIC = 0x9123683E
_ROOT_INODE = 256  # BTRFS_FIRST_FREE_OBJECTID: the inode number of every subvolume's root
_NAME_MAX = 255

_VOL_ARGS = struct.Struct("=q4088s")
_SUBVOL_CREATE = iow(0x94, 14, 4096)
_SNAP_DESTROY_V2 = iow(0x94, 63, 4096)
_TREE_SEARCH = iowr(0x94, 17, 4096)
_RESIZE = iow(0x94, 3, 4096)
_INO_LOOKUP = iowr(0x94, 18, 4096)
_DEV_INFO = iowr(0x94, 30, 4096)
_FS_INFO = ior(0x94, 31, 1024)
_BALANCE_V2 = iowr(0x94, 32, 1024)
_QUOTA_CTL = iowr(0x94, 40, 16)
_QGROUP_ASSIGN = iow(0x94, 41, 24)
_QGROUP_CREATE = iow(0x94, 42, 16)
_QGROUP_LIMIT = ior(0x94, 43, 48)

_ENABLE_SIMPLE = 4
_LIMIT_MAX_RFER = 1
_NO_LIMIT = (1 << 64) - 1
_ROOT_REF = 156
_BALANCE_DATA = 1
_BALANCE_ARGS_USAGE = 2
_SPEC_BY_ID = 1 << 4


@dataclass(frozen=True)
class QuotaState:
    """`mode`: "squota" or "qgroup"; empty when quotas are off."""

    mode: str

    @property
    def enabled(self) -> bool:
        return bool(self.mode)


def is_btrfs(path: str | os.PathLike[str] | int) -> bool:
    """Whether the file system there is btrfs."""
    return fs.magic(path) == MAGIC


def _open_dir(path: str | os.PathLike[str]) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _vol_args(name: str) -> ctypes.Array[ctypes.c_char]:
    raw = os.fsencode(name)
    if not raw or len(raw) > _NAME_MAX or b"/" in raw:
        raise OSError(errno.EINVAL, "not the name of a directory entry", name)
    return ctypes.create_string_buffer(_VOL_ARGS.pack(0, raw), _VOL_ARGS.size)


def create_subvolume(parent_fd: int, name: str) -> None:
    """Make an empty subvolume, root:root 0755 less umask; FileExistsError if the name is taken. Atomic."""
    ioctl(parent_fd, _SUBVOL_CREATE, _vol_args(name))


def _children(fs_fd: int, subvolume: int) -> list[int]:
    """Ids of the subvolumes directly inside one, from the ROOT_REF items of the root tree."""
    found: list[int] = []
    start = 0
    while True:
        # struct btrfs_ioctl_search_key: tree; objectid, offset, transid each min and max; type min and max; nr_items
        key = struct.pack(
            "=7Q4I4Q", 1, subvolume, subvolume, start, _NO_LIMIT, 0, _NO_LIMIT, _ROOT_REF, _ROOT_REF, 64, 0, 0, 0, 0, 0
        )
        buffer = ctypes.create_string_buffer(key, 4096)
        ioctl(fs_fd, _TREE_SEARCH, buffer)
        raw = buffer.raw
        items = int(struct.unpack_from("=I", raw, 64)[0])
        if items == 0:
            return found
        position = len(key)
        for _ in range(items):
            _transid, objectid, offset, kind, length = struct.unpack_from("=3Q2I", raw, position)
            position += 32 + length
            if (objectid, kind) == (subvolume, _ROOT_REF):
                found.append(offset)
            start = offset + 1


def delete_subvolume_tree(fs_fd: int, subvolume: int) -> None:
    """Unlink a subvolume (its id) with all it holds and all subvolumes inside it, whoever made them, innermost first.

    By id (Linux 5.7), so no path that somebody else can change is walked.  The space comes back later, in the
    background.  EDQUOT if it has subvolumes and is at its limit: lift the limit first.
    """
    order = [subvolume]
    for parent in order:
        order.extend(_children(fs_fd, parent))
    for child in reversed(order):
        # struct btrfs_ioctl_vol_args_v2: fd, transid, flags, unused[4], subvolid
        raw = struct.pack("=8Q", 0, 0, _SPEC_BY_ID, 0, 0, 0, 0, child)
        ioctl(fs_fd, _SNAP_DESTROY_V2, ctypes.create_string_buffer(raw, 4096))


def is_subvolume(path: str | os.PathLike[str]) -> bool:
    """Whether a path (not followed) is the root of a subvolume."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_ino == _ROOT_INODE and is_btrfs(path)


def subvolume_id(fd: int) -> int:
    """The id of the subvolume that holds `fd`."""
    buffer = ctypes.create_string_buffer(struct.pack("=2Q", 0, _ROOT_INODE), 4096)
    ioctl(fd, _INO_LOOKUP, buffer)
    return int(struct.unpack_from("=Q", buffer.raw)[0])


def filesystem_id(fd: int) -> uuid.UUID:
    """The UUID of the mounted file system, the name of its directory in /sys/fs/btrfs."""
    buffer = ctypes.create_string_buffer(1024)
    ioctl(fd, _FS_INFO, buffer)
    return uuid.UUID(bytes=buffer.raw[16:32])


def device_bytes(fd: int, devid: int = 1) -> int:
    """The bytes of the device that the file system uses (not the device's own size)."""
    buffer = ctypes.create_string_buffer(struct.pack("=Q", devid), 4096)
    ioctl(fd, _DEV_INFO, buffer)
    return int(struct.unpack_from("=2Q", buffer.raw, 24)[1])


def resize(fd: int, size: int | None = None) -> None:
    """Give the file system this size of its device, None: all of it. Shrinking moves data; ENOSPC: it does not fit."""
    ioctl(fd, _RESIZE, _vol_args("max" if size is None else str(size)))


def compact(fd: int, usage_percent: int = 50) -> None:
    """Move the data of chunks that are less full than this into others and free them; blocks until done.

    ENOSPC: no room to move to; EINPROGRESS: somebody else balances.
    """
    # struct btrfs_ioctl_balance_args: flags, state, then data, meta, sys of 136 bytes (usage is the second word, flags
    # the ninth), progress, unused
    data = struct.pack("=17Q", 0, usage_percent, *[0] * 6, _BALANCE_ARGS_USAGE, *[0] * 8)
    raw = struct.pack("=2Q", _BALANCE_DATA, 0) + data
    ioctl(fd, _BALANCE_V2, ctypes.create_string_buffer(raw, 1024))


@dataclass(frozen=True)
class Room:
    """Bytes of a file system on one device, data in the single profile."""

    total: int
    free: int
    """For data: inside data chunks, and not in any chunk yet."""


def room(fd: int) -> Room:
    """The room as writers see it now, from /sys/fs/btrfs/<uuid>/allocation.

    statfs(2) counts what the last commit knew, up to 30 s ago: extents written and fsynced since (the tree log does not
    count) are still free to it.  Here they are in bytes_reserved, and promised ones in bytes_may_use.
    """
    allocation = _sysfs(fd) / "allocation"

    def value(name: str) -> int:
        return int((allocation / name).read_text())

    total = device_bytes(fd)
    chunks = sum(value(f"{kind}/disk_total") for kind in ("data", "metadata", "system"))
    taken = sum(value(f"data/bytes_{state}") for state in ("used", "reserved", "may_use", "pinned", "readonly"))
    return Room(total, max(0, value("data/total_bytes") - taken) + max(0, total - chunks))


# --- quotas


def _sysfs(fd: int) -> Path:
    return Path("/sys/fs/btrfs") / str(filesystem_id(fd))


def quota_state(fd: int) -> QuotaState:
    """Whether quotas are on, and which."""
    folder = _sysfs(fd) / "qgroups"
    try:
        if (folder / "enabled").read_text().strip() != "1":
            return QuotaState("")
        return QuotaState((folder / "mode").read_text().strip())
    except FileNotFoundError:
        return QuotaState("")


def kernel_has_simple_quotas() -> bool:
    """Linux 6.7 and later, when btrfs is loaded."""
    return Path("/sys/fs/btrfs/features/simple_quota").exists()


def enable_simple_quotas(fd: int) -> None:
    """Turn simple quotas on; what was written before is charged to nobody.  Sets an incompat flag: kernels before 6.7
    mount the file system no more.  On already: no error."""
    if quota_state(fd).enabled:
        return
    try:
        ioctl(fd, _QUOTA_CTL, ctypes.create_string_buffer(struct.pack("=2Q", _ENABLE_SIMPLE, 0), 16))
    except OSError as error:
        if error.errno != errno.EEXIST:
            raise


def _group(subvolume: int) -> int:
    return 1 << 48 | subvolume


def limit_subvolume(fs_fd: int, subvolume: int, max_bytes: int) -> None:
    """Limit what a subvolume (its id), and those made inside it later, may hold; 0: no limit.

    Writes beyond it fail with EDQUOT, so does all but unlinking once it is reached: even these ioctls, when made on a
    descriptor inside the full subvolume.  `fs_fd` is therefore the file system's own root. Needs quotas on; idempotent.
    """
    group = _group(subvolume)
    for request, arguments in ((_QGROUP_CREATE, (1, group)), (_QGROUP_ASSIGN, (1, subvolume, group))):
        raw = struct.pack(f"={len(arguments)}Q", *arguments)
        try:
            ioctl(fs_fd, request, ctypes.create_string_buffer(raw, len(raw)))
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise
    raw = struct.pack("=6Q", group, _LIMIT_MAX_RFER, max_bytes or _NO_LIMIT, 0, 0, 0)
    ioctl(fs_fd, _QGROUP_LIMIT, ctypes.create_string_buffer(raw, 48))


def used_bytes(fs_fd: int, subvolume: int) -> int | None:
    """Bytes charged to a subvolume (its id) and to those inside it, as of the last commit; None without quotas."""
    folder = _sysfs(fs_fd) / "qgroups"
    for group in (f"1_{subvolume}", f"0_{subvolume}"):
        try:
            return int((folder / group / "referenced").read_text())
        except FileNotFoundError:
            continue
    return None
