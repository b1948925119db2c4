"""Container logs: the files that CRI engines write, and their format.

A line is `<RFC 3339 with nanoseconds> <stdout|stderr> <P|F>[:tags] <text>`; P marks a part of a line that was longer
than the engine's buffer, F its last part (kubernetes, pkg/kubelet/kuberuntime/logs).  Each start of a container writes
a file of its own, `<log_dir>/<container>/<start>.log`: they outlive the container, and who wants the one before the
present takes the file before the last.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from roost.errors import ContainerNotFound
from roost.runtimes.protocol import Channel, ContainerId, LogLine

_POLL_S = 0.2
_BLOCK = 256 << 10
_LONGEST_LINE = 1 << 20
"""A longer line is given in parts; a log cannot fill our memory."""


@dataclass
class LogParser:
    """Bytes of a log file in, lines out. Text that is not in the format is skipped."""

    _rest: bytes = b""
    _parts: dict[Channel, tuple[float, bytes]] = field(default_factory=dict)

    def feed(self, data: bytes) -> list[LogLine]:
        """Lines completed by these bytes; times in seconds since the epoch."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        lines = []
        for raw in whole:
            line = self._line(raw)
            if line is not None:
                lines.append(line)
        return lines

    def end(self) -> list[LogLine]:
        """What was written without an end of line."""
        left = [LogLine(at, channel, _text(data)) for channel, (at, data) in self._parts.items() if data]
        self._parts.clear()
        return sorted(left, key=lambda line: line.at)

    def _line(self, raw: bytes) -> LogLine | None:
        try:
            time, stream, tags, text = raw.split(b" ", 3)
            at = datetime.fromisoformat(time.decode()).timestamp()
            channel = Channel(stream.decode())
        except ValueError:
            return None
        begun, before = self._parts.pop(channel, (at, b""))
        text = before + text
        if tags.split(b":")[0] == b"P" and len(text) < _LONGEST_LINE:
            self._parts[channel] = (begun, text)
            return None
        return LogLine(begun, channel, _text(text))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace").removesuffix("\r")


class Logs:
    def __init__(self, folder: Path, running: Callable[[ContainerId, str], Awaitable[bool]]) -> None:
        """`running`: whether the container runs for that start (name of the log file without its suffix)."""
        self._folder = folder
        self._running = running

    def files(self, container: ContainerId) -> list[Path]:
        """Log files of a container, oldest start first. Blocks."""

        def order(path: Path) -> tuple[int, str]:
            return (int(path.stem) if path.stem.isdecimal() else -1, path.stem)

        folder = self._folder / container
        return sorted((path for path in folder.glob("*.log") if path.is_file()), key=order) if folder.is_dir() else []

    def forget(self, container: ContainerId, keep: int = 0) -> None:
        """Remove all but the newest `keep` files. Blocks."""
        files = self.files(container)
        for path in files[: len(files) - keep]:
            path.unlink(missing_ok=True)
        if not keep:
            shutil.rmtree(self._folder / container, ignore_errors=True)

    async def read(self, container: ContainerId, *, follow: bool, previous: bool) -> AsyncIterator[LogLine]:
        files = await asyncio.to_thread(self.files, container)
        wanted = 2 if previous else 1
        if len(files) < wanted:
            raise ContainerNotFound(
                f"{container} has no earlier log" if previous and files else f"no log of {container} is here"
            )
        path = files[-wanted]
        parser = LogParser()
        file = await asyncio.to_thread(path.open, "rb")
        try:
            while True:
                # Asked before reading: what was written until the end is then read for sure.
                goes_on = follow and not previous and await self._running(container, path.stem)
                async for line in _available(file, parser):
                    yield line
                if not goes_on:
                    break
                await asyncio.sleep(_POLL_S)
            for line in parser.end():
                yield line
        finally:
            file.close()


async def _available(file: BinaryIO, parser: LogParser) -> AsyncIterator[LogLine]:
    while data := await asyncio.to_thread(file.read, _BLOCK):
        for line in parser.feed(data):
            yield line
