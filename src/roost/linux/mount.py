"""Mounts: mount(2), umount2(2) and /proc/self/mountinfo (proc_pid_mountinfo(5))."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path

from roost.linux._libc import check, libc


class MountFlag(IntFlag):
    """Flags of mount(2) (linux/mount.h)."""

    NONE = 0
    RDONLY = 1
    NOSUID = 2
    NODEV = 4
    NOEXEC = 8
    REMOUNT = 32
    NOATIME = 1024
    BIND = 4096
    MOVE = 8192
    REC = 16384
    PRIVATE = 1 << 18
    SLAVE = 1 << 19


_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8


@dataclass(frozen=True)
class MountEntry:
    """One line of mountinfo."""

    mount_id: int
    device: str
    """`major:minor` of the file system's superblock."""
    root: str
    """The directory of the file system that is shown at `target`."""
    target: str
    options: str
    """Of this mount."""
    fstype: str
    source: str
    super_options: str
    """Of the file system."""


def mount(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    fstype: str = "",
    flags: MountFlag = MountFlag.NONE,
    data: str = "",
) -> None:
    """mount(2); OSError names the target."""
    check(
        libc.mount(
            os.fsencode(source) or None, os.fsencode(target), fstype.encode() or None, int(flags), data.encode() or None
        ),
        target,
    )


def unmount(target: str | os.PathLike[str], *, detach: bool = False) -> None:
    """umount2(2) of what is on top at `target`, never through a symlink; `detach` takes it away even if it is busy.

    Errors: EINVAL not a mount point, EBUSY files are open on it.
    """
    check(libc.umount2(os.fsencode(target), _UMOUNT_NOFOLLOW | (_MNT_DETACH if detach else 0)), target)


def bind(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    read_only: bool = False,
    recursive: bool = False,
    flags: MountFlag = MountFlag.NONE,
) -> None:
    """Show `source` at `target` too; `flags` such as NOSUID, and `read_only`, hold for the new mount alone.

    The kernel ignores the other flags in the call that binds, so they need a remount; if that fails the bind is undone.
    """
    mount(source, target, "", MountFlag.BIND | (MountFlag.REC if recursive else MountFlag.NONE))
    if read_only:
        flags |= MountFlag.RDONLY
    if flags:
        try:
            mount("", target, "", MountFlag.REMOUNT | MountFlag.BIND | flags)
        except OSError:
            unmount(target, detach=True)
            raise


_ESCAPE = re.compile(r"\\([0-7]{3})")


def _unescape(field: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), field) if "\\" in field else field


def parse_mountinfo(text: str) -> Iterator[MountEntry]:
    """The lines of a mountinfo file, in order of mounting; later ones at the same target hide earlier ones."""
    for line in text.splitlines():
        before, separator, after = line.partition(" - ")
        head, tail = before.split(" "), after.split(" ")
        if not separator or len(head) < 6 or len(tail) < 3:
            continue
        yield MountEntry(
            mount_id=int(head[0]),
            device=head[2],
            root=_unescape(head[3]),
            target=_unescape(head[4]),
            options=head[5],
            fstype=tail[0],
            source=_unescape(tail[1]),
            super_options=" ".join(tail[2:]),
        )


def mounts(pid: int | str = "self") -> list[MountEntry]:
    """The mounts that a process sees. Raises FileNotFoundError or EINVAL when it is gone."""
    text = Path(f"/proc/{pid}/mountinfo").read_bytes().decode("utf-8", "surrogateescape")
    return list(parse_mountinfo(text))


def mount_at(target: str | os.PathLike[str]) -> MountEntry | None:
    """What is mounted exactly at this path, the topmost; None if nothing is."""
    wanted = os.path.realpath(target)
    found = None
    for entry in mounts():
        if entry.target == wanted:
            found = entry
    return found


def is_mountpoint(target: str | os.PathLike[str]) -> bool:
    """Whether something is mounted exactly here; `os.path.ismount` misses bind mounts of the same file system."""
    return mount_at(target) is not None
