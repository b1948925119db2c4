"""Bundles that clients send, until the node has placed what is in them."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from roost.errors import HostDiskFull, StaleUpload

log = structlog.get_logger()

KEEP_S = 24 * 3600.0
"""An upload nobody asked for is dropped after this."""
_IDENT = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Upload:
    ident: str
    size_bytes: int


class Uploads:
    """Files `<directory>/<id>`; one is complete as soon as it has its name."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    async def receive(self, body: AsyncIterator[bytes]) -> Upload:
        """Store a body. Raises HostDiskFull; a broken body leaves nothing."""
        ident = secrets.token_hex(16)
        part, size = self._directory / f"{ident}.part", 0
        try:
            with part.open("xb") as file:
                async for piece in body:
                    size += len(piece)
                    await asyncio.to_thread(file.write, piece)
                await asyncio.to_thread(_sync, file.fileno())
            part.rename(self._directory / ident)
        except OSError as error:
            raise HostDiskFull(f"the upload could not be stored: {error.strerror}") from error
        finally:
            part.unlink(missing_ok=True)
        return Upload(ident, size)

    def path(self, ident: str) -> Path:
        """The file of a complete upload. Raises StaleUpload."""
        path = self._directory / ident
        if not _IDENT.fullmatch(ident) or not path.is_file():
            raise StaleUpload(f"upload {ident[:32]!r} is not here")
        return path

    def check(self, ident: str) -> None:
        self.path(ident)

    def drop(self, ident: str) -> None:
        if _IDENT.fullmatch(ident):
            (self._directory / ident).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Drop what nobody used, and parts of a server that was killed."""
        limit = time.time() - KEEP_S
        for path in self._directory.iterdir():
            with suppress(FileNotFoundError):  # placed meanwhile
                if path.stat().st_mtime < limit:
                    log.info("dropping an old upload", upload=path.name)
                    path.unlink()


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)
