"""The log of each start: what was tried, what git said, why it failed.  JSON lines, one file a start, kept for days."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import structlog

log = structlog.get_logger()


class StartLog:
    """Appends to the log of one start; a disk that is full loses lines, never the start."""

    def __init__(self, file: TextIO | None) -> None:
        self._file = file

    def write(self, text: str) -> None:
        if self._file is None:
            return
        try:
            for line in text.splitlines():
                self._file.write(json.dumps({"at": time.time(), "channel": "start", "text": line}) + "\n")
            self._file.flush()
        except OSError as error:
            log.warning("start log cannot be written", error=str(error))
            self._file = None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class StartLogs:
    """The start logs of a node: `<directory>/<workspace id>/<start>.jsonl`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def open(self, workspace: str, start: int) -> StartLog:
        try:
            folder = self._directory / workspace
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            return StartLog((folder / f"{start}.jsonl").open("a", encoding="utf-8"))
        except OSError as error:
            log.warning("start log cannot be opened", error=str(error))
            return StartLog(None)

    def path(self, workspace: str, *, previous: bool = False) -> Path | None:
        """The newest log of a workspace, or the one before it."""
        found = sorted((self._directory / workspace).glob("*.jsonl"), key=lambda path: int(path.stem))
        wanted = 2 if previous else 1
        return found[-wanted] if len(found) >= wanted else None

    def read(self, workspace: str, *, previous: bool = False) -> Iterator[str]:
        """The lines as they were written (JSON)."""
        path = self.path(workspace, previous=previous)
        if path is not None:
            with path.open(encoding="utf-8") as file:
                yield from (line.rstrip("\n") for line in file)

    def sweep(self, keep_s: float) -> None:
        """Drop logs older than that, but the newest two of each workspace; empty folders go."""
        limit = time.time() - keep_s
        for folder in self._directory.glob("*"):
            logs = sorted(folder.glob("*.jsonl"), key=lambda path: int(path.stem))
            for path in logs[:-2]:
                if path.stat().st_mtime < limit:
                    path.unlink(missing_ok=True)

    def forget(self, workspace: str) -> None:
        shutil.rmtree(self._directory / workspace, ignore_errors=True)
