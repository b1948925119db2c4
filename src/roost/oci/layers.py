"""Layers: tar streams with two digests, the one of the compressed blob and the one of the tar inside (`diff_id`).

Deterministic: the gzip header carries no name and no time, so equal trees give equal blobs and a registry stores them
once.  gzip because every engine takes it (Docker 20.10 takes no zstd); level 1 because the registry is next door.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

from roost.oci.references import Digest

GZIP_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
IMAGE_CONFIG = "application/vnd.oci.image.config.v1+json"
IMAGE_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
IMAGE_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_MANIFEST_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"

CHUNK_BYTES = 1 << 20
_GZIP_WINDOW = 31  # zlib: 15 bits of window, +16 for a gzip header (without name, time 0)


@dataclass(frozen=True)
class Layer:
    """A layer's blob."""

    digest: Digest
    diff_id: Digest
    size_bytes: int
    media_type: str = GZIP_LAYER


class Sink(Protocol):
    """Where a blob goes: a binary file, or what writes like one."""

    def write(self, data: bytes, /) -> object: ...


class LayerWriter:
    """Takes a tar stream, writes the gzip blob to a file and counts both digests.

    A context manager: leaving it normally completes the blob, `layer` is there afterwards; leaving it by an exception
    leaves what is written so far, for the caller to remove.
    """

    def __init__(self, out: Sink, level: int = 1) -> None:
        self._out = out
        self._gzip = zlib.compressobj(level, zlib.DEFLATED, _GZIP_WINDOW)
        self._blob, self._tar = hashlib.sha256(), hashlib.sha256()
        self._size = 0
        self.tar_bytes = 0
        """Bytes of tar taken so far."""
        self.layer: Layer | None = None

    def write(self, data: bytes | memoryview) -> int:
        self._tar.update(data)
        self.tar_bytes += len(data)
        self._put(self._gzip.compress(data))
        return len(data)

    def close(self) -> Layer:
        """Complete the blob (the file stays open and is not synced)."""
        if self.layer is None:
            self._put(self._gzip.flush())
            self.layer = Layer(digest_of(self._blob.digest()), digest_of(self._tar.digest()), self._size)
        return self.layer

    def __enter__(self) -> LayerWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    def _put(self, data: bytes) -> None:
        if data:
            self._blob.update(data)
            self._size += len(data)
            self._out.write(data)


def digest_of(raw: bytes) -> Digest:
    """A digest from the 32 bytes of a SHA-256."""
    return Digest(f"sha256:{raw.hex()}")


def digest_bytes(data: bytes) -> Digest:
    return digest_of(hashlib.sha256(data).digest())


def digest_file(path: Path, progress: Callable[[int], None] | None = None) -> Digest:
    """Digest of a file; `progress` gets the bytes read so far. Raises OSError."""
    total, value = 0, hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            value.update(data)
            total += len(data)
            if progress:
                progress(total)
    return digest_of(value.digest())
