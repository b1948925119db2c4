"""The node's link to a real server: what it reports arrives, in order, over any restart of the server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import unix_connect
from websockets.asyncio.server import ServerConnection, unix_serve

from roost.errors import EngineFailed
from roost.node import link as link_module
from roost.node.link import ServerLink
from roost.workspaces.model import Assignment, Observed, Report, StepReport
from tests.integration.test_server import BODY, serving

HELLO = {"type": "hello", "node": "local", "version": "0", "runtime": "fake"}


class Linked:
    """A link and what came through it."""

    def __init__(self, socket: Path) -> None:
        self.assigned: list[Assignment] = []
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.link = ServerLink(socket, HELLO, self.assigned.append, self._call, self._serve)

    async def _call(self, method: str, params: dict[str, Any]) -> Any:
        self.calls.append((method, params))
        match method:
            case "images":
                return [{"ref": "a:1", "digest": "sha256:0", "size_bytes": 1}]
            case "pull":
                raise EngineFailed("no room \udcff")
        raise ZeroDivisionError(method)

    async def _serve(self, kind: str, params: dict[str, Any], socket: Any) -> None:
        await socket.wait_closed()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 - the condition is anything
                await asyncio.sleep(0.005)


@asynccontextmanager
async def linked(socket: Path) -> AsyncIterator[Linked]:
    linked = Linked(socket)
    task = asyncio.create_task(linked.link.run())
    try:
        yield linked
    finally:
        assert not task.done(), task
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def step(a: Assignment, number: int) -> Report:
    item = StepReport(step=f"s{number}", status="done", ms=number)
    return Report(workspace=a.workspace, generation=a.generation, start=a.start, step=item)


def state(a: Assignment, observed: Observed, **more: Any) -> Report:
    return Report(workspace=a.workspace, generation=a.generation, start=a.start, observed=observed, **more)


async def steps(client: httpx.AsyncClient) -> list[str]:
    text = (await client.get("/workspaces/w/events")).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    return [event["step"] for event in events if event["kind"] == "step"]


async def test_reports_arrive_in_order_over_a_restart_of_the_server(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        async with serving(tmp_path) as served, served.local() as client:
            await client.post("/workspaces", json=BODY)
            node = await stack.enter_async_context(linked(served.settings.api_socket))
            await node.until(lambda: bool(node.assigned))
            a = node.assigned[0]
            for number in range(50):
                node.link.report(step(a, number))
            await node.until(lambda: not node.link._spool)
        for number in range(50, 100):  # nobody listens
            node.link.report(step(a, number))
        async with serving(tmp_path), served.local() as client:
            for number in range(100, 120):
                node.link.report(step(a, number))
            node.link.report(state(a, Observed.running, total_ms=1.0))
            settled = (await client.get("/workspaces/w/settled", params={"timeout_s": 10})).json()
            assert settled["observed"] == "running"
            assert await steps(client) == [f"s{number}" for number in range(120)]
            await node.until(lambda: not node.link._spool)
            assert len(node.assigned) >= 2, "told again when it came back"


async def test_nothing_is_lost_while_the_server_comes_and_goes(tmp_path: Path) -> None:
    """Reports may arrive twice when a server ends between taking one in and saying so."""
    sent = 0
    async with serving(tmp_path) as served, served.local() as client:
        await client.post("/workspaces", json=BODY)
        socket = served.settings.api_socket
    async with linked(socket) as node:
        over = asyncio.Event()

        async def reporting() -> None:
            nonlocal sent
            await node.until(lambda: bool(node.assigned))
            while not over.is_set():
                node.link.report(step(node.assigned[0], sent))
                sent += 1
                await asyncio.sleep(0.002)

        telling = asyncio.create_task(reporting())
        for _ in range(3):
            async with serving(tmp_path):
                before = len(node.assigned)
                await node.until(lambda before=before: len(node.assigned) > before)  # type: ignore[misc]
                await asyncio.sleep(0.1)
        over.set()
        await telling
        async with serving(tmp_path) as served, served.local() as client:
            await node.until(lambda: not node.link._spool)
            seen = [int(name[1:]) for name in await steps(client)]
    assert sorted(set(seen)) == list(range(sent))
    first_of_each = list(dict.fromkeys(seen))
    assert first_of_each == sorted(first_of_each)


async def test_calls_are_answered_with_what_came_of_them(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, served.local() as client, linked(served.settings.api_socket) as node:
        await node.until(lambda: node.link._control is not None)
        assert (await client.get("/images")).json()["items"][0]["ref"] == "a:1"
        answer = await client.post("/images/pull", json={"ref": "a:1"})
        assert (answer.status_code, answer.json()["code"]) == (500, "engine.failed")
        assert "no room ?" in answer.json()["detail"]


async def test_what_cannot_be_encoded_does_not_stop_the_rest(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, served.local() as client, linked(served.settings.api_socket) as node:
        await client.post("/workspaces", json=BODY)
        await node.until(lambda: bool(node.assigned))
        a = node.assigned[0]
        error = EngineFailed("file \udcff\udcfe").to_problem()
        node.link.report(state(a, Observed.error, reason="file \udcff\udcfe", error=error))
        await node.until(lambda: not node.link._spool)
        settled = (await client.get("/workspaces/w/settled", params={"timeout_s": 5})).json()
        assert (settled["observed"], settled["reason"]) == ("error", "file ??")


async def test_an_unreadable_report_is_dropped_and_acknowledged(tmp_path: Path) -> None:
    """Else it would be sent for ever, and keep back all that come after it."""
    async with (
        serving(tmp_path) as served,
        unix_connect(str(served.settings.api_socket), "ws://localhost/internal/v1/node") as control,
    ):
        await control.send(json.dumps(HELLO))
        reports: list[dict[str, Any]] = [{"generation": "x"}, {"workspace": "unknown", "generation": 1, "start": 1}]
        for seq, report in enumerate(reports):
            await control.send(json.dumps({"type": "report", "report": {"seq": seq, **report}}))
            async with asyncio.timeout(5):
                assert json.loads(await control.recv()) == {"type": "ack", "seq": seq}


class PlayedServer:
    """A server played by the test."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.reports: list[int] = []
        self.connections = 0
        self.say: list[str] = []
        self.ack = True
        self.hang_up_after = 0

    async def handle(self, connection: ServerConnection) -> None:
        assert connection.request is not None
        if "streams" in connection.request.path:
            await connection.wait_closed()
            return
        self.connections += 1
        await connection.recv()
        for said in self.say:
            await connection.send(said)
        async for text in connection:
            message = json.loads(text)
            if message["type"] != "report":
                continue
            self.reports.append(message["report"]["seq"])
            if self.hang_up_after and len(self.reports) % self.hang_up_after == 0:
                await connection.close()
                return
            if self.ack:
                await connection.send(json.dumps({"type": "ack", "seq": message["report"]["seq"]}))


@asynccontextmanager
async def played(socket: Path) -> AsyncIterator[PlayedServer]:
    server = PlayedServer(socket)
    async with unix_serve(server.handle, str(socket), close_timeout=0.2):
        yield server


A = Report(workspace="w", generation=1, start=1)  # type: ignore[arg-type]
STEP = A.model_copy(update={"step": StepReport(step="x", status="done")})
STATE = A.model_copy(update={"observed": Observed.running})


async def test_what_was_not_acknowledged_is_sent_again(tmp_path: Path) -> None:
    socket = tmp_path / "s"
    async with played(socket) as server, linked(socket) as node:
        server.hang_up_after = 7
        for _ in range(20):
            node.link.report(STEP)
        await node.until(lambda: not node.link._spool)
        assert sorted(set(server.reports)) == list(range(1, 21))
        assert server.connections >= 3


async def test_an_overfull_spool_gives_up_steps_before_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "SPOOL", 10)
    socket = tmp_path / "s"
    async with linked(socket) as node:
        for number in range(20):
            node.link.report(STATE if number % 4 == 0 else STEP)
        assert len(node.link._spool) == 10
        async with played(socket) as server:
            await node.until(lambda: not node.link._spool)
        assert server.reports == sorted(server.reports)
        assert {1, 5, 9, 13, 17} <= set(server.reports)
        assert server.reports[-1] == 20


async def test_a_spool_that_overflows_in_front_of_a_deaf_server_loses_no_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "SPOOL", 10)
    socket = tmp_path / "s"
    async with played(socket) as server, linked(socket) as node:
        server.ack = False
        for number in range(40):
            node.link.report(STATE if number % 10 == 0 else STEP)
            await asyncio.sleep(0.001)
        await node.until(lambda: 40 in server.reports)
        assert {1, 11, 21, 31} <= set(server.reports)
        assert len(node.link._spool) == 10


async def test_nonsense_from_the_server_ends_nothing(tmp_path: Path) -> None:
    socket = tmp_path / "s"
    async with played(socket) as server, linked(socket) as node:
        server.say = [
            "no json", "[]", "{}", '{"type": "ack"}', '{"type": "assign", "assignment": {}}', '{"type": "dial"}',
            '{"type": "hangup", "stream": "unknown"}', '{"type": "new"}',
        ]  # fmt: skip
        node.link.report(STEP)
        await node.until(lambda: not node.link._spool)
        assert server.connections == 1


async def test_streams_end_with_the_connection_they_were_asked_for_on(tmp_path: Path) -> None:
    socket = tmp_path / "s"
    async with played(socket) as server, linked(socket) as node:
        server.say = [json.dumps({"type": "dial", "stream": name, "kind": "x", "params": {}}) for name in ("a", "b")]
        server.hang_up_after = 1
        await node.until(lambda: len(node.link._streams) == 2)
        server.say = []
        node.link.report(STEP)
        await node.until(lambda: not node.link._streams)


async def test_a_server_that_hangs_up_at_once_is_not_dialled_in_a_hurry(tmp_path: Path) -> None:
    socket = tmp_path / "s"
    server = PlayedServer(socket)
    dialled = 0

    async def hang_up(connection: ServerConnection) -> None:
        nonlocal dialled
        dialled += 1
        await connection.close()

    async with unix_serve(hang_up, str(server.socket)), linked(socket):
        await asyncio.sleep(1.0)
    assert 2 <= dialled <= 6
