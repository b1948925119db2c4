"""/workspaces: the resource and its verbs."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from roost.db.tables import WorkspaceRow
from roost.errors import InvalidRepository
from roost.oci.references import parse_remote
from roost.repos.urls import allowed_protocols, check_protocol, check_workspace_name, directory_name, parse_url
from roost.server.auth import Caller, Principal
from roost.server.service import WorkspaceService
from roost.settings import Settings
from roost.workspaces import decide
from roost.workspaces.model import (
    Desired,
    Facts,
    LimitSpec,
    RepoSpec,
    WorkspaceId,
    WorkspaceSpec,
    volume_of,
)

router = APIRouter(tags=["workspaces"])


class RepoRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    url: str | None = Field(default=None, max_length=4096)
    upload: str | None = None
    branch: str | None = Field(default=None, max_length=255)
    name: str = Field(max_length=255)


class LimitRequest(BaseModel):
    """Null: the server's default; zero: no limit."""

    model_config = ConfigDict(extra="forbid")
    cpus: float | None = Field(default=None, ge=0)
    memory_bytes: int | None = Field(default=None, ge=0)
    disk_bytes: int | None = Field(default=None, ge=0)
    pids: int | None = Field(default=None, ge=0)


class CreateRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    image: str | None = None
    user: str | None = Field(default=None, max_length=255)
    repo: RepoRequest | None = None
    limits: LimitRequest = LimitRequest()


def _service(request: Request) -> WorkspaceService:
    service: WorkspaceService = request.app.state.service
    return service


@router.post("/workspaces", status_code=201)
async def create(request: Request, body: CreateRequest, caller: Caller) -> dict[str, Any]:
    """Make a workspace and start it."""
    spec = _spec(body, request.app.state.settings, caller)
    return workspace_json(await _service(request).create(spec), request)


@router.get("/workspaces")
async def index(request: Request, caller: Caller, deleted: bool = False) -> dict[str, Any]:
    """All workspaces; with `deleted`, those in the trash too."""
    rows = await _service(request).store.all(deleted=deleted)
    return {"items": [workspace_json(row, request) for row in rows], "next": None}


@router.get("/workspaces/{name}")
async def show(request: Request, name: str, caller: Caller) -> dict[str, Any]:
    return workspace_json(await _service(request).store.latest(name), request)


@router.delete("/workspaces/{name}", status_code=202)
async def delete(request: Request, name: str, caller: Caller) -> dict[str, Any]:
    """Put it in the trash: the container goes, HOME is kept for the trash period."""
    return workspace_json(await _service(request).request(name, Desired.deleted), request)


@router.post("/workspaces/{name}/start", status_code=202)
async def start(request: Request, name: str, caller: Caller) -> dict[str, Any]:
    return workspace_json(await _service(request).request(name, Desired.running), request)


@router.post("/workspaces/{name}/stop", status_code=202)
async def stop(request: Request, name: str, caller: Caller) -> dict[str, Any]:
    return workspace_json(await _service(request).request(name, Desired.stopped), request)


@router.post("/workspaces/{name}/restart", status_code=202)
async def restart(request: Request, name: str, caller: Caller) -> dict[str, Any]:
    return workspace_json(await _service(request).request(name, Desired.running, anew=True), request)


@router.post("/workspaces/{name}/undelete", status_code=202)
async def undelete(request: Request, name: str, caller: Caller) -> dict[str, Any]:
    """Take it out of the trash, stopped."""
    return workspace_json(await _service(request).undelete(name), request)


@router.get("/workspaces/{name}/settled")
async def settled(
    request: Request,
    name: str,
    caller: Caller,
    generation: int = 0,
    timeout_s: Annotated[float, Query(gt=0, le=3600)] = 60.0,
) -> dict[str, Any]:
    """Wait until what is wanted has come about, or failed."""
    return workspace_json(await _service(request).settled(name, generation, timeout_s), request)


def _spec(body: CreateRequest, settings: Settings, caller: Principal) -> WorkspaceSpec:
    check_workspace_name(body.name)
    wanted = settings.workspaces
    image = body.image or wanted.default_image or f"127.0.0.1:{settings.registry.port}/default:latest"
    image = str(parse_remote(image))
    repo = None if body.repo is None else _repo(body.repo, settings)
    limits = body.limits
    return WorkspaceSpec(
        name=body.name,
        owner=caller.name,
        image=image,
        user=body.user,
        repo=repo,
        trusted=True,
        limits=LimitSpec(
            cpus=wanted.cpus if limits.cpus is None else limits.cpus,
            memory_bytes=wanted.memory_bytes if limits.memory_bytes is None else limits.memory_bytes,
            disk_bytes=wanted.disk_bytes if limits.disk_bytes is None else limits.disk_bytes,
            pids=wanted.pids if limits.pids is None else limits.pids,
        ),
    )


def _repo(body: RepoRequest, settings: Settings) -> RepoSpec:
    if body.upload is None and body.url is None:
        raise InvalidRepository("a repository needs a url or an upload")
    directory = directory_name(body.name)
    if body.url is None:
        return RepoSpec(upload=body.upload, branch=body.branch, name=directory)
    url = parse_url(body.url)
    if body.upload is None:
        check_protocol(url, allowed_protocols(settings.repos.allow_protocols))
        if url.credential is not None:
            raise InvalidRepository(
                "credentials in a URL are not taken: they would have to be stored",
                next_step="Use an ssh URL with an agent, or clone it yourself and open the local path.",
            )
    return RepoSpec(url=url.url, upload=body.upload, branch=body.branch, name=directory)


def workspace_json(row: WorkspaceRow, request: Request) -> dict[str, Any]:
    """A workspace as the API shows it."""
    spec, facts = WorkspaceSpec.model_validate(row.spec), Facts.model_validate(row.facts)
    trash = timedelta(days=request.app.state.settings.workspaces.trash_days)
    home = facts.user.home if facts.user else None
    return {
        "id": row.id,
        "name": row.name,
        "tenant": row.tenant,
        "owner": row.owner,
        "image": spec.image,
        "image_digest": facts.image_digest,
        "runtime": "cri",
        "layout": spec.layout,
        "desired": row.desired,
        "observed": row.observed,
        "reason": row.reason,
        "error": row.error,
        "settled": decide.settled(row),
        "generation": row.generation,
        "start": row.start,
        "user": facts.user.name if facts.user else spec.user,
        "home": home,
        "workdir": home,
        "repo": None
        if spec.repo is None
        else {
            "url": spec.repo.url,
            "branch": spec.repo.branch,
            "name": spec.repo.name,
            "path": facts.repo_path,
            "commit": facts.repo_commit,
        },
        "limits": spec.limits.model_dump(),
        "usage": _usage(row, request),
        "created_at": _time(row.created_at),
        "updated_at": _time(row.updated_at),
        "started_at": _time(row.started_at),
        "trash_until": _time(row.deleted_at + trash) if row.deleted_at else None,
        "retry_at": _time(row.retry_at),
        "last_start": row.last_start,
    }


def _usage(row: WorkspaceRow, request: Request) -> dict[str, Any] | None:
    """What the node last said (at most seconds ago) that HOME takes; null while it has said nothing."""
    volume = volume_of(WorkspaceId(row.id))
    for node in request.app.state.nodes.all():
        used = node.status.get("homes", {}).get(volume)
        if used is not None:
            return {"home_bytes": used}
    return None


def _time(value: datetime | None) -> str | None:
    return None if value is None else value.isoformat()
