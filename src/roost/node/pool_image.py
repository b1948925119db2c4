"""The pool's loop file: made once, mounted, grown before it is full, given back when it is empty; never made twice.

Why a file that is allocated to its last byte
---------------------------------------------
btrfs in a sparse file believes in room that the host may not have: when the host's disk runs full, a write into a
hole gives EIO below a file system that had promised space; data in flight is lost and a failed metadata write turns the
whole pool read-only, with every workspace on it.  So the invariant is:

    every byte of pool.img below its size is allocated (fallocate), at all times while it is mounted.

Then a full host disk stops the pool from growing and nothing else.  From this follow the rest:

- *Making*: allocated, formatted without discard (`-K`), flushed under the name pool.img.new, then renamed.  pool.img is
  therefore a complete file system by construction, and is never formatted, whatever mounting it says; pool.img.new is
  garbage by construction and is made anew.  A mkfs that outlived a killed node writes into an unlinked file.
- *Growing*: blocks are allocated beyond the end (KEEP_SIZE), then the size moves over them, then the loop device, then
  btrfs learn of it.  Killed in between, `open` finds the file longer than the file system and finishes.
- *Mounting* with `nodiscard`: a discard punches holes.  For the same reason fstrim is not how room goes back to the
  host: after it btrfs may pick any hole for its next write, and which ones cannot be said, so that only allocating all
  of them again would restore the invariant.  `shrink` instead moves the file system's end: btrfs carries what lies in
  the tail to the front (online), ends before it, and the tail is cut off.  Nothing below the new size ever was a hole.
  Killed between the two, `open` lets btrfs have the tail again.
- A file that came back from a backup may be sparse: `open` allocates what is missing, and warns when it cannot.

Unwritten extents need a little metadata of the host's file system when they are first written.  ext4 and XFS keep
blocks aside for just that, and [pool] reserve_bytes is never taken by us.

Two loop devices over one file would be two caches of the same bytes, so a device that is attached already is used
again, found by the file's inode.  Devices clear themselves (see roost.linux.loop): a kill between attaching and
mounting leaves none behind.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path

import structlog

from roost import faults
from roost.errors import HostDiskFull, MissingFeature, MissingProgram, PoolBroken
from roost.linux import btrfs, fs, loop, mount
from roost.settings import PoolSettings

MiB = 1 << 20
LEAST_GROWTH = 16 * MiB
"""Growing by less is not worth the relocation of the end."""
MKFS_TIMEOUT_S = 120.0

log = structlog.get_logger()


class Growth(Enum):
    """What came of trying to grow."""

    grown = "grown"
    at_maximum = "at_maximum"
    host_full = "host_full"


def host_free(folder: Path) -> int:
    """Bytes that an unprivileged process could still write on the host's file system."""
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY | os.O_DIRECTORY) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield fd
    finally:
        os.close(fd)


class PoolImage:
    """`pool.img` in a folder, mounted at `target`.  Not thread-safe: its owner holds the lock."""

    def __init__(self, folder: Path, target: Path, settings: PoolSettings) -> None:
        self.file = folder / "pool.img"
        self.target = target
        self._folder = folder
        self._new = folder / "pool.img.new"
        self._settings = settings

    # --- open

    def open(self) -> None:
        """Make, adopt or mount. Raises HostDiskFull, MissingFeature, MissingProgram, PoolBroken."""
        entry = mount.mount_at(self.target)
        if entry is None:
            require_btrfs()  # before gigabytes are taken for what cannot be mounted
            if not self.file.exists():
                self._make()
            self._new.unlink(missing_ok=True)
            self._mount()
        else:
            self._check_adopted(entry)
        self._allocate_holes()
        self._fit()

    def _make(self) -> None:
        size = self._settings.initial_bytes
        if self._settings.max_bytes:
            size = min(size, self._settings.max_bytes)
        size -= size % MiB
        mkfs = shutil.which("mkfs.btrfs", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
        if mkfs is None:
            raise MissingProgram("mkfs.btrfs is not installed (package btrfs-progs)")
        self._new.unlink(missing_ok=True)
        free = host_free(self._folder)
        if free - size < self._settings.reserve_bytes:
            raise _no_room(self._folder, size, free, self._settings.reserve_bytes)
        with opened(self._new, os.O_RDWR | os.O_CREAT | os.O_EXCL) as fd:
            os.fchmod(fd, 0o600)
            try:
                fs.fallocate(fd, 0, size)
            except OSError as error:
                self._new.unlink()
                if error.errno == errno.ENOSPC:
                    raise _no_room(self._folder, size, free, self._settings.reserve_bytes) from error
                if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
                    raise MissingFeature(
                        f"the file system of {self._folder} cannot allocate room beforehand",
                        next_step="Put ROOST_STATE_DIR on ext4, XFS or btrfs.",
                    ) from error
                raise
            faults.point("pool.make.allocated")
            command = [mkfs, "-q", "-f", "-K", "-m", "single", "-d", "single", "-L", "roost-pool", str(self._new)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=MKFS_TIMEOUT_S, check=False)
            except subprocess.TimeoutExpired as error:
                raise PoolBroken(f"mkfs.btrfs did not finish in {MKFS_TIMEOUT_S:.0f} s") from error
            if done.returncode != 0:
                raise PoolBroken(f"mkfs.btrfs failed: {done.stderr.strip() or done.stdout.strip()}")
            faults.point("pool.make.formatted")
            os.fsync(fd)
        fs.rename_noreplace(str(self._new), str(self.file))
        faults.point("pool.make.renamed")
        with opened(self._folder) as folder:
            os.fsync(folder)
        log.info("pool.made", file=str(self.file), size_bytes=size)

    def _mount(self) -> None:
        if not self.file.is_file() or self.file.is_symlink():
            raise PoolBroken(f"{self.file} is not a file")
        self.target.mkdir(mode=0o700, exist_ok=True)
        try:
            device = loop.find(self.file) or loop.attach(self.file)
        except FileNotFoundError as error:
            raise MissingFeature("the host has no loop devices (/dev/loop-control)") from error
        with device:
            faults.point("pool.open.attached")
            try:
                mount.mount(device.path, self.target, "btrfs", mount.MountFlag.NOATIME, "nodiscard")
            except OSError as error:
                if error.errno == errno.ENODEV:
                    raise MissingFeature("the kernel has no btrfs") from error
                raise PoolBroken(
                    f"{self.file} cannot be mounted: {error.strerror}",
                    next_step="Nothing was changed. `dmesg` says why; mend the file system or put a good copy back.",
                ) from error
        faults.point("pool.open.mounted")

    def _check_adopted(self, entry: mount.MountEntry) -> None:
        device = loop.find(self.file) if self.file.exists() else None
        if device is not None:
            device.close()
        if device is None or entry.fstype != "btrfs" or entry.source != str(device.path):
            raise PoolBroken(
                f"{entry.source} ({entry.fstype}) is mounted at {self.target}, which is not {self.file}",
                next_step=f"Unmount {self.target} if that is not meant, then start again.",
            )
        if "ro" in entry.super_options.split(","):
            raise PoolBroken(
                f"the pool at {self.target} went read-only after an error of its disk",
                next_step=f"Look at `dmesg`; stop the workspaces, `umount {self.target}`, start the node again.",
            )

    def _allocate_holes(self) -> None:
        found = self.file.stat()
        if found.st_blocks * 512 >= found.st_size:
            return
        try:
            with opened(self.file, os.O_RDWR) as fd:
                fs.fallocate(fd, 0, found.st_size)
        except OSError as error:
            log.warning(
                "pool.sparse", file=str(self.file), reason=error.strerror, hint="a full host disk would break it"
            )

    def _fit(self) -> None:
        """Let the file system have the whole file: the end of an interrupted growth or shrinking."""
        with opened(self.target) as fd:
            if btrfs.device_bytes(fd) + MiB <= self.file.stat().st_size:
                self._extend(fd)

    def _extend(self, fd: int) -> None:
        device = loop.find(self.file)
        if device is None:
            raise PoolBroken(f"{self.file} has lost its loop device")
        with device:
            device.set_capacity()
        faults.point("pool.grow.capacity")
        btrfs.resize(fd)

    # --- size

    def size(self) -> int:
        return self.file.stat().st_size

    def grow(self) -> Growth:
        """One step larger, or as far as the maximum and the host's reserve allow."""
        size = self.size()
        host = host_free(self._folder) - self._settings.reserve_bytes
        limit = self._settings.max_bytes - size if self._settings.max_bytes else host
        want = min(self._settings.step_bytes, host, limit)
        want -= want % MiB
        if want < LEAST_GROWTH:
            return Growth.at_maximum if limit < host else Growth.host_full
        with opened(self.file, os.O_RDWR) as fd:
            try:
                fs.fallocate(fd, size, want, fs.Fallocate.KEEP_SIZE)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise PoolBroken(f"{self.file} cannot be enlarged: {error.strerror}") from error
                os.ftruncate(fd, size)  # gives back what was allocated beyond the end
                return Growth.host_full
            faults.point("pool.grow.allocated")
            os.ftruncate(fd, size + want)
            os.fsync(fd)
        faults.point("pool.grow.extended")
        with opened(self.target) as fd:
            self._extend(fd)
        faults.point("pool.grow.resized")
        log.info("pool.grown", size_bytes=size + want)
        return Growth.grown

    def shrink(self, keep_bytes: int) -> int:
        """Cut the file down towards `keep_bytes`; returns the bytes given back to the host, 0 if nothing can be."""
        size = self.size()
        keep = -(-keep_bytes // MiB) * MiB
        with opened(self.target) as fd:
            if keep + LEAST_GROWTH <= size:
                # Chunks that were emptied or nearly so still are in nobody's gift: without this the end cannot move.
                _unless_full(btrfs.compact, fd)
            while keep + LEAST_GROWTH <= size and not _unless_full(btrfs.resize, fd, keep):
                keep += (size - keep) // 2 // MiB * MiB + MiB
            if keep + LEAST_GROWTH > size:
                return 0
            faults.point("pool.trim.shrunk")
            fs.syncfs(fd)
            if btrfs.device_bytes(fd) > keep:
                raise PoolBroken("btrfs did not take its new size")
        device = loop.find(self.file)
        if device is None:
            raise PoolBroken(f"{self.file} has lost its loop device")
        with device, opened(self.file, os.O_RDWR) as fd:
            os.ftruncate(fd, keep)
            os.fsync(fd)
            faults.point("pool.trim.truncated")
            device.set_capacity()
        log.info("pool.trimmed", size_bytes=keep)
        return size - keep

    # --- close

    def close(self) -> None:
        """Unmount; the device goes with it. Raises PoolBroken naming who uses the pool; then nothing was done."""
        entry = mount.mount_at(self.target)
        if entry is None:
            return
        users = list(mount_users(entry))
        if not users:
            try:
                mount.unmount(self.target)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise PoolBroken(f"{self.target} cannot be unmounted: {error.strerror}") from error
                users = list(file_users(self.target)) or ["a process that cannot be found"]
        if users:
            raise PoolBroken(
                f"the pool is in use by {', '.join(users[:5])}" + (" and others" if len(users) > 5 else ""),
                next_step="Stop the workspaces first (`roost stop`), then try again.",
            )
        deadline = time.monotonic() + 5.0
        while (device := loop.find(self.file)) is not None and time.monotonic() < deadline:
            device.close()
            time.sleep(0.02)
        if device is not None:
            device.close()
            log.warning("pool.device_stays", device=str(device.path))


def _no_room(folder: Path, size: int, free: int, reserve: int) -> HostDiskFull:
    return HostDiskFull(
        f"the pool needs {size >> 20} MiB beside a reserve of {reserve >> 20} MiB, {folder} has {free >> 20} MiB free",
        next_step="Free space on the host, or set [pool] initial_bytes and reserve_bytes lower.",
    )


def _unless_full(action: Callable[..., None], *arguments: int) -> bool:
    """Whether a rearrangement was done; False: there is no room to move things, or another one is under way."""
    try:
        action(*arguments)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EINVAL, errno.ETXTBSY, errno.EINPROGRESS, errno.ECANCELED):
            raise
        return False
    return True


def require_btrfs() -> None:
    """Load the kernel's btrfs if need be. Raises MissingFeature."""
    filesystems = Path("/proc/filesystems")
    if "\tbtrfs\n" in filesystems.read_text():
        return
    with suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(["modprobe", "btrfs"], capture_output=True, timeout=20, check=False)
    if "\tbtrfs\n" not in filesystems.read_text():
        raise MissingFeature("the kernel has no btrfs, which the pool is made of")


def mount_users(pool: mount.MountEntry) -> Iterator[str]:
    """Mounts, in any namespace, that show a part of the pool elsewhere or have it as an overlay's upper layer."""
    seen: set[str] = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            namespace = str((folder / "ns/mnt").readlink())
            if namespace in seen:
                continue
            seen.add(namespace)
            entries = mount.mounts(folder.name)
            name = (folder / "comm").read_text().strip()
        except OSError:  # it ended
            continue
        for entry in entries:
            part = entry.device == pool.device and entry.target != pool.target
            upper = entry.fstype == "overlay" and f"={pool.target}/" in entry.super_options
            if part or upper:
                yield f"{name} (pid {folder.name}, {entry.target})"
                break


def file_users(target: Path) -> Iterator[str]:
    """Processes with a file or their working directory below a path."""
    prefix = str(target.resolve())
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            for link in (folder / "cwd", folder / "root", *(folder / "fd").iterdir()):
                where = os.fspath(link.readlink())
                if where == prefix or where.startswith(prefix + "/"):
                    yield f"{(folder / 'comm').read_text().strip()} (pid {folder.name}, {where})"
                    break
