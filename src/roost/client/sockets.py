"""The two things that go over websockets: commands in workspaces, and the lending of an ssh-agent.

Invariants of an exec: stdin and output flow at the same time, each at the pace of the slower end (we read a message
only when the one before is written, and read stdin only when the socket took the last piece); bytes are passed on as
they are, at most PIECE a message; the end is a typed error or the command's exit code, never a broken connection taken
for a success.  No ping of ours ends a transfer whose reader has paused.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from websockets.asyncio.client import ClientConnection, connect, unix_connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from roost.client.api import AsyncClient
from roost.client.http import API, CONNECT_S, PIECE, error_of, reason_of, unreachable, workspace_path
from roost.errors import ExecFailed, ServerUnreachable, from_problem

START_S = 60.0
"""Seconds from the request to `started`: the engine may be busy with a pull."""


class Channel(IntEnum):
    stdout = 1
    stderr = 2


@dataclass(frozen=True)
class ExecRequest:
    """A command to run; no arguments: the user's login shell."""

    argv: tuple[str, ...]
    user: str | None = None
    """Name or uid; None: the workspace's own."""
    cwd: str | None = None
    """Relative to HOME; None: HOME."""
    env: Mapping[str, str] = field(default_factory=dict)
    tty: tuple[int, int] | None = None
    """Columns and rows."""
    stdin: bool = False


@asynccontextmanager
async def _dial(client: AsyncClient, path: str) -> AsyncIterator[ClientConnection]:
    address = client.address
    scheme = "wss" if address.tls else "ws"
    uri = f"{scheme}://{address.host_header}{address.prefix}{API}{path}"
    headers = dict(client.http.headers())
    agent = headers.pop("User-Agent")
    options: dict[str, Any] = {
        "additional_headers": headers,
        "user_agent_header": agent,
        "compression": None,
        "max_size": 2 << 20,
        "ping_interval": None,
        "open_timeout": CONNECT_S,
        "close_timeout": 2.0,
        "max_queue": 8,
        "write_limit": 1 << 20,
    }
    try:
        if address.socket is not None:
            connection = await unix_connect(address.socket, uri, **options)
        else:
            connection = await connect(uri, proxy=None, **options)
    except InvalidStatus as error:
        raise error_of(error.response.status_code, bytes(error.response.body or b"")) from error
    except TimeoutError as error:
        raise unreachable(address, f"no connection within {CONNECT_S:g} s") from error
    except OSError as error:
        raise unreachable(address, reason_of(error)) from error
    except InvalidHandshake as error:
        raise unreachable(address, str(error)) from error
    # A vanished peer is noticed by the kernel, not by pings that a paused reader cannot answer.
    raw = connection.transport.get_extra_info("socket")
    if raw is not None and raw.family != socket.AF_UNIX:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    try:
        yield connection
    finally:
        await connection.close()


class Exec:
    """A command that runs."""

    def __init__(self, connection: ClientConnection, what: str) -> None:
        self._connection = connection
        self._what = what
        self.exit_code: int | None = None

    async def send(self, data: bytes | memoryview) -> None:
        """Give it input; waits while it takes none."""
        for start in range(0, len(data), PIECE):
            await self._send(data[start : start + PIECE])

    async def end_input(self) -> None:
        await self._send('{"type":"eof"}')

    async def resize(self, columns: int, rows: int) -> None:
        await self._send(json.dumps({"type": "resize", "columns": columns, "rows": rows}))

    async def signal(self, number: int) -> None:
        await self._send(json.dumps({"type": "signal", "number": number}))

    async def output(self) -> AsyncIterator[tuple[Channel, memoryview]]:
        """What it writes, until it has ended; then `exit_code` is set. Raises what the node says, ServerUnreachable."""
        while True:
            try:
                message = await self._connection.recv()
            except ConnectionClosed as error:
                raise self._broken() from error
            if isinstance(message, bytes):
                if len(message) > 1:
                    yield Channel(message[0]), memoryview(message)[1:]
                continue
            document = json.loads(message)
            if document.get("type") == "exit":
                self.exit_code = int(document["code"])
                return
            if document.get("type") == "error":
                raise from_problem(document["problem"])

    async def _send(self, data: str | bytes | memoryview) -> None:
        try:
            await self._connection.send(data)
        except ConnectionClosed as error:
            raise self._broken() from error

    def _broken(self) -> ServerUnreachable:
        return ServerUnreachable(
            f"the connection broke while {self._what} ran; whether it ended is not known",
            next_step="`roost show` says whether the workspace runs; run the command again.",
        )


@asynccontextmanager
async def execute(client: AsyncClient, name: str, request: ExecRequest) -> AsyncIterator[Exec]:
    """Run a command in a workspace; the block gets it when it has started. Leaving the block early ends it.

    Raises WorkspaceNotFound, WorkspaceNotRunning, ExecNotFound, ExecNotExecutable, ExecFailed, ServerUnreachable.
    """
    document = {
        "argv": list(request.argv),
        "user": request.user,
        "cwd": request.cwd,
        "env": dict(request.env),
        "tty": {"columns": request.tty[0], "rows": request.tty[1]} if request.tty else None,
        "stdin": request.stdin,
    }
    what = request.argv[0] if request.argv else "the shell"
    async with _dial(client, workspace_path(name, "exec")) as connection:
        try:
            await connection.send(json.dumps(document))
            async with asyncio.timeout(START_S):
                answer = await connection.recv()
        except TimeoutError as error:
            raise ExecFailed(f"{what} did not start within {START_S:g} s") from error
        except ConnectionClosed as error:
            raise ServerUnreachable(f"the connection broke before {what} started") from error
        first = json.loads(answer) if isinstance(answer, str) else {}
        if first.get("type") == "error":
            raise from_problem(first["problem"])
        if first.get("type") != "started":
            raise ExecFailed(f"the server answered something else than a start: {answer[:200]!r}")
        yield Exec(connection, what)


Answer = Callable[[bytes], Awaitable[bytes]]


async def lend_agent(client: AsyncClient, name: str, answer: Answer, ready: asyncio.Event | None = None) -> None:
    """Lend the caller's ssh-agent to the clone of a workspace until cancelled or the server hangs up."""
    waiting: set[asyncio.Task[None]] = set()

    async def reply(connection: ClientConnection, message: bytes) -> None:
        body = await answer(message[4:])
        await connection.send(message[:4] + body)

    async with _dial(client, workspace_path(name, "agent")) as connection:
        if ready is not None:
            ready.set()
        try:
            async for message in connection:
                if isinstance(message, bytes) and len(message) > struct.calcsize(">I"):
                    # Several at once: a key that waits for a touch must not hold up another clone.
                    task = asyncio.create_task(reply(connection, message))
                    waiting.add(task)
                    task.add_done_callback(waiting.discard)
        except ConnectionClosed:
            return
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
