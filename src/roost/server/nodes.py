"""The server's end of the nodes' connections.

A node dials the server and keeps one websocket: assignments and calls go down, reports and answers come up.  A stream
(exec, logs) is a second websocket that the node dials when it is told the stream's one-use id; so each stream has the
transport's own flow control, and none can hold up another or the control connection.
See docs/decisions/0002-node-connection.md.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import structlog
from fastapi import WebSocket, WebSocketDisconnect
from pydantic import ValidationError

from roost.errors import NodeTimeout, NodeUnreachable, from_problem
from roost.workspaces.model import Assignment, Report

log = structlog.get_logger()

CALL_TIMEOUT_S = 30.0
DIAL_TIMEOUT_S = 10.0
SEND_TIMEOUT_S = 10.0
"""A node that takes in nothing for so long is stuck; it is told everything when it connects again."""
RETURN_S = 5.0
"""A node dials again within 2 s (its longest pause) once the server is there."""


@dataclass
class _Stream:
    node: NodeConnection
    dialled: asyncio.Future[WebSocket]
    over: asyncio.Event = field(default_factory=asyncio.Event)


class NodeConnection:
    """One connected node."""

    def __init__(self, socket: WebSocket, hello: dict[str, Any]) -> None:
        self.name = str(hello.get("node", "local"))
        self.hello = hello
        self.status: dict[str, Any] = {}
        self._socket = socket
        self._ids = itertools.count(1)
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._sending = asyncio.Lock()

    async def send(self, message: dict[str, Any]) -> None:
        """Raises NodeUnreachable, NodeTimeout."""
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S), self._sending:
                await self._socket.send_text(json.dumps(message))
        except TimeoutError as error:
            raise NodeTimeout(f"node {self.name} takes in nothing") from error
        except (WebSocketDisconnect, RuntimeError) as error:
            raise NodeUnreachable(f"the connection to node {self.name} broke") from error

    async def assign(self, assignment: Assignment) -> None:
        await self.send({"type": "assign", "assignment": assignment.model_dump(mode="json")})

    async def call(self, method: str, params: dict[str, Any], timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Ask the node for something and wait for its answer. Raises the node's error, NodeUnreachable, NodeTimeout."""
        number = next(self._ids)
        answer = self._calls[number] = asyncio.get_running_loop().create_future()
        try:
            await self.send({"type": "call", "id": number, "method": method, "params": params})
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError as error:
            raise NodeTimeout(f"node {self.name} did not answer {method} within {timeout_s:g} s") from error
        finally:
            del self._calls[number]

    def answered(self, message: dict[str, Any]) -> None:
        future = self._calls.get(int(message.get("id", 0)))
        if future is None or future.done():
            return
        if message.get("error"):
            future.set_exception(from_problem(message["error"]))
        else:
            future.set_result(message.get("result"))

    def gone(self) -> None:
        for future in self._calls.values():
            if not future.done():
                future.set_exception(NodeUnreachable(f"the connection to node {self.name} broke"))


class Nodes:
    """The nodes that are connected now.  One today, named `local`; placement asks here."""

    def __init__(self) -> None:
        self._connections: dict[str, NodeConnection] = {}
        self._streams: dict[str, _Stream] = {}
        self._hangups: set[asyncio.Task[None]] = set()
        self._connected = asyncio.Event()

    def all(self) -> list[NodeConnection]:
        return list(self._connections.values())

    def any(self) -> NodeConnection:
        """The node for a workspace. Raises NodeUnreachable."""
        for connection in self._connections.values():
            return connection
        raise NodeUnreachable("no node is connected")

    async def present(self) -> NodeConnection:
        """The node for a workspace; one that is about to come back, as after a restart, is waited for.

        Raises NodeUnreachable after RETURN_S.
        """
        try:
            async with asyncio.timeout(RETURN_S):
                await self._connected.wait()
        except TimeoutError:
            pass
        return self.any()

    async def serve(
        self,
        socket: WebSocket,
        connected: Callable[[NodeConnection], Awaitable[None]],
        reported: Callable[[Report], Awaitable[None]],
    ) -> None:
        """Run one node's control connection until it ends."""
        try:
            hello = json.loads(await socket.receive_text())
        except WebSocketDisconnect:
            return
        connection = NodeConnection(socket, hello)
        self._connections[connection.name] = connection
        self._connected.set()
        log.info("node connected", node=connection.name, version=hello.get("version"))
        try:
            await connected(connection)
            while True:
                message = json.loads(await socket.receive_text())
                match message.get("type"):
                    case "report":
                        await self._take(message["report"], reported)
                        await connection.send({"type": "ack", "seq": message["report"]["seq"]})
                    case "answer":
                        connection.answered(message)
                    case "status":
                        connection.status = message.get("status", {})
                    case other:
                        log.warning("node says something unknown", node=connection.name, type=other)
        except (WebSocketDisconnect, NodeUnreachable, NodeTimeout) as error:
            log.info("node disconnected", node=connection.name, reason=str(error))
        finally:
            connection.gone()
            for stream in self._streams.values():
                if stream.node is connection and not stream.dialled.done():
                    stream.dialled.set_exception(NodeUnreachable(f"the connection to node {connection.name} broke"))
            if self._connections.get(connection.name) is connection:
                del self._connections[connection.name]
            if not self._connections:
                self._connected.clear()

    @staticmethod
    async def _take(document: dict[str, Any], reported: Callable[[Report], Awaitable[None]]) -> None:
        try:
            report = Report.model_validate(document)
        except ValidationError as error:
            # Not taken in, yet acknowledged: it would be sent for ever, and keep back all that come after it.
            log.error("a report cannot be read; it is dropped", error=str(error), report=document)
            return
        await reported(report)

    @asynccontextmanager
    async def stream(self, kind: str, params: dict[str, Any]) -> AsyncIterator[WebSocket]:
        """Have the node dial a stream for us; leaving the block ends it there. Raises NodeUnreachable, NodeTimeout."""
        node, ident = await self.present(), secrets.token_urlsafe(24)
        entry = self._streams[ident] = _Stream(node, asyncio.get_running_loop().create_future())
        try:
            await node.send({"type": "dial", "stream": ident, "kind": kind, "params": params})
            try:
                async with asyncio.timeout(DIAL_TIMEOUT_S):
                    socket = await entry.dialled
            except TimeoutError as error:
                raise NodeTimeout(
                    f"node {node.name} did not open the {kind} stream within {DIAL_TIMEOUT_S:g} s"
                ) from error
            yield socket
        finally:
            self._streams.pop(ident, None)
            entry.over.set()
            # Over the control connection: a node that waits for a command to take input reads nothing on the stream's.
            # In a task of its own: whoever leaves the block may be cancelled.
            hangup = asyncio.create_task(self._hang_up(node, ident))
            self._hangups.add(hangup)
            hangup.add_done_callback(self._hangups.discard)

    @staticmethod
    async def _hang_up(node: NodeConnection, ident: str) -> None:
        with suppress(NodeUnreachable, NodeTimeout):
            await node.send({"type": "hangup", "stream": ident})

    async def dialled(self, ident: str, socket: WebSocket) -> bool:
        """A node dialled a stream: hand it over and hold it until it is over. False: nobody waits for it."""
        entry = self._streams.get(ident)
        if entry is None or entry.dialled.done():
            return False
        await socket.accept()
        if entry.dialled.done():  # nobody waits any more
            return True
        entry.dialled.set_result(socket)
        await entry.over.wait()
        return True
