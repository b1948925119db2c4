"""The client by itself: where the server is, and what becomes of answers that are not the expected ones."""

from __future__ import annotations

import asyncio
import contextlib
import io
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from roost import settings as full
from roost.client import Address, AsyncClient, find_server, parse_server_url
from roost.client.address import DEFAULT_CONFIG, local_paths
from roost.client.http import error_of
from roost.errors import (
    Failed,
    InvalidConfig,
    NotFound,
    ServerUnreachable,
    Superseded,
    TimedOut,
    Unauthenticated,
    Unavailable,
    WorkspaceNotFound,
)
from tests.unit.cli_server import Served, serve


@pytest.fixture
def served() -> Iterator[Served]:
    with tempfile.TemporaryDirectory(prefix="roost-t") as root, serve(Path(root)) as running:
        running.fake.add("web")
        yield running


@pytest.fixture
def client(served: Served) -> AsyncClient:
    return AsyncClient(parse_server_url(f"unix://{served.socket}"))


# --- address ------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    empty = tmp_path / "roost.toml"
    empty.write_text("")
    settings = full.Settings.model_construct()
    paths = local_paths({"ROOST_CONFIG": str(empty)})
    assert (paths.state_dir, paths.run_dir) == (settings.state_dir, settings.run_dir)
    assert paths.port == settings.server.port
    assert (paths.socket, paths.token_file) == (settings.api_socket, settings.admin_token_file)
    assert Path(DEFAULT_CONFIG) == full.DEFAULT_CONFIG


def test_sources_are_read_as_the_settings_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "roost.toml"
    file.write_text('state_dir = "/s"\nrun_dir = "/r"\n[server]\nport = 1234\n')
    for env in ({}, {"ROOST_STATE_DIR": "/s2", "ROOST_SERVER__PORT": "99"}, {"ROOST_RUN_DIR": "/r2"}):
        given = {"ROOST_CONFIG": str(file), **env}
        with monkeypatch.context() as patch:
            for name in ("ROOST_STATE_DIR", "ROOST_RUN_DIR", "ROOST_SERVER__PORT"):
                patch.delenv(name, raising=False)
            for name, value in given.items():
                patch.setenv(name, value)
            settings, paths = full.Settings(), local_paths(given)
        assert (paths.state_dir, paths.run_dir, paths.port) == (
            settings.state_dir,
            settings.run_dir,
            settings.server.port,
        )


def test_which_server(tmp_path: Path) -> None:
    env = {"ROOST_STATE_DIR": str(tmp_path / "s"), "ROOST_RUN_DIR": str(tmp_path / "r"), "ROOST_CONFIG": "/dev/null"}
    assert find_server(env) == Address(host="127.0.0.1", port=7766, is_default=True)
    (tmp_path / "s" / "server").mkdir(parents=True)
    (tmp_path / "s" / "server" / "admin-token").write_text("secret\n")
    assert find_server(env).token == "secret"
    assert "secret" not in repr(find_server(env))
    (tmp_path / "r" / "server").mkdir(parents=True)
    (tmp_path / "r" / "server" / "api.sock").touch()
    assert find_server(env) == Address(socket=str(tmp_path / "r/server/api.sock"), is_default=True)
    named = find_server({**env, "ROOST_SERVER_URL": "https://example.com/roost/", "ROOST_TOKEN": "t"})
    assert named == Address(host="example.com", port=443, tls=True, prefix="/roost", token="t")
    assert str(named) == "https://example.com/roost"
    assert str(parse_server_url("http://[::1]:7766")) == "http://[::1]:7766"


@pytest.mark.parametrize("url", ["ftp://x", "example.com", "http://", "http://x:99999", "http://[", "//x"])
def test_bad_addresses(url: str) -> None:
    with pytest.raises(InvalidConfig):
        parse_server_url(url)


def test_a_bad_file(tmp_path: Path) -> None:
    file = tmp_path / "roost.toml"
    with pytest.raises(InvalidConfig):
        local_paths({"ROOST_CONFIG": str(file)})
    file.write_text("not = toml = at all")
    with pytest.raises(InvalidConfig):
        local_paths({"ROOST_CONFIG": str(file)})


# --- answers ------------------------------------------------------------------------------------------------------


async def test_typed_errors(served: Served, client: AsyncClient) -> None:
    for name in ("nosuch", "../health", "", ".."):
        with pytest.raises(WorkspaceNotFound):
            await client.workspace(name)
    served.fake.workspaces["web"]["generation"] = 9
    with pytest.raises(Superseded):
        await client.settled("web", 3, 5.0)
    served.fake.token = "secret"
    with pytest.raises(Unauthenticated):
        await client.workspaces()


async def test_settled_has_a_limit(served: Served, client: AsyncClient) -> None:
    served.fake.workspaces["web"]["settled"] = False
    with pytest.raises(TimedOut) as caught:
        await client.settled("web", 1, 0.3)
    assert "roost show" in caught.value.hint


def test_errors_without_a_problem() -> None:
    assert isinstance(error_of(502, b"<html>"), Unavailable)
    assert isinstance(error_of(404, b"{}"), NotFound)
    assert isinstance(error_of(500, b""), Failed)
    assert type(error_of(409, b'{"code": "workspace.superseded"}')) is Superseded


async def test_upload_is_whole(served: Served, client: AsyncClient) -> None:
    data = bytes(range(256)) * 20_000
    ident = await client.upload(io.BytesIO(data))
    assert served.fake.uploads[ident] == data


class Broken:
    """A server that answers with fixed bytes and hangs up."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Broken:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # Closing alone does not wake a thread in accept(2).
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                connection.sendall(self._answer)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    ],
    ids=["nothing", "another protocol", "cut off", "no json", "another service"],
)
async def test_what_is_no_roost_server(answer: bytes) -> None:
    with Broken(answer) as broken:
        with pytest.raises(ServerUnreachable):
            await AsyncClient(parse_server_url(broken.url)).health()


async def test_nobody_listens() -> None:
    with pytest.raises(ServerUnreachable):
        await AsyncClient(parse_server_url("http://127.0.0.1:1")).health()
    with pytest.raises(ServerUnreachable):
        await AsyncClient(parse_server_url("unix:///nosuch/socket")).health()


async def test_a_server_that_says_nothing() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with pytest.raises(TimedOut):
            await AsyncClient(parse_server_url(f"http://127.0.0.1:{listener.getsockname()[1]}")).health(timeout_s=0.2)


async def test_events_go_on_across_a_restart_of_the_server() -> None:
    with tempfile.TemporaryDirectory(prefix="roost-t") as root:
        first = Path(root) / "a"
        address = parse_server_url(f"unix://{root}/sock")
        link = Path(root) / "sock"
        seen: list[int | None] = []

        async def follow() -> None:
            async for event in AsyncClient(address).events(follow=True):
                seen.append(event.id)

        async def until(count: int) -> None:
            async with asyncio.timeout(10):
                while len(seen) < count:  # noqa: ASYNC110 - polling with a deadline
                    await asyncio.sleep(0.01)

        with serve(first) as served:
            link.symlink_to(served.socket)
            served.fake.add("web")
            served.fake.event("web")
            events = served.fake.events
            following = asyncio.create_task(follow())
            await until(1)
        with serve(Path(root) / "b") as served:
            link.unlink()
            link.symlink_to(served.socket)
            served.fake.add("web")
            served.fake.events[:] = events
            served.fake.event("web")
            await until(2)
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
    assert seen == [1, 2], "nothing twice, nothing lost"
