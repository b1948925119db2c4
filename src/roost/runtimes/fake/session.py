"""A command of the fake runtime: a real process of this host, in a directory that stands for the container."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import struct
import subprocess
import termios
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from roost.errors import InternalError
from roost.runtimes.protocol import Channel, TerminalSize
from roost.runtimes.streams import Streams

_EOT = b"\x04"


class FakeSession(Streams):
    """An ExecSession (see the protocol) on pipes or a pseudo-terminal of this host."""

    def __init__(self, on_close: Callable[[FakeSession], None]) -> None:
        super().__init__()
        self._on_close = on_close
        self._process: subprocess.Popen[bytes] | None = None
        self._tty: int | None = None
        self._line_open = False
        self._writing = asyncio.Lock()
        self._finished = False

    async def begin(
        self, argv: list[str], cwd: Path, env: Mapping[str, str], tty: TerminalSize | None, stdin: bool
    ) -> None:
        """Start it. Raises OSError as execve(2) does."""
        if tty is not None:
            ours, theirs = os.openpty()
            _set_size(ours, tty)
            ends = [theirs, theirs, theirs]
            # One more of it, held to the end: closing the last hangs up, and a command may close its side, then go on.
            self.readers[Channel.stdout], self.writer, self._tty = ours, os.dup(ours), os.dup(ours)
        else:
            pairs = [os.pipe2(os.O_CLOEXEC) for _ in Channel]
            self.readers = {channel: pair[0] for channel, pair in zip(Channel, pairs, strict=True)}
            if stdin:
                their_stdin, self.writer = os.pipe2(os.O_CLOEXEC)
            else:
                their_stdin = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            ends = [their_stdin, *(pair[1] for pair in pairs)]
        for fd in (*self.readers.values(), *([self.writer] if self.writer is not None else [])):
            os.set_blocking(fd, False)
        # `setsid --ctty` makes the terminal the command's own; it is our child, no group leader, so its pid stays.
        prefix = ["setsid", "--ctty"] if tty is not None else []
        try:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - quick, and cannot be cancelled half-way
                [*prefix, *argv], cwd=cwd, env=dict(env), stdin=ends[0], stdout=ends[1], stderr=ends[2],
                start_new_session=tty is None,
            )  # fmt: skip
        except BaseException:
            self._close_fds()
            raise
        finally:
            for fd in set(ends):
                os.close(fd)
        self.over = asyncio.create_task(self._await_exit(self._process))
        if tty is not None and not stdin:
            await self.close_stdin()

    @staticmethod
    async def _await_exit(process: subprocess.Popen[bytes]) -> int:
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        pidfd = os.pidfd_open(process.pid)
        loop.add_reader(pidfd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
        code = process.wait()
        return code if code >= 0 else 128 - code

    async def wait(self) -> int:
        if self.over is None:
            raise InternalError("the command was not started")
        return int(await asyncio.shield(self.over))

    async def write(self, data: bytes) -> None:
        async with self._writing:
            if self._tty is not None and data:
                self._line_open = not data.endswith((b"\n", b"\r", _EOT))
            await super().write(data)

    async def close_stdin(self) -> None:
        if self._tty is not None:
            await self.write(_EOT * 2 if self._line_open else _EOT)
        async with self._writing:
            self.close_writer()

    async def resize(self, size: TerminalSize) -> None:
        if self._tty is not None:
            _set_size(self._tty, size)

    async def signal(self, number: int) -> None:
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to all of its process group, as when its container goes."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def close(self) -> None:
        if self._finished:
            return
        self._finished = True
        await self.release()
        self.kill()
        if self.over is not None:
            drain = asyncio.create_task(self.drain())
            await asyncio.gather(self.over, return_exceptions=True)
            drain.cancel()
            await asyncio.gather(drain, return_exceptions=True)
        self._close_fds()
        self._on_close(self)

    def _close_fds(self) -> None:
        self.close_all()
        if self._tty is not None:
            os.close(self._tty)
            self._tty = None


def _set_size(fd: int, size: TerminalSize) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", size.rows, size.columns, 0, 0))
