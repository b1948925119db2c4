"""The named pipes of one exec, our ends of them."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from roost.errors import EngineTimeout
from roost.runtimes.protocol import Channel
from roost.runtimes.streams import Streams

PIPE_BYTES = 1 << 20
"""Linux lets anybody have this much (/proc/sys/fs/pipe-max-size); a refusal only costs speed."""
_CONNECT_S = 10.0
_CONNECT_STEP_S = 0.001


class Fifos(Streams):
    """Made by `open`, gone after `remove`; ends close one by one. A terminal has no stderr of its own."""

    def __init__(self, folder: Path, *, stdin: bool, tty: bool) -> None:
        super().__init__()
        self.folder = folder
        self.stdin_path = str(folder / "stdin") if stdin else ""
        self.stdout_path = str(folder / "stdout")
        self.stderr_path = "" if tty else str(folder / "stderr")
        self._placeholder: int | None = None

    @classmethod
    def left_behind(cls, folder: Path) -> Fifos:
        """Those of an earlier process, opened for reading as far as they are there (to let a blocked writer go)."""
        fifos = cls(folder, stdin=False, tty=False)
        for channel in Channel:
            with suppress(OSError):
                fd = os.open(folder / channel.value, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                if stat.S_ISFIFO(os.fstat(fd).st_mode):
                    fifos.readers[channel] = fd
                else:
                    os.close(fd)
        return fifos

    def open(self) -> None:
        """Make and open them. Failing, `remove` cleans up what there is."""
        self.folder.mkdir(mode=0o700, parents=True)
        for channel, path in ((Channel.stdout, self.stdout_path), (Channel.stderr, self.stderr_path)):
            if path:
                os.mkfifo(path, 0o600)
                self.readers[channel] = fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                _enlarge(fd)
        if self.stdin_path:
            os.mkfifo(self.stdin_path, 0o600)
            # A FIFO opens for writing only while somebody reads: ourselves, until the shim does.
            self._placeholder = os.open(self.stdin_path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            self.writer = os.open(self.stdin_path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            _enlarge(self.writer)

    async def connected(self) -> None:
        """Return when the shim reads stdin. Raises EngineTimeout."""
        if self._placeholder is None:
            return
        os.close(self._placeholder)
        self._placeholder = None
        deadline = asyncio.get_running_loop().time() + _CONNECT_S
        while True:
            try:
                os.close(os.open(self.stdin_path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
                return
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
            if asyncio.get_running_loop().time() > deadline:
                raise EngineTimeout("the container's helper does not take stdin")
            await asyncio.sleep(_CONNECT_STEP_S)

    def remove(self) -> None:
        """Close every end and remove the files. Idempotent."""
        self.close_all()
        if self._placeholder is not None:
            os.close(self._placeholder)
            self._placeholder = None
        shutil.rmtree(self.folder, ignore_errors=True)


def _enlarge(fd: int) -> None:
    with suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
