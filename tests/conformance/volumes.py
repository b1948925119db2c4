"""A VolumeStore of plain directories, for tests."""

from __future__ import annotations

import builtins
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from roost.errors import VolumeNotFound
from roost.runtimes.protocol import VolumeInfo, VolumeName


class DirectoryVolumes:
    """Volumes as directories; `limited`: each a small tmpfs instead, so that it can be full."""

    def __init__(self, root: Path) -> None:
        self.homes, self.trashed = root / "homes", root / "trash"
        self.limits: dict[str, int] = {}
        self._lock = threading.Lock()
        for folder in (self.homes, self.trashed):
            folder.mkdir(parents=True, exist_ok=True)

    def create(self, name: VolumeName, limit_bytes: int, labels: Mapping[str, str]) -> None:
        with self._lock:
            (self.homes / name).mkdir(exist_ok=True)
            self.limits[name] = limit_bytes

    def path(self, name: VolumeName) -> Path:
        path = self.homes / name
        if not path.is_dir():
            raise VolumeNotFound(f"no volume {name}")
        return path

    def list(self) -> builtins.list[VolumeInfo]:
        found = [VolumeInfo(VolumeName(path.name), None, 0) for path in sorted(self.homes.iterdir())]
        for path in sorted(self.trashed.iterdir()):
            found.append(VolumeInfo(VolumeName(path.name), None, 0, trashed_at=path.stat().st_ctime or time.time()))
        return found

    def trash(self, name: VolumeName) -> None:
        if (self.homes / name).is_dir():
            (self.homes / name).rename(self.trashed / name)

    def restore(self, name: VolumeName) -> None:
        if (self.trashed / name).is_dir():
            (self.trashed / name).rename(self.homes / name)
        self.path(name)

    def purge(self, name: VolumeName) -> None:
        shutil.rmtree(self.trashed / name, ignore_errors=True)


class QuotaVolumes(DirectoryVolumes):
    """As above with an enforced limit: each volume a tmpfs of that size."""

    def create(self, name: VolumeName, limit_bytes: int, labels: Mapping[str, str]) -> None:
        path = self.homes / name
        if not path.is_dir():
            path.mkdir()
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={limit_bytes},mode=755", "tmpfs", str(path)], check=True
            )

    def close(self) -> None:
        for path in self.homes.iterdir():
            subprocess.run(["umount", "-l", str(path)], check=True)
