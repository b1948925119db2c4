"""The pool: where containers' writable layers and workspaces' HOMEs lie, on btrfs.

Native where the node's state directory is on btrfs, else in a loop file (see pool_image, which has the reasons).  A
loop file that exists is always used: nothing moves by itself.  Inside:

    snapshots/        containerd's overlay snapshotter
    homes/NAME        one subvolume a volume
    trash/NAME        a volume put aside; its place says so, its record says since when
    records/NAME      an empty file whose attribute `trusted.roost.record` has labels, limit, times of a volume

A volume is where its directory is; the record only describes it.  Every change is therefore one rename, one subvolume
ioctl or one attribute replaced, each atomic, and each verb can be run again from any point it was killed at.  Records
are outside the volumes, so that nobody inside can change them and a volume at its limit has one still; and they are
attributes, because those need no data extent: in a pool without a free byte a HOME must go to the trash all the same.

Quotas.  In our own loop file simple quotas are switched on.  On the host's own btrfs they are used when they are on and
never switched on by us: they set an incompat flag with which a kernel before 6.7 no longer mounts that file system, and
that is for its owner to decide.  Without them a limit is recorded and usage is not known per volume.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import structlog

from roost import faults
from roost.errors import (
    EngineFailed,
    HostDiskFull,
    InvalidRequest,
    NeedsRoot,
    PoolBroken,
    PoolFull,
    RoostError,
    VolumeNotFound,
)
from roost.linux import btrfs, fs
from roost.node.pool_image import Growth, PoolImage, host_free, opened
from roost.runtimes.protocol import VolumeInfo, VolumeName
from roost.settings import Settings

LOCK_TIMEOUT_S = 60.0
HOST_FLOOR_BYTES = 64 << 20
"""Below this the engine's own files on the host's disk (metadata, logs) can no longer be written."""
RECORD_MAX_BYTES = 3500
_RECORD = "trusted.roost.record"
_UNFINISHED = -1
"""In place of the limit of a volume whose making was begun."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

log = structlog.get_logger()


@dataclass(frozen=True)
class PoolUsage:
    """Room of the pool, in bytes."""

    total_bytes: int
    used_bytes: int
    free_bytes: int
    host_free_bytes: int
    """Of the file system that holds the state directory."""
    grown_bytes: int
    """Size of the loop file; 0 when native."""
    native: bool
    quotas: bool
    """Whether limits of volumes are enforced."""

    @property
    def used_percent(self) -> float:
        return 100.0 * self.used_bytes / self.total_bytes if self.total_bytes else 100.0


@dataclass(frozen=True)
class _Record:
    limit_bytes: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    created_at: float = 0.0
    trashed_at: float | None = None


class Pool:
    """The pool of one node.  Synchronous and thread-safe; every method may block on the disk."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings.pool
        self._state = settings.node_state
        self.root = self._state / "pool"
        """Where the pool is mounted."""
        self.snapshots_dir = self.root / "snapshots"
        self.homes_dir = self.root / "homes"
        self.trash_dir = self.root / "trash"
        self._records = self.root / "records"
        self._image = PoolImage(self._state, self.root, self._settings)
        self._lock = threading.RLock()
        self._quotas = False
        self._native = False

    # --- the whole

    def open(self) -> None:
        """Make the pool if there is none, mount or adopt it, finish what was interrupted; again: no change.

        Raises HostDiskFull, MissingFeature, MissingProgram, PoolBroken, NeedsRoot.
        """
        if os.geteuid() != 0:
            raise NeedsRoot("the pool is mounted by root")
        self._state.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._exclusive(), _translated("the pool cannot be opened"):
            self._native = not self._image.file.exists() and btrfs.is_btrfs(self._state)
            if self._native:
                self.root.mkdir(mode=0o700, exist_ok=True)
            else:
                self._image.open()
            with opened(self.root) as fd:
                if not self._native:
                    os.fchmod(fd, 0o700)
                    if self._settings.quotas and btrfs.kernel_has_simple_quotas():
                        btrfs.enable_simple_quotas(fd)
                self._quotas = self._settings.quotas and btrfs.quota_state(fd).enabled
                faults.point("pool.open.quotas")
                for folder in (self.snapshots_dir, self.homes_dir, self.trash_dir, self._records):
                    folder.mkdir(mode=0o700, exist_ok=True)
                fs.syncfs(fd)
        log.info("pool.open", path=str(self.root), native=self._native, quotas=self._quotas)

    def close(self) -> None:
        """Unmount; not open: no error. Raises PoolBroken naming who still uses it, and leaves it mounted."""
        if not self._state.is_dir():
            return
        with self._exclusive():
            if not self._native:
                self._image.close()

    def usage(self) -> PoolUsage:
        """Room as it is now."""
        if self._native:  # any number of devices and profiles: only the kernel can count those
            state = os.statvfs(self.root)
            total, free = state.f_blocks * state.f_frsize, state.f_bavail * state.f_frsize
        else:
            with opened(self.root) as fd:
                room = btrfs.room(fd)
            total, free = room.total, room.free
        return PoolUsage(
            total_bytes=total,
            used_bytes=total - free,
            free_bytes=free,
            host_free_bytes=host_free(self._state),
            grown_bytes=0 if self._native else self._image.size(),
            native=self._native,
            quotas=self._quotas,
        )

    def ensure_room(self) -> None:
        """Return if a new start may take room here, growing first where that helps.

        Raises PoolFull at [pool] refuse_percent, HostDiskFull when it is the host's disk that keeps the pool from
        growing, or when the host's disk has no room even for logs.
        """
        self.grow_if_needed()
        with self._exclusive():
            outcome = Growth.grown
            while (usage := self.usage()).used_percent >= self._settings.refuse_percent and outcome is Growth.grown:
                outcome = Growth.at_maximum if self._native else self._image.grow()
        text = f"the pool is {usage.used_percent:.0f} % full ({usage.free_bytes >> 20} MiB free)"
        if usage.used_percent >= self._settings.refuse_percent:
            if outcome is Growth.host_full:
                raise HostDiskFull(f"{text} and cannot grow: the host has {usage.host_free_bytes >> 20} MiB free")
            raise PoolFull(text)
        if usage.host_free_bytes < min(HOST_FLOOR_BYTES, self._settings.reserve_bytes):
            raise HostDiskFull(f"the host's disk has {usage.host_free_bytes >> 20} MiB free")

    def grow_if_needed(self) -> bool:
        """Enlarge the loop file while less than a step of it is free; returns whether it grew. Call it periodically.

        Raises PoolBroken; a host without room is no error here (see `ensure_room`).
        """
        if self._native:
            return False
        grown = False
        with self._exclusive():
            while self.usage().free_bytes < self._settings.step_bytes:
                if self._image.grow() is not Growth.grown:
                    break
                grown = True
        return grown

    def trim(self) -> int:
        """Give room that is free in the pool back to the host; returns the bytes given back.

        Leaves two steps free, and never goes below [pool] initial_bytes.  Moves data, so it costs reads and writes: for
        quiet hours, or after much was purged.
        """
        if self._native:
            return 0
        with self._exclusive(), _translated("the pool cannot be trimmed"):
            keep = self.usage().used_bytes + 2 * self._settings.step_bytes
            return self._image.shrink(max(keep, self._settings.initial_bytes))

    # --- volumes (roost.runtimes.cri.volumes.VolumeStore)

    def create(self, name: VolumeName, limit_bytes: int, labels: Mapping[str, str]) -> None:
        """Make an empty volume (root:root 0755 until it is seeded), or set limit and labels of the one that is there.

        Raises PoolFull, HostDiskFull; EngineFailed if a volume of this name is in the trash.
        """
        home = self.homes_dir / _checked(name)
        with self._lock, _translated(f"volume {name} cannot be made"):
            if btrfs.is_subvolume(home):
                old = self._record(name)
            elif btrfs.is_subvolume(self.trash_dir / name):
                raise EngineFailed(f"a volume {name} is in the trash", next_step="Restore or purge it first.")
            else:
                self.ensure_room()
                # A volume without its labels would be nobody's; a record without a volume is nothing.
                old = _Record(_UNFINISHED, dict(labels), time.time())
                self._write_record(name, old)
                faults.point("pool.create.recorded")
                with opened(self.homes_dir) as folder:
                    btrfs.create_subvolume(folder, name)
                faults.point("pool.create.made")
            new = _Record(limit_bytes, dict(labels), old.created_at)
            if new == old:
                return
            with opened(self.root) as root:
                with opened(home) as fd:
                    if old.limit_bytes == _UNFINISHED:
                        os.fchmod(fd, 0o755)
                    if self._quotas:
                        btrfs.limit_subvolume(root, btrfs.subvolume_id(fd), limit_bytes)
                faults.point("pool.create.limited")
                self._write_record(name, new)  # after it holds, so that a run killed before this sets it again
                fs.syncfs(root)
            faults.point("pool.create.done")

    def path(self, name: VolumeName) -> Path:
        """The directory of a volume that is in use. Raises VolumeNotFound."""
        home = self.homes_dir / _checked(name)
        if not btrfs.is_subvolume(home):
            raise VolumeNotFound(f"no volume {name}")
        return home

    def list(self) -> list[VolumeInfo]:
        """All volumes, those in the trash too, by name."""
        found = []
        with self._lock, opened(self.root) as root:
            for folder, trashed in ((self.homes_dir, False), (self.trash_dir, True)):
                for home in sorted(folder.iterdir()):
                    if not btrfs.is_subvolume(home):
                        continue
                    name = VolumeName(home.name)
                    record = self._record(name)
                    used = None
                    if self._quotas:
                        with opened(home) as fd:
                            used = btrfs.used_bytes(root, btrfs.subvolume_id(fd))
                    since = (record.trashed_at or home.stat().st_ctime) if trashed else None
                    limit = max(0, record.limit_bytes) if self._quotas else 0
                    found.append(VolumeInfo(name, used, limit, since))
        return found

    def labels(self, name: VolumeName) -> Mapping[str, str]:
        """The labels a volume was made with, in use or trashed. Raises VolumeNotFound."""
        _checked(name)
        if not any(btrfs.is_subvolume(folder / name) for folder in (self.homes_dir, self.trash_dir)):
            raise VolumeNotFound(f"no volume {name}")
        return self._record(name).labels

    def trash(self, name: VolumeName) -> None:
        """Put a volume aside; nothing is lost. Absent or in the trash already: no error."""
        self._move(name, self.homes_dir, self.trash_dir, "pool.trash")

    def restore(self, name: VolumeName) -> None:
        """Bring a volume back from the trash; in use already: no error. Raises VolumeNotFound."""
        if not self._move(name, self.trash_dir, self.homes_dir, "pool.restore"):
            self.path(name)

    def _move(self, name: VolumeName, source: Path, target: Path, point: str) -> bool:
        _checked(name)
        with self._lock, _translated(f"volume {name} cannot be moved"), opened(self.root) as root:
            if not btrfs.is_subvolume(source / name):
                return False
            # The record before the rename: while the volume is in use its trashed_at means nothing.
            record = asdict(self._record(name))
            if target == self.trash_dir:
                self._write_record(name, _Record(**{**record, "trashed_at": time.time()}))
                faults.point(f"{point}.recorded")
            fs.rename_noreplace(str(source / name), str(target / name))
            faults.point(f"{point}.renamed")
            if target == self.homes_dir:
                self._write_record(name, _Record(**{**record, "trashed_at": None}))
                faults.point(f"{point}.recorded")
            fs.syncfs(root)
        return True

    def purge(self, name: VolumeName) -> None:
        """Destroy a volume that is in the trash; one in use is left alone, an absent one is no error."""
        _checked(name)
        with self._lock, _translated(f"volume {name} cannot be purged"), opened(self.root) as root:
            home = self.trash_dir / name
            if btrfs.is_subvolume(home):
                with opened(home) as fd:
                    subvolume = btrfs.subvolume_id(fd)
                if self._quotas:
                    btrfs.limit_subvolume(root, subvolume, 0)  # at its limit, what is inside could not be deleted
                btrfs.delete_subvolume_tree(root, subvolume)
                faults.point("pool.purge.deleted")
            if not btrfs.is_subvolume(self.homes_dir / name):
                (self._records / name).unlink(missing_ok=True)
            fs.syncfs(root)

    # --- records

    def _record(self, name: VolumeName) -> _Record:
        try:
            return _Record(**json.loads(os.getxattr(self._records / name, _RECORD)))
        except FileNotFoundError:
            return _Record()
        except OSError as error:
            if error.errno != errno.ENODATA:  # killed between the file and its attribute
                raise
            return _Record()
        except (ValueError, TypeError) as error:
            log.warning("pool.record_unreadable", volume=name, reason=str(error))
            return _Record()

    def _write_record(self, name: VolumeName, record: _Record) -> None:
        raw = json.dumps(asdict(record)).encode()
        if len(raw) > RECORD_MAX_BYTES:
            raise InvalidRequest(f"the labels of volume {name} are longer than {RECORD_MAX_BYTES} bytes")
        with opened(self._records / name, os.O_RDONLY | os.O_CREAT) as fd:
            os.setxattr(fd, _RECORD, raw)

    # --- locks

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One thread of one process: for what changes the pool as a whole."""
        with self._lock:
            fd = os.open(self._state / "pool.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                deadline = time.monotonic() + LOCK_TIMEOUT_S
                while True:
                    try:
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError as error:
                        if time.monotonic() > deadline:
                            raise PoolBroken("another process has been changing the pool for a minute") from error
                        time.sleep(0.02)
                yield
            finally:
                os.close(fd)


def _checked(name: VolumeName) -> VolumeName:
    if not _NAME.fullmatch(name):
        raise InvalidRequest(f"{name!r} cannot be the name of a volume")
    return name


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """OSError as the error that says what it means for the pool."""
    try:
        yield
    except RoostError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PoolFull(f"{what}: {error.strerror}") from error
        raise PoolBroken(f"{what}: {error.strerror} ({error.filename})") from error
