"""What flows: events and logs as server-sent events, exec and the ssh-agent over websockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, WebSocket, WebSocketDisconnect
from starlette.responses import StreamingResponse

from roost.errors import RoostError, WorkspaceNotRunning
from roost.server.auth import Caller
from roost.server.service import WorkspaceService
from roost.workspaces.model import Observed
from roost.workspaces.store import event_json

router = APIRouter(tags=["streams"])
KEEP_ALIVE_S = 15.0


def _sse(events: AsyncIterator[str]) -> StreamingResponse:
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def _frame(event: dict[str, Any]) -> str:
    ident = f"id: {event['id']}\n" if event.get("id") is not None else ""
    return f"{ident}data: {json.dumps(event)}\n\n"


async def _events(service: WorkspaceService, workspace: str | None, after: int, follow: bool) -> AsyncIterator[str]:
    with service.bus.subscribe() as news:
        while page := await service.store.events(workspace, after):
            for row, name in page:
                after = row.id
                yield _frame(event_json(row, name))
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
    opening = request.app.state.nodes.stream("logs", {"workspace": row.id, "follow": follow, "previous": previous})
    socket = await opening.__aenter__()

    async def lines() -> AsyncIterator[str]:
        try:
            while True:
                yield f"data: {await socket.receive_text()}\n\n"
        except (WebSocketDisconnect, KeyError):
            return
        finally:
            await opening.__aexit__(None, None, None)

    return _sse(lines())


@router.websocket("/workspaces/{name}/exec")
async def execute(socket: WebSocket, name: str, caller: Caller) -> None:
    """Run a command: the frames are the node's, passed on unread."""
    await socket.accept()
    try:
        first = await socket.receive_text()
        row = await socket.app.state.service.store.get(name)
        if row.observed != Observed.running:
            raise WorkspaceNotRunning(f"{name!r} is {row.observed}")
        async with socket.app.state.nodes.stream("exec", {"workspace": row.id}) as node:
            await node.send_text(first)
            await _join(socket, node)
    except RoostError as error:
        await socket.send_text(json.dumps({"type": "error", "problem": error.to_problem()}))
        await socket.close()
    except (WebSocketDisconnect, KeyError):
        return


async def _join(client: WebSocket, node: WebSocket) -> None:
    """Pass messages both ways until either side closes; then close the other."""

    async def pass_on(source: WebSocket, target: WebSocket) -> None:
        while True:
            message = await source.receive()
            if message["type"] == "websocket.disconnect":
                return
            await target.send({**message, "type": "websocket.send"})

    tasks = [asyncio.create_task(pass_on(client, node)), asyncio.create_task(pass_on(node, client))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for side in (client, node):
        try:
            await side.close()
        except RuntimeError:  # it closed first
            continue


@router.websocket("/workspaces/{name}/agent")
async def agent(socket: WebSocket, name: str, caller: Caller) -> None:
    """Lend the caller's ssh-agent to the clones of a workspace, while this is open."""
    row = await socket.app.state.service.store.get(name)
    await socket.accept()
    await socket.app.state.agents.lend(row.id, socket)
