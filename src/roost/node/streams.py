"""What the server streams through the node: commands in workspaces, and logs.

Frames of an exec stream: text is JSON, binary is bytes.  First the request, then our `started` or `error`; binary to us
is stdin, binary from us begins with 1 (stdout) or 2 (stderr); `eof`, `resize`, `signal` come as text; `exit` ends it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

import structlog
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from roost.errors import ContainerNotFound, InternalError, InvalidRequest, RoostError, WorkspaceNotRunning
from roost.runtimes.protocol import (
    TOOLS_DIR,
    Channel,
    ContainerUser,
    ExecSession,
    ExecSpec,
    ImageRef,
    Runtime,
    TerminalSize,
)
from roost.workspaces.converge import Converger
from roost.workspaces.model import Assignment
from roost.workspaces.start import environment, resolve_user
from roost.workspaces.startlog import StartLogs

log = structlog.get_logger()

PREFIX = {Channel.stdout: b"\x01", Channel.stderr: b"\x02"}
FOLLOW_S = 0.2


class Size(BaseModel):
    columns: int = Field(ge=1, le=10_000)
    rows: int = Field(ge=1, le=10_000)


class Eof(BaseModel):
    type: Literal["eof"]


class Resize(Size):
    type: Literal["resize"]


class Signal(BaseModel):
    type: Literal["signal"]
    number: int = Field(ge=1, le=64)


_ORDER: TypeAdapter[Eof | Resize | Signal] = TypeAdapter(Annotated[Eof | Resize | Signal, Field(discriminator="type")])


class ExecRequest(BaseModel):
    argv: list[str] = []
    user: str | None = None
    cwd: str | None = None
    env: dict[str, str] = {}
    tty: Size | None = None
    stdin: bool = False


class Streams:
    """Serves the streams of one node."""

    def __init__(self, runtime: Runtime, converger: Converger, logs: StartLogs) -> None:
        self._runtime = runtime
        self._converger = converger
        self._logs = logs

    async def serve(self, kind: str, params: dict[str, Any], socket: ClientConnection) -> None:
        """Run one stream to its end."""
        try:
            match kind:
                case "exec":
                    await self._exec(str(params["workspace"]), socket)
                case "logs":
                    async for line in self._log_lines(**params):
                        await socket.send(line)
                case _:
                    raise InvalidRequest(f"unknown stream {kind!r}")
        except ConnectionClosed:
            return
        except Exception as defect:
            error = defect if isinstance(defect, RoostError) else InternalError(f"{type(defect).__name__}: {defect}")
            if error is not defect:
                log.exception("stream failed", kind=kind)
            await socket.send(json.dumps({"type": "error", "problem": error.to_problem()}))

    # exec

    async def _exec(self, workspace: str, socket: ClientConnection) -> None:
        a = self._converger.assignment(workspace)
        if a is None or a.facts.user is None:
            raise WorkspaceNotRunning("the workspace has not been started on this node")
        try:
            request = ExecRequest.model_validate_json(await socket.recv())
        except ValidationError as error:
            raise InvalidRequest(f"exec: {error.errors()[0]['msg']}") from error
        session = await self._runtime.exec(a.container, await self._spec(a, request))
        try:
            await socket.send(json.dumps({"type": "started"}))
            await self._carry(session, socket)
        finally:
            await session.close()

    async def _spec(self, a: Assignment, request: ExecRequest) -> ExecSpec:
        assert a.facts.user is not None
        user, env = a.facts.user.container_user(), environment(a, a.facts.user)
        if request.user is not None and request.user not in (user.name, str(user.uid)):
            user = await self._other_user(a, request.user)
            env |= {"HOME": user.home, "USER": user.name, "LOGNAME": user.name}
            if user.shell:
                env["SHELL"] = user.shell
        tty = TerminalSize(request.tty.columns, request.tty.rows) if request.tty else None
        argv = tuple(request.argv) or (env.get("SHELL") or f"{TOOLS_DIR}/bin/busybox", "-l")
        if argv[0] == f"{TOOLS_DIR}/bin/busybox" and not request.argv:
            argv = (argv[0], "sh", "-l")
        cwd = user.home if request.cwd is None else str(PurePosixPath(user.home) / request.cwd)
        return ExecSpec(argv, user, cwd, {**env, **request.env}, tty, request.stdin)

    async def _other_user(self, a: Assignment, name: str) -> ContainerUser:
        if name in ("root", "0"):
            return ContainerUser(0, 0, "root", "/root")
        image = await self._runtime.image(ImageRef(a.spec.image))
        if image is None:
            raise InvalidRequest(f"user {name!r} cannot be looked up: the image is gone from the node")
        return (await resolve_user(self._runtime, image, name)).container_user()

    async def _carry(self, session: ExecSession, socket: ClientConnection) -> None:
        """Carry bytes both ways until the command is over; a caller who leaves ends the command."""
        inward = asyncio.create_task(self._inward(session, socket), name="exec stdin")
        outward = asyncio.create_task(self._outward(session, socket), name="exec output")
        try:
            await asyncio.wait([inward, outward], return_when=asyncio.FIRST_COMPLETED)
            if outward.done():
                outward.result()
                await socket.send(json.dumps({"type": "exit", "code": await session.wait()}))
            else:
                inward.result()
        finally:
            for task in (inward, outward):
                task.cancel()
            await asyncio.gather(inward, outward, return_exceptions=True)

    async def _inward(self, session: ExecSession, socket: ClientConnection) -> None:
        """Returns when the caller is gone. Raises InvalidRequest."""
        async for message in socket:
            if isinstance(message, bytes):
                await session.write(message)
                continue
            try:
                order = _ORDER.validate_json(message)
            except ValidationError as error:
                raise InvalidRequest(f"exec: {message[:80]!r} is not a frame: {error.errors()[0]['msg']}") from error
            match order:
                case Eof():
                    await session.close_stdin()
                case Resize():
                    await session.resize(TerminalSize(order.columns, order.rows))
                case Signal():
                    await session.signal(order.number)

    async def _outward(self, session: ExecSession, socket: ClientConnection) -> None:
        async for channel, data in session.output():
            await socket.send(PREFIX[channel] + data)

    # logs

    async def _log_lines(self, workspace: str, *, follow: bool = False, previous: bool = False) -> AsyncIterator[str]:
        a = self._converger.assignment(workspace)
        path, offset = None, 0
        while True:
            busy = follow and not previous and self._converger.busy(workspace)
            newest = await asyncio.to_thread(self._logs.path, workspace, previous=previous)
            if newest != path:
                path, offset = newest, 0
            if path is not None:
                entries, offset = await asyncio.to_thread(self._logs.read, path, offset)
                for entry in entries:
                    yield json.dumps({**entry, "at": _time(entry["at"])})
            if not busy:
                break
            await asyncio.sleep(FOLLOW_S)
        if a is None:
            return
        try:
            async for item in self._runtime.logs(a.container, follow=follow, previous=previous):
                yield json.dumps({"at": _time(item.at), "channel": item.channel.value, "text": item.text})
        except ContainerNotFound:
            return


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, tz=UTC).isoformat()
