"""The pipes of a running command, our ends of them: read and written from an event loop, without threads.

Descriptors are non-blocking, and the loop's selector is asked only when there is nothing to do: a stream that has data
is read in a tight loop of large reads.  Every wait ends when the command does.

Invariant: a descriptor is closed only when nobody waits for it.  The selector knows it by number, and the number is
somebody else's a moment later; so `release` comes before the last close.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from typing import Any

from roost.errors import InternalError
from roost.runtimes.protocol import Channel

LINGER_S = 1.0
"""Output ends this long after the command, counted from the last byte, if somebody else still holds its pipes."""
READ_BYTES = 256 << 10
_DRAIN_STEP_S = 0.005


class Streams:
    """A writer (stdin) and readers (stdout, stderr), each there until it is closed."""

    def __init__(self) -> None:
        self.writer: int | None = None
        self.readers: dict[Channel, int] = {}
        self.over: asyncio.Future[Any] | None = None
        """Done when the command has ended."""
        self.released = False
        self._waiting: set[asyncio.Future[bool]] = set()
        self._read = False

    @property
    def _ended(self) -> bool:
        return self.over is None or self.over.done()

    def close_writer(self) -> None:
        if self.writer is not None:
            os.close(self.writer)
            self.writer = None

    def close_reader(self, channel: Channel) -> None:
        fd = self.readers.pop(channel, None)
        if fd is not None:
            os.close(fd)

    async def write(self, data: bytes) -> None:
        """Returns when the pipe has it all, or nobody will read it any more."""
        view = memoryview(data)
        while view and self.writer is not None and not self.released:
            try:
                view = view[os.write(self.writer, view) :]
            except BlockingIOError:
                if not await self._ready(writer=True):
                    return
            except BrokenPipeError:
                self.close_writer()

    async def output(self) -> AsyncIterator[tuple[Channel, bytes]]:
        """What comes, until all pipes are closed, or the command is over and nothing came for LINGER_S."""
        if self._read:
            raise InternalError("the output of a command is read once")
        self._read = True
        pace = _Pace()
        while self.readers and not self.released:
            got = 0
            for channel in list(self.readers):
                fd = self.readers.get(channel)
                if fd is None or self.released:  # closed by us while the caller had the floor
                    break
                data = _read(fd)
                if data is None:
                    continue
                if not data:
                    self.close_reader(channel)
                    continue
                got += len(data)
                yield channel, data
            if got:
                # A command that never pauses must not hold the loop.
                await asyncio.sleep(pace.pause(got))
            elif not self.readers:
                return
            elif not self._ended:
                await self._ready()
            elif not await self._ready(timeout_s=LINGER_S):
                return

    async def _ready(self, *, writer: bool = False, timeout_s: float | None = None) -> bool:
        """Wait until a descriptor can be used; False when the command ends, we let go, or the time is over first."""
        loop = asyncio.get_running_loop()
        wake: asyncio.Future[bool] = loop.create_future()

        def ready() -> None:
            if not wake.done():
                wake.set_result(True)

        def ended(_: object) -> None:
            if not wake.done():
                wake.set_result(False)

        running = self.over if not self._ended else None
        if self.released or (writer and running is None):
            return False
        fds = list(self.readers.values())
        if writer:
            fds = [self.writer] if self.writer is not None else []
        add, remove = (loop.add_writer, loop.remove_writer) if writer else (loop.add_reader, loop.remove_reader)
        for fd in fds:
            add(fd, ready)
        if running is not None:
            running.add_done_callback(ended)
        self._waiting.add(wake)
        try:
            async with asyncio.timeout(timeout_s):
                return await wake
        except TimeoutError:
            return False
        finally:
            self._waiting.discard(wake)
            if running is not None:
                running.remove_done_callback(ended)
            for fd in fds:
                remove(fd)

    async def release(self) -> None:
        """Have everybody let go of the descriptors; reading and writing are over."""
        self.released = True
        while self._waiting:
            for wake in self._waiting:
                if not wake.done():
                    wake.set_result(False)
            await asyncio.sleep(0)

    async def drain(self) -> None:
        """After `release`: read and drop whatever comes, until cancelled.

        Nothing is closed: who is about to open its end of a FIFO must find ours.
        """
        while True:
            for fd in list(self.readers.values()):
                if _read(fd):
                    break
            else:
                await asyncio.sleep(_DRAIN_STEP_S)
                continue
            await asyncio.sleep(0)

    def close_all(self) -> None:
        """Close every end. Idempotent."""
        self.close_writer()
        for channel in list(self.readers):
            self.close_reader(channel)


class _Pace:
    """Whether to let a fast stream fill its pipe before the next read.

    Reading as soon as there is something follows a writer in its small steps: 60,000 reads of 9 KiB for 500 MB, each of
    which is a message to somebody.  A pause of 1 ms makes them 256 KiB; a stream that is not fast never waits.
    """

    _WINDOW_S = 0.02
    _FAST_BYTES = 1 << 20
    _SMALL_BYTES = 64 << 10
    _PAUSE_S = 0.001

    def __init__(self) -> None:
        self._since = 0.0
        self._bytes = 0
        self._fast = False

    def pause(self, got: int) -> float:
        """Seconds to wait after so many bytes were read at once."""
        now = time.monotonic()
        if now - self._since > self._WINDOW_S:
            self._fast = self._bytes >= self._FAST_BYTES
            self._since, self._bytes = now, 0
        self._bytes += got
        return self._PAUSE_S if got < self._SMALL_BYTES and self._fast else 0.0


def _read(fd: int) -> bytes | None:
    """None: nothing there yet; empty: the end, for a terminal too (EIO once nobody has its other side open)."""
    try:
        return os.read(fd, READ_BYTES)
    except BlockingIOError:
        return None
    except OSError:
        return b""
