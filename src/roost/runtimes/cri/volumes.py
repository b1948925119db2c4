"""What the CRI runtime needs of a place where volumes lie: directories on this host."""

from __future__ import annotations

from builtins import list as List  # `list` is a method below
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from roost.runtimes.protocol import VolumeInfo, VolumeName


class VolumeStore(Protocol):
    """Volumes by name.  Synchronous and idempotent: each call blocks, and may be repeated; called from threads."""

    def create(self, name: VolumeName, limit_bytes: int, labels: Mapping[str, str]) -> None:
        """Make an empty volume, or set limit and labels of the one in use. Raises PoolFull, HostDiskFull."""

    def path(self, name: VolumeName) -> Path:
        """Directory of a volume in use. Raises VolumeNotFound."""

    def list(self) -> List[VolumeInfo]:
        """All volumes, the trashed ones too."""

    def trash(self, name: VolumeName) -> None:
        """Put aside; absent: no error."""

    def restore(self, name: VolumeName) -> None:
        """Bring back from the trash; in use already: no error. Raises VolumeNotFound."""

    def purge(self, name: VolumeName) -> None:
        """Destroy a trashed volume; one in use is left alone, an absent one is no error."""
