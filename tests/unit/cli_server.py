"""A small server that speaks roost's API, for tests of client and command line: uvicorn on a unix socket and on TCP.

Workspaces live in a dictionary and settle after a moment; `exec` runs real programs of this host, in a directory that
stands for HOME, with pipes or a pseudo-terminal.  What a test wants to go wrong it sets in `Fake`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import shutil
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, WebSocket, WebSocketDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse

from roost.errors import (
    ExecNotFound,
    RoostError,
    Superseded,
    Unauthenticated,
    WaitTimeout,
    WorkspaceExists,
    WorkspaceNotFound,
    WorkspaceNotRunning,
)

API = "/api/v1"
NOW = "2026-01-02T03:04:05+00:00"
AIMS = {"running": "running", "stopped": "stopped", "deleted": "deleted"}


@dataclass
class Fake:
    """The state of the server; tests read and change it."""

    home: Path
    workspaces: dict[str, dict[str, Any]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)
    execs: list[dict[str, Any]] = field(default_factory=list)
    signals: list[int] = field(default_factory=list)
    token: str | None = None
    node_connected: bool = True
    fail_start: RoostError | None = None
    """Error the next starts end in."""
    settle_s: float = 0.05
    never_settles: bool = False
    ask_agent: bytes | None = None
    agent_answer: bytes | None = None

    def add(self, name: str, **more: Any) -> dict[str, Any]:
        document = {
            **{"id": f"w{len(self.workspaces)}", "name": name, "tenant": "default", "owner": "root"},
            **{"image": "127.0.0.1:7767/default:latest", "runtime": "fake", "layout": "home"},
            **{"desired": "running", "observed": "running", "reason": "", "error": None, "settled": True},
            **{"generation": 1, "start": 1, "user": "vscode", "home": "/home/vscode", "workdir": "/home/vscode"},
            **{"repo": None, "limits": {"cpus": 0, "memory_bytes": 0, "disk_bytes": 0, "pids": 4096}, "usage": None},
            **{"created_at": NOW, "updated_at": NOW, "started_at": NOW, "trash_until": None, "last_start": None},
            **more,
        }
        self.workspaces[name] = document
        return document

    def event(self, name: str, **more: Any) -> None:
        empty = dict.fromkeys(("from", "to", "step", "status", "ms", "detail", "error"))
        found = self.workspaces[name]
        self.events.append(
            {"id": len(self.events) + 1, "workspace": found["id"], "name": name, "at": NOW}
            | {"kind": "state", "start": found["start"], **empty, **more}
        )

    def want(self, name: str, desired: str, new_start: bool) -> dict[str, Any]:
        found = self.workspaces.get(name)
        if found is None:
            raise WorkspaceNotFound(f"there is no workspace {name!r}")
        found |= {"desired": desired, "generation": found["generation"] + 1, "settled": False}
        if new_start:
            found["start"] += 1
            found["observed"] = "starting"
        asyncio.get_running_loop().call_later(self.settle_s, self._arrive, name, found["generation"])
        return found

    def _arrive(self, name: str, generation: int) -> None:
        found = self.workspaces[name]
        if self.never_settles or found["generation"] != generation:
            return
        before = found["observed"]
        target = AIMS[found["desired"]]
        if target == "running" and before != "running":
            steps = [
                {"step": s, "ms": ms, "status": "done", "detail": ""} for s, ms in (("image", 1234.5), ("home", 3.25))
            ]
            for step in steps:
                self.event(name, kind="step", **{**step, "status": "running", "ms": 0.0})
                self.event(name, kind="step", **step)
            if self.fail_start is not None:
                found |= {"observed": "error", "error": self.fail_start.to_problem(), "settled": True}
                self.event(name, **{"from": before, "to": "error"})
                return
            found["last_start"] = {"start": found["start"], "total_ms": 1300.0, "steps": steps}
        found |= {"observed": target, "settled": True, "error": None}
        found["trash_until"] = NOW if target == "deleted" else None
        self.event(name, **{"from": before, "to": target})


def build(fake: Fake) -> FastAPI:
    app = FastAPI()

    @app.exception_handler(RoostError)
    async def problem(scope: Request | WebSocket, error: RoostError) -> Response:
        answer = JSONResponse(error.to_problem(), error.status, media_type="application/problem+json")
        if isinstance(scope, WebSocket):
            await scope.send_denial_response(answer)
        return answer

    def check(connection: Request | WebSocket) -> None:
        if fake.token is not None and connection.headers.get("authorization") != f"Bearer {fake.token}":
            raise Unauthenticated("the token is not valid")

    def find(name: str) -> dict[str, Any]:
        if name not in fake.workspaces:
            raise WorkspaceNotFound(f"there is no workspace {name!r}")
        return fake.workspaces[name]

    @app.get(f"{API}/health")
    async def health() -> Any:
        return {"status": "ok", "version": "9.9.9", "node": {"connected": fake.node_connected}}

    @app.get(f"{API}/images")
    async def images(request: Request) -> Any:
        check(request)
        return {"items": [{"ref": "127.0.0.1:7767/default:latest", "digest": "sha256:" + "a" * 64, "size_bytes": 5}]}

    @app.post(f"{API}/images/pull")
    async def pull(request: Request) -> Any:
        return {"ref": (await request.json())["ref"], "digest": "sha256:" + "a" * 64, "size_bytes": 5}

    @app.get(f"{API}/workspaces")
    async def index(request: Request, deleted: bool = False) -> Any:
        check(request)
        items = [w for w in fake.workspaces.values() if deleted or w["observed"] != "deleted"]
        return {"items": items, "next": None}

    @app.post(f"{API}/workspaces", status_code=201)
    async def create(request: Request) -> Any:
        check(request)
        body = await request.json()
        if body["name"] in fake.workspaces and fake.workspaces[body["name"]]["observed"] != "deleted":
            raise WorkspaceExists(f"there is a workspace {body['name']!r}")
        repo = body["repo"] and {**body["repo"], "path": f"/home/vscode/{body['repo']['name']}"}
        extra = {"image": body["image"] or "default", "repo": repo, "observed": "pending", "start": 0, "generation": 0}
        fake.add(body["name"], asked=body, **extra)
        return fake.want(body["name"], "running", True)

    @app.get(f"{API}/workspaces/{{name}}")
    async def show(request: Request, name: str) -> Any:
        check(request)
        return find(name)

    @app.delete(f"{API}/workspaces/{{name}}", status_code=202)
    async def delete(request: Request, name: str) -> Any:
        check(request)
        return fake.want(name, "deleted", False)

    @app.post(f"{API}/workspaces/{{name}}/{{verb}}", status_code=202)
    async def change(request: Request, name: str, verb: str) -> Any:
        check(request)
        find(name)
        if verb == "start" and fake.workspaces[name]["observed"] == "running":
            return fake.want(name, "running", False)
        return fake.want(name, "running" if verb in ("start", "restart") else "stopped", verb in ("start", "restart"))

    @app.get(f"{API}/workspaces/{{name}}/settled")
    async def settled(request: Request, name: str, generation: int, timeout_s: float) -> Any:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            found = find(name)
            if found["generation"] > generation:
                raise Superseded(f"another request changed {name!r}")
            if found["settled"]:
                return found
            await asyncio.sleep(0.01)
        raise WaitTimeout("not yet")

    def stream(name: str | None, after: int, follow: bool) -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            seen = after
            while True:
                for event in fake.events[seen:]:
                    seen = event["id"]
                    if name is None or event["name"] == name:
                        yield f"id: {event['id']}\ndata: {json.dumps(event)}\n\n"
                if not follow:
                    return
                yield ": keep-alive\n\n"
                await asyncio.sleep(0.01)

        return StreamingResponse(lines(), media_type="text/event-stream")

    @app.get(f"{API}/events")
    async def all_events(request: Request, follow: bool = False, after: int = 0) -> Any:
        check(request)
        return stream(None, after, follow)

    @app.get(f"{API}/workspaces/{{name}}/events")
    async def events(request: Request, name: str, follow: bool = False, after: int = 0) -> Any:
        find(name)
        return stream(name, after, follow)

    @app.get(f"{API}/workspaces/{{name}}/logs")
    async def logs(name: str, follow: bool = False, previous: bool = False) -> Any:
        find(name)
        start = "earlier" if previous else "newest"
        lines = [
            {"at": NOW, "channel": "start", "text": f"the {start} start"},
            {"at": NOW, "channel": "stdout", "text": "out"},
            {"at": NOW, "channel": "stderr", "text": "err"},
        ]
        body = "".join(f"data: {json.dumps(line)}\n\n" for line in lines)
        return Response(body, media_type="text/event-stream")

    @app.post(f"{API}/uploads", status_code=201)
    async def upload(request: Request) -> Any:
        check(request)
        ident = f"u{len(fake.uploads)}"
        fake.uploads[ident] = await request.body()
        return {"upload": ident, "size_bytes": len(fake.uploads[ident])}

    @app.websocket(f"{API}/workspaces/{{name}}/exec")
    async def execute(websocket: WebSocket, name: str) -> None:
        check(websocket)
        await websocket.accept()
        request = json.loads(await websocket.receive_text())
        try:
            found = find(name)
            if found["observed"] != "running":
                raise WorkspaceNotRunning(f"{name!r} is {found['observed']}")
            fake.execs.append(request)
            await _serve_exec(fake, websocket, request)
        except RoostError as error:
            await websocket.send_text(json.dumps({"type": "error", "problem": error.to_problem()}))
            await websocket.close()
        except WebSocketDisconnect:
            return

    @app.websocket(f"{API}/workspaces/{{name}}/agent")
    async def agent(websocket: WebSocket, name: str) -> None:
        await websocket.accept()
        if fake.ask_agent is not None:
            await websocket.send_bytes(struct.pack(">I", 7) + fake.ask_agent)
        with contextlib.suppress(WebSocketDisconnect):
            while True:
                answer = await websocket.receive_bytes()
                assert struct.unpack(">I", answer[:4]) == (7,)
                fake.agent_answer = answer[4:]

    return app


# --- exec ---------------------------------------------------------------------------------------------------------


async def _serve_exec(fake: Fake, websocket: WebSocket, request: dict[str, Any]) -> None:
    argv = request["argv"] or ["/bin/sh"]
    if argv[0] == "/opt/roost/bin/busybox":
        argv = [shutil.which("busybox") or "busybox", *argv[1:]]
    env = {"PATH": os.environ["PATH"], "HOME": str(fake.home), **request["env"]}
    cwd = str(fake.home / request["cwd"]) if request["cwd"] else str(fake.home)
    master = slave = None
    if request["tty"]:
        master, slave = pty.openpty()
        _resize(master, request["tty"])
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            env=env,
            cwd=cwd,
            stdin=slave if slave is not None else subprocess.PIPE,
            stdout=slave if slave is not None else subprocess.PIPE,
            stderr=slave if slave is not None else subprocess.PIPE,
            preexec_fn=_own_terminal if slave is not None else None,
            limit=1 << 20,
        )
    except FileNotFoundError as error:
        raise ExecNotFound(f"{argv[0]} is not there") from error
    finally:
        if slave is not None:
            os.close(slave)
    loop = asyncio.get_running_loop()
    # A test's way to break the connection under a command.
    request["close"] = lambda: loop.call_soon_threadsafe(lambda: loop.create_task(websocket.close(1011)))
    await websocket.send_text('{"type":"started"}')
    reading = asyncio.create_task(_input(fake, websocket, process, master))
    try:
        if master is not None:
            await _terminal_output(websocket, master)
        else:
            assert process.stdout is not None and process.stderr is not None
            await asyncio.gather(_output(websocket, process.stdout, 1), _output(websocket, process.stderr, 2))
        code = await process.wait()
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        if process.returncode is None:
            process.kill()
        process._transport.close()  # type: ignore[attr-defined]  # nothing public closes the pipes of one left early
        await process.wait()
        if master is not None:
            os.close(master)
        request["ended"] = True
    await websocket.send_text(json.dumps({"type": "exit", "code": code if code >= 0 else 128 - code}))
    await websocket.close()


def _own_terminal() -> None:
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _resize(master: int, size: dict[str, int]) -> None:
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("4H", size["rows"], size["columns"], 0, 0))


async def _output(websocket: WebSocket, stream: asyncio.StreamReader, channel: int) -> None:
    while data := await stream.read(256 << 10):
        await websocket.send_bytes(bytes([channel]) + data)


async def _terminal_output(websocket: WebSocket, master: int) -> None:
    while True:
        try:
            data = await asyncio.to_thread(os.read, master, 65536)
        except OSError:  # EIO: the last holder of the other end is gone
            return
        await websocket.send_bytes(b"\x01" + data)


async def _input(fake: Fake, websocket: WebSocket, process: asyncio.subprocess.Process, master: int | None) -> None:
    try:
        while True:
            message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                process.kill()
                return
            if (data := message.get("bytes")) is not None:
                if master is not None:
                    os.write(master, data)
                elif process.stdin is not None:
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        process.stdin.write(data)
                        await process.stdin.drain()
                continue
            document = json.loads(message["text"])
            if document["type"] == "eof" and process.stdin is not None:
                process.stdin.close()
            elif document["type"] == "resize" and master is not None:
                _resize(master, document)
            elif document["type"] == "signal":
                fake.signals.append(document["number"])
                process.send_signal(document["number"])
    except RuntimeError:
        return


# --- running it ---------------------------------------------------------------------------------------------------


class Served:
    """A running fake, and the command line pointed at it."""

    def __init__(self, fake: Fake, root: Path, port: int) -> None:
        self.fake = fake
        self.root = root
        self.port = port
        self.socket = root / "server" / "api.sock"

    def env(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ROOST_", "SSH_AUTH"))}
        own = {"ROOST_RUN_DIR": str(self.root), "ROOST_STATE_DIR": str(self.root / "state")}
        source = os.pathsep.join(
            [str(Path(__file__).parents[2] / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        return {**kept, **own, "PYTHONPATH": source, "ROOST_SERVER__PORT": str(self.port), "COLUMNS": "200", **more}

    def run(
        self, *args: str, stdin: bytes = b"", timeout: float = 30.0, cwd: Path | None = None, **env: str
    ) -> subprocess.CompletedProcess[bytes]:
        argv = [sys.executable, "-P", "-m", "roost.cli.main", *args]
        return subprocess.run(argv, env=self.env(**env), input=stdin, capture_output=True, timeout=timeout, cwd=cwd)

    def popen(self, *args: str, **more: Any) -> subprocess.Popen[bytes]:
        more.setdefault("env", self.env())
        return subprocess.Popen([sys.executable, "-P", "-m", "roost.cli.main", *args], **more)


@contextmanager
def serve(root: Path) -> Iterator[Served]:
    """Serve a fake below `root` (short: it holds a unix socket) until the block ends."""
    (root / "server").mkdir(parents=True)
    home = root / "home"
    home.mkdir()
    fake = Fake(home)
    unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    unix.bind(str(root / "server" / "api.sock"))
    tcp = socket.socket()
    tcp.bind(("127.0.0.1", 0))
    for listener in (unix, tcp):
        listener.listen(64)
    config = uvicorn.Config(
        build(fake), log_level="error", ws="websockets-sansio", ws_per_message_deflate=False, ws_max_size=4 << 20
    )
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    server.config.timeout_graceful_shutdown = 1
    thread = threading.Thread(target=lambda: server.run(sockets=[unix, tcp]), daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started:
        assert time.monotonic() < deadline, "the fake server did not start"
        time.sleep(0.01)
    try:
        yield Served(fake, root, tcp.getsockname()[1])
    finally:
        deadline = time.monotonic() + 10
        while not all("ended" in request for request in fake.execs if "close" in request):
            assert time.monotonic() < deadline, "a command outlives its connection"
            time.sleep(0.01)
        server.should_exit = True
        thread.join(10)
        unix.close()
        tcp.close()
        assert not thread.is_alive(), "the fake server did not stop"
