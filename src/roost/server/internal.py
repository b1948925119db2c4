"""What nodes ask of the server, over the unix socket: the control connection, streams, uploads, agents."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request, WebSocket
from starlette.responses import FileResponse, Response

from roost.server.auth import node_only

router = APIRouter(dependencies=[Depends(node_only)])


@router.websocket("/node")
async def node(socket: WebSocket) -> None:
    """A node's control connection."""
    await socket.accept()
    service = socket.app.state.service
    await socket.app.state.nodes.serve(socket, service.on_node, service.on_report)


@router.websocket("/streams/{ident}")
async def stream(socket: WebSocket, ident: str) -> None:
    """A stream the node was told to dial."""
    if not await socket.app.state.nodes.dialled(ident, socket):
        await socket.close()


@router.get("/uploads/{ident}")
async def upload(request: Request, ident: str) -> Response:
    """An uploaded bundle."""
    return FileResponse(request.app.state.uploads.path(ident), media_type="application/octet-stream")


@router.get("/agents/{workspace}")
async def agent_lent(request: Request, workspace: str) -> dict[str, bool]:
    """Whether somebody lends an ssh-agent to that workspace now."""
    return {"lent": request.app.state.agents.lent(workspace)}


@router.post("/agents/{workspace}")
async def ask_agent(request: Request, workspace: str) -> Response:
    """One request to the lent ssh-agent."""
    reply = await request.app.state.agents.ask(workspace, await request.body())
    return Response(reply, media_type="application/octet-stream")
