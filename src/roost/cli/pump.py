"""File descriptors of ours joined to a command in a workspace, at the pace of the slower side.

- Input: a regular file is read in a thread (it never blocks for long); whatever can be polled is read when it is
  readable, so an idle terminal holds no thread and nothing has to be interrupted at the end.
- Output: written whole, in order, in one thread of our own: stdout may be a pipe somebody does not read, and the loop
  must go on carrying input, signals and the end of the connection meanwhile.
- Descriptors are used as they are: no O_NONBLOCK, which would be set for everybody who shares the terminal.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import stat
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from roost.client.http import PIECE
from roost.client.sockets import Channel, Exec
from roost.errors import ServerUnreachable

_PIPE_BYTES = 1 << 20


async def join(command: Exec, stdin: int | None, stdout: int, stderr: int) -> int:
    """Carry everything until the command has ended; its exit code.

    Raises BrokenPipeError when nobody reads our output any more, and what the command's connection raises.
    """
    for descriptor in (stdin, stdout, stderr):
        if descriptor is not None:
            _widen(descriptor)
    sending = asyncio.create_task(send_all(command, stdin)) if stdin is not None else None
    loop = asyncio.get_running_loop()
    writer = ThreadPoolExecutor(1, thread_name_prefix="output")
    targets = {Channel.stdout: stdout, Channel.stderr: stderr}
    writing: asyncio.Future[None] | None = None
    try:
        async for channel, data in command.output():
            if writing is not None:
                await writing
            writing = loop.run_in_executor(writer, _write, targets[channel], data)
        if writing is not None:
            await writing
    finally:
        if sending is not None:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        writer.shutdown(wait=False)
    assert command.exit_code is not None
    return command.exit_code


def _widen(descriptor: int) -> None:
    """A pipe holds 64 KiB by default: four times the messages, four times the wake-ups (pipe(7))."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def _write(descriptor: int, data: memoryview) -> None:
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:  # somebody else made it non-blocking
            _wait_writable(descriptor)


def _wait_writable(descriptor: int) -> None:
    import select

    select.select([], [descriptor], [])


async def send_all(command: Exec, descriptor: int) -> None:
    # A command may end without reading all of its input: then the connection is gone, and `output` says how it ended.
    with contextlib.suppress(ServerUnreachable):
        async for piece in read(descriptor):
            await command.send(piece)
        await command.end_input()


async def read(descriptor: int) -> AsyncIterator[bytes]:
    """What can be read from a descriptor, until its end."""
    try:
        pollable = not stat.S_ISREG(os.fstat(descriptor).st_mode)
    except OSError:  # closed: there is no input
        return
    while True:
        if pollable:
            try:
                await _readable(descriptor)
            except PermissionError:  # epoll knows no such thing: /dev/null, some devices
                pollable = False
                continue
            try:
                piece = os.read(descriptor, PIECE)
            except BlockingIOError:
                continue
            except OSError:  # EIO: the terminal is gone
                return
        else:
            piece = await asyncio.to_thread(os.read, descriptor, PIECE)
        if not piece:
            return
        yield piece


async def _readable(descriptor: int) -> None:
    # Asked anew for each read: a reader that stays is called once more for what we have read already, and the read
    # after that would hold the loop.
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def now() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(descriptor, now)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)
