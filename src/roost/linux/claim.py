"""One process of a kind for a run directory: a lock the kernel frees with its holder, and a pid file for others."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from roost.errors import AlreadyRunning
from roost.linux.process import PidFile, ProcessId, read_pidfile, write_pidfile


@contextmanager
def claim(folder: Path, kind: str) -> Iterator[None]:
    """Be the one `kind` of a run directory meanwhile: `<kind>.lock` held, `<kind>.pid` written.

    Raises AlreadyRunning, naming the holder.
    """
    pidfile = folder / f"{kind}.pid"
    lock = os.open(folder / f"{kind}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = read_pidfile(pidfile)
            who = f" (pid {holder.process.pid})" if holder is not None else ""
            raise AlreadyRunning(f"a {kind} runs already{who} and holds {folder}") from error
        own = ProcessId.of(os.getpid())
        assert own is not None  # it is us
        write_pidfile(pidfile, PidFile(own))
        yield
    finally:
        os.close(lock)
