"""The log of each start: what was tried, what git said, why it failed.  JSON lines, one file a start, kept for days."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

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
            self.close()

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None


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
        found = _by_start(self._directory / workspace)
        wanted = 2 if previous else 1
        return found[-wanted] if len(found) >= wanted else None

    def read(self, path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
        """The entries from an offset on, and where to go on. A line that is not whole yet is left for the next time.

        Lines torn by a crash or a full disk are left out; a log that is gone is empty.
        """
        try:
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read()
        except FileNotFoundError:
            return [], offset
        whole = data[: data.rfind(b"\n") + 1]
        entries = [entry for line in whole.splitlines() if (entry := _entry(line)) is not None]
        return entries, offset + len(whole)

    def sweep(self, keep_s: float) -> None:
        """Drop logs older than that, but the newest two of each workspace."""
        limit = time.time() - keep_s
        for folder in self._directory.glob("*"):
            for path in _by_start(folder)[:-2]:
                with suppress(FileNotFoundError):  # its workspace is destroyed meanwhile
                    if path.stat().st_mtime < limit:
                        path.unlink()

    def forget(self, workspace: str) -> None:
        shutil.rmtree(self._directory / workspace, ignore_errors=True)


def _by_start(folder: Path) -> list[Path]:
    try:
        found = [path for path in folder.glob("*.jsonl") if path.stem.isdecimal()]
    except FileNotFoundError:  # its workspace is destroyed meanwhile
        return []
    return sorted(found, key=lambda path: int(path.stem))


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and {"at", "channel", "text"} <= entry.keys() else None
