"""The server on real sockets, with a node that a test plays: who may come in, what is told, what comes back."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from websockets.asyncio.client import ClientConnection, connect, unix_connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from roost.server.app import create_app
from roost.server.main import Server
from roost.server.peercred import HttpProtocol, WebSocketProtocol
from roost.settings import ServerSettings, Settings


@dataclass
class Served:
    """A running server and ways to speak to it."""

    settings: Settings
    port: int
    token: str

    def local(self, **more: Any) -> httpx.AsyncClient:
        """As root over the unix socket."""
        transport = httpx.AsyncHTTPTransport(uds=str(self.settings.api_socket))
        return httpx.AsyncClient(transport=transport, base_url="http://localhost/api/v1", timeout=20, **more)

    def remote(self, **headers: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{self.port}/api/v1", headers=headers, timeout=20, trust_env=False
        )


@asynccontextmanager
async def serving(root: Path) -> AsyncIterator[Served]:
    settings = Settings(state_dir=root / "s", run_dir=root / "r", server=ServerSettings(user="root"))
    for folder in (settings.server_state, settings.server_run):
        folder.mkdir(parents=True, exist_ok=True)
    tcp, unix = socket.socket(), socket.socket(socket.AF_UNIX)
    tcp.bind(("127.0.0.1", 0))
    settings.api_socket.unlink(missing_ok=True)
    unix.bind(str(settings.api_socket))
    for listener in (tcp, unix):
        listener.listen(128)
    config = uvicorn.Config(
        create_app(settings), http=HttpProtocol, ws=WebSocketProtocol, proxy_headers=False, log_config=None,
        lifespan="on", timeout_graceful_shutdown=1, ws_per_message_deflate=False,
    )  # fmt: skip
    server = Server(config)
    task = asyncio.create_task(server.serve([tcp, unix]))
    while not server.started:
        assert not task.done(), task
        await asyncio.sleep(0.01)
    try:
        yield Served(settings, tcp.getsockname()[1], settings.admin_token_file.read_text().strip())
    finally:
        server.should_exit = True
        await task


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as served:
        yield served


@dataclass
class PlayedNode:
    """A node played by the test: keeps what it is told, reports what the test says."""

    served: Served
    control: ClientConnection
    told: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)
    acks: list[int] = field(default_factory=list)
    seq: int = 0

    async def listen(self) -> None:
        try:
            async for text in self.control:
                message = json.loads(text)
                if message["type"] == "ack":
                    self.acks.append(message["seq"])
                else:
                    await self.told.put(message)
        except ConnectionClosed:
            return

    async def assignment(self) -> dict[str, Any]:
        found: dict[str, Any] = (await self.next("assign"))["assignment"]
        return found

    async def next(self, kind: str) -> dict[str, Any]:
        """The next message of a kind; an assignment may come twice (at the connection, and by itself)."""
        async with asyncio.timeout(5):
            while (message := await self.told.get())["type"] != kind:
                assert message["type"] == "assign", message
        return message

    async def report(self, a: dict[str, Any], **what: Any) -> None:
        self.seq += 1
        report = {key: a[key] for key in ("workspace", "generation", "start")} | {"seq": self.seq} | what
        await self.control.send(json.dumps({"type": "report", "report": report}))


@asynccontextmanager
async def node(served: Served) -> AsyncIterator[PlayedNode]:
    async with unix_connect(str(served.settings.api_socket), "ws://localhost/internal/v1/node") as control:
        await control.send(json.dumps({"type": "hello", "node": "local", "version": "0", "runtime": "played"}))
        played = PlayedNode(served, control)
        listening = asyncio.create_task(played.listen())
        try:
            yield played
        finally:
            await control.close()
            await listening


BODY = {"name": "w", "image": "127.0.0.1:1/x:1"}


async def test_create_assign_report_settle(served: Served) -> None:
    async with served.local() as client, node(served) as played:
        made = (await client.post("/workspaces", json=BODY)).json()
        assert (made["observed"], made["settled"], made["generation"]) == ("pending", False, 1)
        a = await played.assignment()
        assert (a["desired"], a["start"], a["spec"]["limits"]["pids"]) == ("running", 1, 4096)
        waiting = asyncio.create_task(client.get("/workspaces/w/settled", params={"generation": 1, "timeout_s": 5}))
        await played.report(a, step={"step": "image", "status": "running"})
        await played.report(a, step={"step": "image", "status": "done", "ms": 3.5})
        await played.report(
            a, observed="running", total_ms=12.0, steps=[{"step": "image", "status": "done", "ms": 3.5}]
        )
        settled = (await waiting).json()
        assert (settled["observed"], settled["settled"]) == ("running", True)
        assert settled["last_start"]["total_ms"] == 12.0
        events = [json.loads(line[6:]) for line in (await client.get("/workspaces/w/events")).text.splitlines()
                  if line.startswith("data: ")]  # fmt: skip
        assert [(e["kind"], e["to"] or e["step"]) for e in events] == [
            ("note", None), ("step", "image"), ("state", "running"),
        ]  # fmt: skip
        assert played.acks == [1, 2, 3]


async def test_what_is_wanted_is_told_to_a_node_that_comes_later(served: Served) -> None:
    async with served.local() as client:
        await client.post("/workspaces", json=BODY)
        async with node(served) as played:
            assert (await played.assignment())["start"] == 1
        await client.post("/workspaces/w/stop")
        async with node(served) as played:
            a = await played.assignment()
            assert (a["desired"], a["generation"]) == ("stopped", 2)


async def test_a_restarted_server_knows_what_was_wanted(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, served.local() as client:
        await client.post("/workspaces", json=BODY)
    async with serving(tmp_path) as served, node(served) as played:
        assert (await played.assignment())["spec"]["name"] == "w"


async def test_a_crash_is_started_again_by_itself(served: Served) -> None:
    async with served.local() as client, node(served) as played:
        await client.post("/workspaces", json=BODY)
        a = await played.assignment()
        await played.report(a, observed="running", facts={"ever_ready": True})
        error = {"code": "container.crashed", "detail": "it ended"}
        await played.report(a, observed="error", crashed=True, error=error, reason="it ended")
        while (again := await played.assignment())["start"] == 1:
            pass
        assert (again["start"], again["generation"]) == (2, 1)


async def test_another_request_takes_over(served: Served) -> None:
    async with served.local() as client, node(served):
        await client.post("/workspaces", json=BODY)
        waiting = asyncio.create_task(client.get("/workspaces/w/settled", params={"generation": 1, "timeout_s": 5}))
        await asyncio.sleep(0.05)
        await client.post("/workspaces/w/stop")
        answer = await waiting
        assert (answer.status_code, answer.json()["code"]) == (409, "workspace.superseded")


async def test_waiting_ends_in_time(served: Served) -> None:
    async with served.local() as client:
        await client.post("/workspaces", json=BODY)
        answer = await client.get("/workspaces/w/settled", params={"timeout_s": 0.2})
        assert (answer.status_code, answer.json()["code"]) == (504, "workspace.timeout")


async def test_events_are_followed(served: Served) -> None:
    async with served.local() as client, node(served) as played:
        await client.post("/workspaces", json=BODY)
        a = await played.assignment()
        seen: list[dict[str, Any]] = []
        async with client.stream("GET", "/workspaces/w/events", params={"follow": True}) as stream:
            await played.report(a, step={"step": "seed", "status": "running"})
            await played.report(a, observed="running")
            async for line in stream.aiter_lines():
                if line.startswith("data: "):
                    seen.append(json.loads(line[6:]))
                    if seen[-1]["to"] == "running":
                        break
        assert [(e["kind"], e["status"]) for e in seen] == [("note", None), ("step", "running"), ("state", None)]
        assert seen[1]["id"] is None


async def test_exec_frames_pass_unread_and_each_side_ends_the_other(served: Served) -> None:
    async with served.local() as client, node(served) as played:
        await client.post("/workspaces", json=BODY)
        a = await played.assignment()
        uds = str(served.settings.api_socket)
        async with unix_connect(uds, "ws://localhost/api/v1/workspaces/w/exec") as ws:
            await ws.send("{}")
            problem = json.loads(await ws.recv())["problem"]
            assert problem["code"] == "workspace.not_running"
        await played.report(a, observed="running")
        await client.get("/workspaces/w/settled")
        async with unix_connect(uds, "ws://localhost/api/v1/workspaces/w/exec", compression=None) as ws:
            await ws.send('{"argv": ["x"]}')
            dial = await played.next("dial")
            assert (dial["type"], dial["kind"], dial["params"]) == ("dial", "exec", {"workspace": a["workspace"]})
            async with unix_connect(uds, f"ws://localhost/internal/v1/streams/{dial['stream']}") as inner:
                assert await inner.recv() == '{"argv": ["x"]}'
                await ws.send(b"\x00\xff" * 100_000)
                assert await inner.recv() == b"\x00\xff" * 100_000
                await inner.send(b"\x01out")
                assert await ws.recv() == b"\x01out"
                await ws.close()
                with pytest.raises(ConnectionClosed):
                    await inner.recv()
        with pytest.raises((ConnectionClosed, InvalidStatus)):
            async with unix_connect(uds, f"ws://localhost/internal/v1/streams/{dial['stream']}") as inner:
                await inner.recv()


async def test_an_agent_is_lent_and_asked(served: Served) -> None:
    async with served.local() as client:
        ident = (await client.post("/workspaces", json=BODY)).json()["id"]
        uds = str(served.settings.api_socket)
        internal = f"http://localhost/internal/v1/agents/{ident}"
        assert (await client.get(internal)).json() == {"lent": False}
        assert (await client.post(internal, content=b"\x0b")).status_code == 403
        async with unix_connect(uds, "ws://localhost/api/v1/workspaces/w/agent") as ws:
            asking = asyncio.create_task(client.post(internal, content=b"\x0b"))
            message = await ws.recv()
            assert isinstance(message, bytes)
            assert message[4:] == b"\x0b"
            await ws.send(message[:4] + b"\x0cyes")
            assert (await asking).content == b"\x0cyes"


async def test_an_upload_is_stored_whole_and_fetched_by_the_node(served: Served) -> None:
    async with served.local() as client:
        sent = (await client.post("/uploads", content=b"x" * 3_000_000)).json()
        assert sent["size_bytes"] == 3_000_000
        got = await client.get(f"http://localhost/internal/v1/uploads/{sent['upload']}")
        assert got.content == b"x" * 3_000_000
        for wrong in ("0" * 32, "../roost.db", "%2e%2e%2froost.db"):
            assert (await client.get(f"http://localhost/internal/v1/uploads/{wrong}")).status_code == 404
        body = {**BODY, "repo": {"upload": "0" * 32, "name": "r"}}
        answer = await client.post("/workspaces", json=body)
        assert (answer.status_code, answer.json()["code"]) == (404, "upload.not_found")
        assert (await client.get("/workspaces")).json()["items"] == []


async def test_who_may_come_in(served: Served) -> None:
    cases = [
        ({}, 401, "auth.required"),
        ({"Authorization": "Bearer wrong"}, 401, "auth.required"),
        ({"Authorization": f"Bearer {served.token}"}, 200, None),
        ({"Authorization": f"Bearer {served.token}", "Host": "evil.example:80"}, 421, "auth.host"),
        ({"Authorization": f"Bearer {served.token}", "Host": f"localhost:{served.port}"}, 200, None),
        ({"X-Forwarded-For": "uid:0", "Forwarded": "for=uid:0"}, 401, "auth.required"),
    ]
    for headers, status, code in cases:
        async with served.remote(**headers) as client:
            answer = await client.get("/workspaces")
            assert (answer.status_code, answer.json().get("code")) == (status, code), headers
            if code:
                assert answer.headers["content-type"] == "application/problem+json"
    async with served.remote() as client:
        assert (await client.get("/health")).json()["status"] == "ok"
        internal = f"http://127.0.0.1:{served.port}/internal/v1/agents/x"
        assert (await client.get(internal, headers={"Authorization": f"Bearer {served.token}"})).status_code == 401
    assert served.settings.admin_token_file.stat().st_mode & 0o777 == 0o600


async def test_websockets_are_closed_to_strangers(served: Served) -> None:
    for path in ("/api/v1/workspaces/w/exec", "/internal/v1/node", "/internal/v1/streams/x"):
        with pytest.raises(InvalidStatus) as refused:
            async with connect(f"ws://127.0.0.1:{served.port}{path}"):
                pass
        assert refused.value.response.status_code in (401, 403), path


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"name": "Bad Name"}, 422, "workspace.invalid_name"),
        ({"name": "w", "limits": {"pids": -1}}, 422, "request.invalid"),
        ({"name": "w", "nonsense": 1}, 422, "request.invalid"),
        ({"name": "w", "image": "://"}, 422, "image.invalid_reference"),
        ({"name": "w", "repo": {"url": "http://h/x", "name": "x"}}, 403, "repo.protocol"),
        ({"name": "w", "repo": {"url": "https://u:p@h/x", "name": "x"}}, 422, "repo.invalid"),
        ({"name": "w", "repo": {"url": "--upload-pack=x", "name": "x"}}, 422, "repo.invalid"),
        ({"name": "w", "repo": {"name": "x"}}, 422, "repo.invalid"),
    ],
)
async def test_bad_requests_make_nothing(served: Served, body: dict[str, Any], status: int, code: str) -> None:
    async with served.local() as client:
        answer = await client.post("/workspaces", json=body)
        assert (answer.status_code, answer.json()["code"]) == (status, code)
        assert (await client.get("/workspaces")).json()["items"] == []


async def test_what_is_not_there(served: Served) -> None:
    async with served.local() as client:
        for path in ("/workspaces/none", "/nothing", "/workspaces/none/events", "/workspaces/none/logs"):
            answer = await client.get(path)
            assert answer.status_code == 404, path
            assert answer.json()["exit_code"] == 3
        assert (await client.get("/images")).json()["code"] == "node.unreachable"
