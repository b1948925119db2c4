"""Commands and logs from a client through a real server and link to a runtime in memory, and back."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, unix_connect
from websockets.exceptions import ConnectionClosed

from roost.client.address import Address
from roost.client.api import AsyncClient
from roost.client.sockets import ExecRequest, execute
from roost.errors import ExecNotFound, InvalidRequest, NodeUnreachable, RoostError, ServerUnreachable
from roost.node.link import ServerLink
from roost.node.streams import Streams
from roost.runtimes.fake import FakeRuntime
from roost.runtimes.protocol import ContainerId, ImageInfo, Tool, ToolResult, VolumeName
from roost.server import streams as server_streams
from roost.workspaces.converge import Converger
from roost.workspaces.model import Assignment, UserFact
from roost.workspaces.start import StartTools
from roost.workspaces.startlog import StartLogs
from tests.integration.test_server import Served, serving

IMAGE = "127.0.0.1:1/x:1"


class Repositories:
    async def place(self, assignment: Assignment, user: UserFact, path: str, note: Callable[[str], None]) -> str:
        raise AssertionError("no repository is wanted here")


class Whole:
    """A server, a node with a runtime in memory, a client; one workspace `w` that runs."""

    def __init__(self, served: Served, root: Path) -> None:
        self.served = served
        self.runtime = FakeRuntime(root / "engine")
        self.runtime.add_image(IMAGE)
        self.runtime.tools["roost.home"] = self._home
        self.logs = StartLogs(root / "logs")
        tools = StartTools(self.runtime, Repositories(), self._room, self._auth, "{home}/{repo}", True)
        self.converger = Converger(tools, self.logs, lambda report: self.link.report(report), stop_grace_s=0.1)
        self.streams = Streams(self.runtime, self.converger, self.logs)
        hello = {"type": "hello", "node": "local", "version": "0", "runtime": "fake"}
        self.link = ServerLink(served.settings.api_socket, hello, self.converger.assign, self._call, self.streams.serve)
        self.linking = asyncio.create_task(self.link.run())
        self.client = AsyncClient(Address(socket=str(served.settings.api_socket)))

    async def _room(self) -> None:
        return

    async def _auth(self, ref: Any) -> None:
        return None

    async def _call(self, method: str, params: dict[str, Any]) -> Any:
        raise AssertionError(method)

    async def _home(self, tool: Tool, image: ImageInfo, volume: VolumeName | None) -> ToolResult:
        user = {"uid": 1000, "gid": 1000, "name": "dev", "home": "/home/dev", "shell": "/bin/sh"}
        return ToolResult(0, json.dumps({"user": user, "state": "seeded"}).encode(), b"")

    async def up(self) -> None:
        await self.client.create("w", image=IMAGE)
        settled = await self.client.settled("w", 1, 10)
        assert settled.observed == "running"

    @property
    def box(self) -> ContainerId:
        (container,) = self.runtime._containers
        return container

    @property
    def workspace(self) -> str:
        return self.box.removeprefix("roost-")

    @property
    def sessions(self) -> int:
        return len(self.runtime._containers[self.box].sessions)

    async def until(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110 - the condition is anything
                await asyncio.sleep(0.005)

    async def unlink(self) -> None:
        self.linking.cancel()
        await asyncio.gather(self.linking, return_exceptions=True)

    async def close(self) -> None:
        await self.unlink()
        await self.converger.close()
        await self.runtime.close()

    @asynccontextmanager
    async def raw(self) -> AsyncIterator[ClientConnection]:
        uri = "ws://localhost/api/v1/workspaces/w/exec"
        async with unix_connect(str(self.served.settings.api_socket), uri, compression=None, max_size=None) as socket:
            yield socket


@pytest.fixture
async def whole(tmp_path: Path) -> AsyncIterator[Whole]:
    async with serving(tmp_path) as served:
        whole = Whole(served, tmp_path)
        try:
            await whole.up()
            yield whole
        finally:
            await whole.close()


async def run(whole: Whole, *argv: str, data: bytes | None = None, **more: Any) -> tuple[int | None, bytes, bytes]:
    out, err = bytearray(), bytearray()
    request = ExecRequest(argv, stdin=data is not None, **more)
    async with asyncio.timeout(30), execute(whole.client, "w", request) as command:

        async def feed() -> None:
            if data is not None:
                await command.send(data)
                await command.end_input()

        feeding = asyncio.create_task(feed())
        async for channel, piece in command.output():
            (out if channel == 1 else err).extend(piece)
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)
    return command.exit_code, bytes(out), bytes(err)


async def test_bytes_both_ways_and_the_end_of_input(whole: Whole) -> None:
    data = bytes(range(256)) * 40_000
    assert await run(whole, "cat", data=data) == (0, data, b"")
    assert await run(whole, "sh", "-c", "printf out; printf err >&2; exit 7") == (7, b"out", b"err")
    await whole.until(lambda: whole.sessions == 0)


async def test_input_is_empty_when_none_is_given(whole: Whole) -> None:
    assert await run(whole, "cat") == (0, b"", b"")


async def test_user_directory_and_environment(whole: Whole) -> None:
    (whole.runtime.volume_path(VolumeName(f"{whole.box}-home")) / "sub").mkdir()
    code, out, _ = await run(whole, "sh", "-c", 'echo "$HOME $USER $X ${PWD##*/}"', cwd="sub", env={"X": "y"})
    assert (code, out) == (0, b"/home/dev dev y sub\n")


async def test_a_signal_and_its_exit_code(whole: Whole) -> None:
    async with execute(whole.client, "w", ExecRequest(("sleep", "600"))) as command:
        await command.signal(signal.SIGTERM)
        async for _ in command.output():
            pass
    assert command.exit_code == 143


async def test_a_terminal_and_its_size(whole: Whole) -> None:
    request = ExecRequest(("sh", "-c", "stty size; read x; stty size"), tty=(80, 24), stdin=True)
    out = bytearray()
    async with asyncio.timeout(10), execute(whole.client, "w", request) as command:
        resized = False
        async for _, piece in command.output():
            out.extend(piece)
            if b"24 80" in out and not resized:
                resized = True
                await command.resize(132, 43)
                await command.send(b"\n")
    assert command.exit_code == 0
    assert b"43 132" in out


async def test_an_exit_code_is_not_lost_while_the_caller_still_sends(whole: Whole) -> None:
    """The node closes while bytes for it are on their way; its last words must come through all the same."""
    for _ in range(10):
        code, out, _ = await run(whole, "sh", "-c", "head -c 3; exit 5", data=b"abc" * 2_000_000)
        assert (code, out) == (5, b"abc")


async def test_errors_of_the_start_are_typed(whole: Whole) -> None:
    with pytest.raises(ExecNotFound):
        await run(whole, "no-such-command")
    with pytest.raises(RoostError) as no_directory:
        await run(whole, "true", cwd="nowhere")
    assert no_directory.value.code.startswith("exec.")


@pytest.mark.parametrize(
    "frame",
    ["no json", "[]", "7", "{}", '{"type": "nonsense"}', '{"type": "resize", "columns": 0, "rows": 1}',
     '{"type": "resize"}', '{"type": "signal", "number": "KILL"}', '{"type": "signal", "number": 4096}',
     '{"type": "signal"}'],
)  # fmt: skip
async def test_a_bad_frame_ends_in_a_typed_error(whole: Whole, frame: str) -> None:
    async with asyncio.timeout(10), execute(whole.client, "w", ExecRequest(("sleep", "600"), stdin=True)) as command:
        await command._send(frame)
        with pytest.raises(InvalidRequest):
            async for _ in command.output():
                pass
    await whole.until(lambda: whole.sessions == 0)


@pytest.mark.parametrize("first", ["no json", "[]", '{"argv": 1}', '{"tty": {"columns": -1}}', b"\x00\xff", b""])
async def test_a_bad_request_ends_in_a_typed_error(whole: Whole, first: str | bytes) -> None:
    async with asyncio.timeout(10), whole.raw() as socket:
        await socket.send(first)
        answer = json.loads(await socket.recv())
        assert answer["problem"]["code"] == "request.invalid"
        with pytest.raises(ConnectionClosed):
            await socket.recv()


async def test_a_defect_of_the_node_is_told(whole: Whole) -> None:
    whole.runtime.fail_next("exec", ZeroDivisionError("oops"))
    with pytest.raises(RoostError) as told:
        await run(whole, "true")
    assert told.value.code == "internal"


async def test_a_caller_who_leaves_ends_the_command(whole: Whole) -> None:
    async with execute(whole.client, "w", ExecRequest(("sleep", "600"))):
        assert whole.sessions == 1
    await whole.until(lambda: whole.sessions == 0)


async def test_a_caller_who_leaves_while_the_command_takes_no_input(
    whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every buffer on the way is full, so nobody reads, and nobody would see that the socket was closed."""
    monkeypatch.setattr(server_streams, "KEEP_ALIVE_S", 0.2)
    async with whole.raw() as socket:
        await socket.send(json.dumps({"argv": ["sh", "-c", "echo up; sleep 600"], "stdin": True}))
        assert json.loads(await socket.recv())["type"] == "started"
        assert await socket.recv() == b"\x01up\n"

        async def flood() -> None:
            while True:
                await socket.send(b"x" * 262_144)

        flooding = asyncio.create_task(flood())
        await asyncio.wait([flooding], timeout=1.0)
        assert not flooding.done()
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)
        socket.transport.abort()
    await whole.until(lambda: whole.sessions == 0)


async def test_the_node_goes_while_a_command_runs(whole: Whole) -> None:
    async with asyncio.timeout(10), execute(whole.client, "w", ExecRequest(("sleep", "600"))) as command:
        await whole.unlink()
        with pytest.raises(ServerUnreachable):
            async for _ in command.output():
                pass
    assert whole.sessions == 0
    with pytest.raises(NodeUnreachable):
        await run(whole, "true")


async def test_the_container_ends_under_a_command(whole: Whole) -> None:
    async with asyncio.timeout(10), execute(whole.client, "w", ExecRequest(("sleep", "600"))) as command:
        whole.runtime.crash(whole.box)
        async for _ in command.output():
            pass
    assert command.exit_code == 137


# logs


async def lines(whole: Whole, **more: Any) -> list[tuple[str, str]]:
    async with asyncio.timeout(10):
        return [(line.channel, line.text) async for line in whole.client.logs("w", **more)]


async def test_logs_of_this_start_and_the_one_before(whole: Whole) -> None:
    whole.runtime.say(whole.box, "first")
    found = await lines(whole)
    assert found[-1] == ("stdout", "first")
    assert found[0][0] == "start"
    await whole.client.request("w", "restart")
    await whole.client.settled("w", 2, 10)
    whole.runtime.say(whole.box, "second")
    assert (await lines(whole))[-1] == ("stdout", "second")
    assert (await lines(whole, previous=True))[-1] == ("stdout", "first")


async def test_logs_are_followed_to_the_end_of_the_container(whole: Whole) -> None:
    found: list[str] = []

    async def follow() -> None:
        async for line in whole.client.logs("w", follow=True):
            found.append(line.text)

    following = asyncio.create_task(follow())
    for number in range(3):
        whole.runtime.say(whole.box, f"line {number}")
        await whole.until(lambda number=number: f"line {number}" in found)  # type: ignore[misc]
    whole.runtime.crash(whole.box)
    async with asyncio.timeout(10):
        await following


async def test_a_follower_hears_of_a_start_that_goes_on(whole: Whole) -> None:
    workspace, release = whole.workspace, whole.runtime.hold("create")
    await whole.client.request("w", "restart")
    await whole.until(lambda: whole.converger.busy(workspace))
    found: list[str] = []

    async def follow() -> None:
        async for line in whole.client.logs("w", follow=True):
            found.append(line.text)

    following = asyncio.create_task(follow())
    await whole.until(lambda: any(text.startswith("seed") for text in found))
    release.set()
    await whole.until(lambda: any(text.startswith("container: done") for text in found))
    whole.runtime.say(whole.box, "up")
    await whole.until(lambda: "up" in found)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)


async def test_a_follower_who_leaves_frees_the_stream(whole: Whole) -> None:
    async with aclosing(whole.client.logs("w", follow=True)) as stream:
        await anext(stream)
        assert len(whole.link._streams) == 1
    await whole.until(lambda: not whole.link._streams)


async def test_a_quiet_log_is_kept_alive(whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client takes a minute's silence for a server that is gone."""
    monkeypatch.setattr(server_streams, "KEEP_ALIVE_S", 0.05)
    async with (
        whole.served.local() as client,
        client.stream("GET", "/workspaces/w/logs", params={"follow": True}) as stream,
    ):
        async with asyncio.timeout(5):
            async for line in stream.aiter_lines():
                if line.startswith(":"):
                    break
    whole.runtime.crash(whole.box)


@pytest.mark.parametrize("error", [ZeroDivisionError("oops"), NodeUnreachable("x")])
async def test_an_error_of_the_node_comes_out_of_the_logs(whole: Whole, error: Exception) -> None:
    whole.runtime.fail_next("logs", error)
    with pytest.raises(RoostError) as told:
        await lines(whole)
    assert told.value.code == (error.code if isinstance(error, RoostError) else "internal")


async def test_logs_that_break_off_are_not_the_end(whole: Whole) -> None:
    with pytest.raises(NodeUnreachable):
        async with asyncio.timeout(10):
            async for _ in whole.client.logs("w", follow=True):
                await whole.unlink()
    with pytest.raises(NodeUnreachable):
        await lines(whole)


async def test_a_torn_line_of_a_start_log_hides_nothing(whole: Whole) -> None:
    path = whole.logs.path(whole.workspace)
    assert path is not None
    with path.open("a") as file:
        file.write('{"at": 1, "ch\n')
    whole.runtime.say(whole.box, "after")
    assert (await lines(whole))[-1] == ("stdout", "after")


async def test_two_callers_do_not_hold_up_each_other(whole: Whole) -> None:
    """One does not read; the other gets its bytes."""
    async with execute(whole.client, "w", ExecRequest(("cat", "/dev/zero"))) as deaf:
        await anext(deaf.output())
        data = b"z" * 3_000_000
        assert await run(whole, "cat", data=data) == (0, data, b"")
    await whole.until(lambda: whole.sessions == 0)
