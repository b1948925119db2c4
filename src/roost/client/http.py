"""HTTP/1.1 to the server: asyncio's streams and h11, one connection a request.

Not httpx, by measurement (2 cores, median of 8 cold starts): Typer and one GET over the unix socket take 265 ms with
httpx's async client, 130 ms so; `roost ls` has 400 ms in all, the server's answer and Rich included.  httpx stays the
client for everything that goes out to the world; this one speaks to our own server only: no redirects, no cookies, no
proxies, no pool.

Invariants: every wait has a limit; whatever goes wrong below HTTP is ServerUnreachable or ServerTimeout; what the
server refuses is the RoostError that it sent.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote, urlencode

import h11

from roost import __version__
from roost.client.address import Address
from roost.errors import (
    InvalidAnswer,
    InvalidRequest,
    NotFound,
    Refused,
    RoostError,
    ServerTimeout,
    ServerUnreachable,
    Unavailable,
    WorkspaceNotFound,
    from_problem,
)

API = "/api/v1"
CONNECT_S = 5.0
IDLE_S = 60.0
"""Seconds a stream may say nothing; the server sends a comment every 15."""
PIECE = 256 << 10
BODY_MAX = 64 << 20

Params = Mapping[str, str | int | float | bool | None]


def workspace_path(name: str, verb: str = "") -> str:
    """Path of a workspace or of one of its verbs. Raises WorkspaceNotFound for a name that would be another path."""
    if name in ("", ".", "..") or "/" in name:
        raise WorkspaceNotFound(f"there is no workspace {name!r}")
    return f"/workspaces/{quote(name, safe='')}{'/' + verb if verb else ''}"


def reason_of(error: OSError) -> str:
    """The system's words; asyncio puts its own in their place."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)


def unreachable(address: Address, reason: str) -> ServerUnreachable:
    hint = None if address.is_default else "Check ROOST_SERVER_URL and whether the server runs there."
    return ServerUnreachable(
        f"no server answers at {address}: {reason}", next_step=hint, details={"address": str(address)}
    )


class Response:
    """Status and headers are there, the body is still to come."""

    def __init__(self, connection: _Connection, event: h11.Response) -> None:
        self._connection = connection
        self.status = event.status_code
        self.headers = {name.decode("ascii"): value.decode("latin-1") for name, value in event.headers}

    async def pieces(self, idle_s: float = IDLE_S) -> AsyncIterator[bytes]:
        """The body as it comes."""
        while True:
            event = await self._connection.event(idle_s)
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return

    async def json(self, idle_s: float = IDLE_S) -> Any:
        """The whole body. Raises the error the server sent, if it is one."""
        body = bytearray()
        async for piece in self.pieces(idle_s):
            body += piece
            if len(body) > BODY_MAX:
                raise InvalidAnswer(f"the server's answer is larger than {BODY_MAX} bytes")
        if self.status >= 400:
            raise error_of(self.status, bytes(body))
        try:
            return json.loads(body) if body else None
        except ValueError as error:
            raise unreachable(self._connection.address, "what answers there is not roost") from error

    async def lines(self) -> AsyncIterator[str]:
        """The lines of a text body."""
        rest = b""
        async for piece in self.pieces():
            *whole, rest = (rest + piece).split(b"\n")
            for line in whole:
                yield line.decode(errors="replace").removesuffix("\r")
        if rest:
            yield rest.decode(errors="replace")

    async def messages(self) -> AsyncGenerator[str, None]:
        """The `data` of a stream of server-sent events."""
        data: list[str] = []
        async for line in self.lines():
            if line.startswith("data:"):
                data.append(line[5:].removeprefix(" "))
            elif not line and data:
                yield "\n".join(data)
                data = []


def error_of(status: int, body: bytes) -> RoostError:
    """The typed error in a problem document; else one made of the status."""
    try:
        problem = json.loads(body)
    except ValueError:
        problem = None
    if isinstance(problem, dict) and ("code" in problem or "title" in problem):
        return from_problem(problem)
    text = f"the server answered {status}"
    if status == 404:
        return NotFound(text)
    if status in (401, 403):
        return Refused(text)
    if status in (502, 503, 504):
        return Unavailable(text)
    return InvalidRequest(text) if status < 500 else InvalidAnswer(text)


class _Connection:
    """One request and its answer."""

    def __init__(self, address: Address, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.address = address
        self._reader, self._writer = reader, writer
        self._http = h11.Connection(h11.CLIENT)

    async def send(self, event: h11.Request | h11.Data | h11.EndOfMessage, timeout_s: float = IDLE_S) -> None:
        data = self._http.send(event)
        try:
            async with asyncio.timeout(timeout_s):
                if data:
                    self._writer.write(data)
                await self._writer.drain()
        except TimeoutError as error:
            raise ServerTimeout(f"the server at {self.address} takes nothing in for {timeout_s:g} s") from error
        except OSError as error:
            raise unreachable(self.address, f"the connection broke ({reason_of(error)})") from error

    async def event(self, timeout_s: float) -> object:
        """The next event of the answer."""
        while True:
            try:
                event = self._http.next_event()
                if event is not h11.NEED_DATA:
                    if isinstance(event, h11.ConnectionClosed):
                        raise unreachable(self.address, "the connection was closed")
                    return event
                async with asyncio.timeout(timeout_s):
                    data = await self._reader.read(PIECE)
                self._http.receive_data(data)
            except TimeoutError as error:
                raise ServerTimeout(f"the server at {self.address} did not answer within {timeout_s:g} s") from error
            except OSError as error:
                raise unreachable(self.address, f"the connection broke ({reason_of(error)})") from error
            except h11.RemoteProtocolError as error:
                raise unreachable(self.address, f"the answer broke off ({error})") from error

    async def response(self, timeout_s: float) -> Response:
        while True:
            event = await self.event(timeout_s)
            if isinstance(event, h11.Response):
                return Response(self, event)


class Http:
    """Requests to one server."""

    def __init__(self, address: Address) -> None:
        self.address = address

    def headers(self) -> list[tuple[str, str]]:
        """Those that every request carries, websockets too."""
        token = [("Authorization", f"Bearer {self.address.token}")] if self.address.token else []
        return [("User-Agent", f"roost/{__version__}"), *token]

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[_Connection]:
        address = self.address
        try:
            async with asyncio.timeout(CONNECT_S):
                if address.socket is not None:
                    reader, writer = await asyncio.open_unix_connection(address.socket, limit=PIECE)
                else:
                    reader, writer = await asyncio.open_connection(
                        address.host, address.port, ssl=True if address.tls else None, limit=PIECE
                    )
        except TimeoutError as error:
            raise unreachable(address, f"no connection within {CONNECT_S:g} s") from error
        except OSError as error:
            raise unreachable(address, reason_of(error)) from error
        try:
            yield _Connection(address, reader, writer)
        finally:
            writer.transport.abort()  # nothing is reused, and whatever we sent was answered or is not waited for

    @asynccontextmanager
    async def open(
        self,
        method: str,
        path: str,
        params: Params | None = None,
        body: AsyncIterator[bytes] | bytes | None = None,
        timeout_s: float = 30.0,
    ) -> AsyncIterator[Response]:
        """Send a request; the block gets the answer when its headers are here, whatever its status."""
        pairs = [
            (k, str(v).lower() if isinstance(v, bool) else str(v)) for k, v in (params or {}).items() if v is not None
        ]
        target = self.address.prefix + API + path + (f"?{urlencode(pairs)}" if pairs else "")
        headers = [*self.headers(), ("Host", self.address.host_header), ("Accept", "*/*"), ("Connection", "close")]
        if isinstance(body, bytes):
            headers += [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        elif body is not None:
            headers += [("Content-Type", "application/octet-stream"), ("Transfer-Encoding", "chunked")]
        async with self._connected() as connection:
            await connection.send(h11.Request(method=method, target=target, headers=headers))
            if isinstance(body, bytes):
                await connection.send(h11.Data(data=body))
            elif body is not None:
                try:
                    async for piece in body:
                        await connection.send(h11.Data(data=piece))
                except ServerUnreachable:
                    # It may have refused and hung up before we had sent everything: its words are worth more than ours.
                    yield await connection.response(timeout_s)
                    return
            await connection.send(h11.EndOfMessage())
            yield await connection.response(timeout_s)

    async def call(
        self,
        method: str,
        path: str,
        params: Params | None = None,
        json_body: object = None,
        timeout_s: float = 30.0,
    ) -> Any:
        """One request, one JSON document. Raises what the server refuses, ServerUnreachable, ServerTimeout."""
        body = None if json_body is None else json.dumps(json_body).encode()
        async with self.open(method, path, params, body, timeout_s) as response:
            return await response.json(timeout_s)
