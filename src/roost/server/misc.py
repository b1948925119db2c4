"""The small resources: health, nodes, images, uploads."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel

from roost import __version__
from roost.oci.references import parse_remote
from roost.server.auth import Caller

router = APIRouter()

PULL_TIMEOUT_S = 3600.0


@router.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """Whether the server serves and a node is connected; needs no credentials, tells nothing else."""
    nodes = request.app.state.nodes.all()
    return {"status": "ok", "version": __version__, "node": {"connected": bool(nodes)}}


@router.get("/nodes")
async def nodes(request: Request, caller: Caller) -> dict[str, Any]:
    """The nodes that are connected, with what they last said of themselves."""
    return {
        "items": [
            {
                "name": node.name,
                "connected": True,
                "version": node.hello.get("version"),
                "runtime": node.hello.get("runtime"),
                **node.status,
            }
            for node in request.app.state.nodes.all()
        ],
        "next": None,
    }


@router.get("/images")
async def images(request: Request, caller: Caller) -> dict[str, Any]:
    """The images on the node."""
    return {"items": await (await request.app.state.nodes.present()).call("images", {}), "next": None}


class PullRequest(BaseModel):
    ref: str


@router.post("/images/pull")
async def pull(request: Request, body: PullRequest, caller: Caller) -> dict[str, Any]:
    """Fetch an image to the node; returns when it is there."""
    ref = str(parse_remote(body.ref))
    node = await request.app.state.nodes.present()
    answer: dict[str, Any] = await node.call("pull", {"ref": ref}, PULL_TIMEOUT_S)
    return answer


@router.post("/uploads", status_code=201)
async def upload(request: Request, caller: Caller) -> dict[str, Any]:
    """Send a git bundle, to be named by the workspace made next."""
    stored = await request.app.state.uploads.receive(request.stream())
    return {"upload": stored.ident, "size_bytes": stored.size_bytes}
