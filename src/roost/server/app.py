"""The server's ASGI application: routes, errors, start and end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.websockets import WebSocket

from roost import __version__
from roost.db.engine import Database, sqlite_url
from roost.errors import InternalError, InvalidRequest, NothingThere, RoostError
from roost.server import internal, misc, streams, workspaces
from roost.server.agents import Agents
from roost.server.auth import Gatekeeper, admin_token
from roost.server.bus import Bus
from roost.server.nodes import Nodes
from roost.server.service import WorkspaceService
from roost.server.uploads import Uploads
from roost.settings import Settings
from roost.workspaces.store import WorkspaceStore

log = structlog.get_logger()
API = "/api/v1"


def create_app(settings: Settings) -> FastAPI:
    """Build the application; nothing is opened before it starts."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        database = Database(settings.database.url or sqlite_url(settings.server_state / "roost.db"))
        await database.migrate()
        app.state.settings = settings
        app.state.gatekeeper = Gatekeeper(
            admin_token(settings.admin_token_file), frozenset(name.lower() for name in settings.server.allowed_hosts)
        )
        app.state.nodes, app.state.bus, app.state.agents = Nodes(), Bus(), Agents()
        app.state.uploads = Uploads(settings.server_state / "uploads")
        app.state.service = WorkspaceService(
            WorkspaceStore(database),
            app.state.nodes,
            app.state.bus,
            app.state.uploads,
            timedelta(days=settings.workspaces.trash_days),
        )
        timers = asyncio.create_task(app.state.service.run(), name="workspace timers")
        timers.add_done_callback(_ended)
        yield
        timers.cancel()
        await asyncio.gather(timers, return_exceptions=True)
        await database.close()

    app = FastAPI(
        title="roost",
        version=__version__,
        lifespan=lifespan,
        openapi_url=f"{API}/openapi.json",
        docs_url=None,
        redoc_url=None,
    )
    for router in (workspaces.router, streams.router, misc.router):
        app.include_router(router, prefix=API)
    app.include_router(internal.router, prefix="/internal/v1", include_in_schema=False)
    app.add_exception_handler(RoostError, _roost_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _defect)
    return app


def _ended(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("workspace timers ended", exc_info=task.exception())


def problem(error: RoostError) -> JSONResponse:
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
    return JSONResponse(error.to_problem(), error.status, headers, media_type="application/problem+json")


async def _roost_error(scope: Request | WebSocket, error: Exception) -> Response:
    assert isinstance(error, RoostError)
    answer = problem(error)
    if isinstance(scope, WebSocket):
        await scope.send_denial_response(answer)
    return answer


async def _invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = dict(error.errors()[0])
    where = ".".join(str(part) for part in first.get("loc", ()))
    return problem(InvalidRequest(f"{where}: {first.get('msg', 'not valid')}"))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return problem(NothingThere(f"there is nothing at {request.url.path}"))
    return problem(InvalidRequest(str(error.detail)) if error.status_code < 500 else InternalError(str(error.detail)))


async def _defect(request: Request, error: Exception) -> Response:
    log.error("request failed", path=request.url.path, exc_info=error)
    return problem(InternalError(f"{type(error).__name__} while serving {request.url.path}"))
