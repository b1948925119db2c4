"""What flows: events and logs as server-sent events, exec and the ssh-agent over websockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from typing import Any

from fastapi import APIRouter, Request, WebSocket, WebSocketDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from roost.errors import InvalidRequest, NodeUnreachable, RoostError, WorkspaceNotRunning
from roost.server.auth import Caller
from roost.server.service import WorkspaceService
from roost.workspaces.model import Observed
from roost.workspaces.store import event_json

router = APIRouter(tags=["streams"])
KEEP_ALIVE_S = 15.0
CLOSE_S = 2.0
NORMAL = 1000
"""Close code of RFC 6455: all was said."""
NO_STORE = {"Cache-Control": "no-store"}
GONE = (WebSocketDisconnect, RuntimeError)
"""What Starlette raises on sending to a side that closed, or that we closed."""


def _sse(events: AsyncIterator[str]) -> StreamingResponse:
    return StreamingResponse(events, media_type="text/event-stream", headers=NO_STORE)


def _frame(event: dict[str, Any]) -> str:
    ident = f"id: {event['id']}\n" if event.get("id") is not None else ""
    return f"{ident}data: {json.dumps(event)}\n\n"


async def _events(service: WorkspaceService, workspace: str | None, after: int, follow: bool) -> AsyncIterator[str]:
    with service.bus.subscribe() as news:
        while page := await service.store.events(workspace, after):
            for row, name in page:
                after = row.id
                yield _frame(event_json(row, name))
        if follow and workspace is not None and (step := await service.step_at_work(workspace)) is not None:
            yield _frame(step)
        while follow:
            try:
                async with asyncio.timeout(KEEP_ALIVE_S):
                    item = await news.get()
            except TimeoutError:
                yield ": keep-alive\n\n"
                continue
            if item is None:
                return
            if not item.event or workspace not in (None, item.workspace):
                continue
            ident = item.event["id"]
            if ident is None or ident > after:
                after = ident or after
                yield _frame(item.event)


@router.get("/events")
async def all_events(request: Request, caller: Caller, follow: bool = False, after: int = 0) -> StreamingResponse:
    """What happened to all workspaces, oldest first."""
    return _sse(_events(request.app.state.service, None, after, follow))


@router.get("/workspaces/{name}/events")
async def events(
    request: Request, name: str, caller: Caller, follow: bool = False, after: int = 0
) -> StreamingResponse:
    """What happened to one workspace, oldest first."""
    row = await request.app.state.service.store.latest(name)
    return _sse(_events(request.app.state.service, row.id, after, follow))


@router.get("/workspaces/{name}/logs")
async def logs(
    request: Request, name: str, caller: Caller, follow: bool = False, previous: bool = False
) -> StreamingResponse:
    """The log of the newest start and the container's output, or of the one before."""
    row = await request.app.state.service.store.latest(name)
    held = AsyncExitStack()
    params = {"workspace": row.id, "follow": follow, "previous": previous}
    node = await held.enter_async_context(request.app.state.nodes.stream("logs", params))
    return _Held(_log_lines(node), held)


class _Held(StreamingResponse):
    """Server-sent events, and what to leave when they are over, however they end."""

    def __init__(self, events: AsyncIterator[str], held: AsyncExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers=NO_STORE)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            await super().__call__(scope, receive, send)


async def _log_lines(node: WebSocket) -> AsyncIterator[str]:
    """The node's lines as events; a stream that breaks off ends with its error, never as if that were all."""
    receiving: asyncio.Task[str] | None = None
    try:
        while True:
            receiving = receiving or asyncio.create_task(node.receive_text())
            await asyncio.wait([receiving], timeout=KEEP_ALIVE_S)
            if not receiving.done():
                yield ": keep-alive\n\n"
                continue
            line, receiving = receiving.result(), None
            yield f"data: {line}\n\n"
    except WebSocketDisconnect as ended:
        if ended.code != NORMAL:
            yield f"data: {_error_frame(NodeUnreachable('the connection to the node broke'))}\n\n"
    finally:
        if receiving is not None:
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)


@router.websocket("/workspaces/{name}/exec")
async def execute(socket: WebSocket, name: str, caller: Caller) -> None:
    """Run a command: the frames are the node's, passed on unread."""
    await socket.accept()
    try:
        first = await socket.receive()
        if first["type"] == "websocket.disconnect":
            return
        if first.get("text") is None:
            raise InvalidRequest("exec: the first frame is the request, as text")
        row = await socket.app.state.service.store.get(name)
        if row.observed != Observed.running:
            raise WorkspaceNotRunning(f"{name!r} is {row.observed}")
        async with socket.app.state.nodes.stream("exec", {"workspace": row.id}) as node:
            with suppress(*GONE):  # then it has said why, or the connection's end says so
                await node.send_text(first["text"])
            await _join(socket, node)
    except RoostError as error:
        with suppress(*GONE):
            await socket.send_text(_error_frame(error))
    await _close(socket)


async def _join(client: WebSocket, node: WebSocket) -> None:
    """Pass messages both ways until the node is through, or the client gone."""
    begun = asyncio.Event()

    async def inward() -> None:
        node_hears = True
        while (message := await client.receive())["type"] != "websocket.disconnect":
            try:
                if node_hears:
                    await node.send({**message, "type": "websocket.send"})
            except GONE:  # its last words, the exit code among them, may still be on their way to the client
                node_hears = False

    async def outward() -> None:
        while (message := await node.receive())["type"] != "websocket.disconnect":
            await client.send({**message, "type": "websocket.send"})
            begun.set()

    async def alive() -> None:
        """A client that left while the command takes no input is seen only by what we cannot send it."""
        await begun.wait()
        while True:
            await asyncio.sleep(KEEP_ALIVE_S)
            await client.send_text('{"type": "alive"}')

    tasks = [asyncio.create_task(work()) for work in (inward, outward, alive)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _close(socket: WebSocket) -> None:
    with suppress(*GONE, TimeoutError):
        async with asyncio.timeout(CLOSE_S):
            await socket.close()


def _error_frame(error: RoostError) -> str:
    return json.dumps({"type": "error", "problem": error.to_problem()})


@router.websocket("/workspaces/{name}/agent")
async def agent(socket: WebSocket, name: str, caller: Caller) -> None:
    """Lend the caller's ssh-agent to the clones of a workspace, while this is open."""
    row = await socket.app.state.service.store.get(name)
    await socket.accept()
    await socket.app.state.agents.lend(row.id, socket)
