"""The node's end of its connection to the server.

One websocket for control, kept up for ever: whatever breaks is dialled again.  Reports wait in a spool until the server
has acknowledged them, so a server that restarts misses none; they are sent in order and may arrive twice.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

import structlog
from websockets.asyncio.client import ClientConnection, connect, unix_connect
from websockets.exceptions import WebSocketException

from roost.errors import InternalError, RoostError
from roost.workspaces.model import Assignment, Report

log = structlog.get_logger()

RETRY_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
OPEN_TIMEOUT_S = 5.0
PING_S = 20.0
"""On the control connection only: a stream whose reader pauses cannot answer."""
SPOOL = 10_000
"""Reports kept while the server is away; beyond it the oldest steps go, states last."""
STEADY_S = 5.0
"""A connection that lasted this long was a good one: the pauses between attempts begin anew."""
MAX_MESSAGE = 4 << 20
GOING_AWAY = 1001
"""Close code of RFC 6455."""

Call = Callable[[str, dict[str, Any]], Awaitable[Any]]
"""A method the server may call: name and parameters to a JSON-ready answer."""
Serve = Callable[[str, dict[str, Any], ClientConnection], Awaitable[None]]
"""A stream the server asked for: its kind, its parameters, its websocket."""


class ServerLink:
    """Keeps the node connected to the server at a unix socket."""

    def __init__(
        self, socket: Path, hello: dict[str, Any], assign: Callable[[Assignment], None], call: Call, serve: Serve
    ) -> None:
        self._socket = str(socket)
        self._hello = hello
        self._assign = assign
        self._call = call
        self._serve = serve
        self._seq = 0
        self._spool: deque[Report] = deque()
        self._sent = 0
        """How many of the spool this connection has sent already."""
        self._news = asyncio.Event()
        self._control: ClientConnection | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._streams: dict[str, asyncio.Task[None]] = {}

    def report(self, report: Report) -> None:
        """Have a report delivered, now or when the server is back."""
        self._seq += 1
        self._spool.append(report.model_copy(update={"seq": self._seq}))
        if len(self._spool) > SPOOL:
            oldest = next((index for index, item in enumerate(self._spool) if item.observed is None), 0)
            del self._spool[oldest]
            self._sent = min(self._sent, oldest)
        self._news.set()

    async def status(self, status: dict[str, Any]) -> None:
        """Tell the server about this node, if it is there."""
        if self._control is not None:
            try:
                await self._control.send(json.dumps({"type": "status", "status": status}))
            except (OSError, WebSocketException):
                return

    async def run(self) -> None:
        """Stay connected until cancelled."""
        failures = 0
        try:
            while True:
                begun = time.monotonic()
                try:
                    async with self._dial("/internal/v1/node", pings=True) as control:
                        await self._talk(control)
                except (OSError, TimeoutError, WebSocketException) as error:
                    if failures == 0:
                        log.info("server is away", error=str(error))
                finally:
                    self._control = None
                if time.monotonic() - begun > STEADY_S:
                    failures = 0
                await asyncio.sleep(RETRY_S[min(failures, len(RETRY_S) - 1)])
                failures += 1
        finally:
            await _end(self._tasks)

    def _dial(self, path: str, *, pings: bool = False) -> connect:
        return unix_connect(
            self._socket,
            f"ws://localhost{path}",
            open_timeout=OPEN_TIMEOUT_S,
            close_timeout=2.0,
            compression=None,
            max_size=MAX_MESSAGE,
            max_queue=4,
            ping_interval=PING_S if pings else None,
            ping_timeout=3 * PING_S,
            proxy=None,
        )

    async def _talk(self, control: ClientConnection) -> None:
        await control.send(json.dumps(self._hello))
        self._control, self._sent = control, 0
        self._news.set()
        sender = asyncio.create_task(self._send(control), name="reports")
        try:
            async for text in control:
                try:
                    self._heard(control, json.loads(text))
                except (ValueError, KeyError, AttributeError) as error:
                    log.error("server says something that is no message", error=f"{type(error).__name__}: {error}")
        finally:
            # A stream lives no longer than the connection it was asked for on: nobody could hang it up.
            await _end({sender, *self._streams.values()})

    async def _send(self, control: ClientConnection) -> None:
        try:
            await self._send_reports(control)
        except (OSError, WebSocketException):
            return  # the reader of this connection sees it end, too
        except Exception:
            log.exception("reports cannot be sent")
            await control.close()

    async def _send_reports(self, control: ClientConnection) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            while self._sent < len(self._spool):
                report = self._spool[self._sent]
                self._sent += 1
                await control.send(
                    _text({"type": "report", "report": report.model_dump(mode="json", exclude_unset=True)})
                )

    def _heard(self, control: ClientConnection, message: dict[str, Any]) -> None:
        match message.get("type"):
            case "ack":
                while self._spool and self._spool[0].seq <= message["seq"]:
                    self._spool.popleft()
                    self._sent = max(0, self._sent - 1)
            case "assign":
                self._assign(Assignment.model_validate(message["assignment"]))
            case "call":
                self._spawn(self._answer(control, message))
            case "dial":
                ident = message["stream"]
                task = self._streams[ident] = self._spawn(self._stream(message))
                task.add_done_callback(lambda _: self._streams.pop(ident, None))
            case "hangup":
                if (stream := self._streams.get(message["stream"])) is not None:
                    stream.cancel()
            case other:
                log.warning("server says something unknown", type=other)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _answer(self, control: ClientConnection, message: dict[str, Any]) -> None:
        answer: dict[str, Any] = {"type": "answer", "id": message["id"]}
        try:
            answer["result"] = await self._call(message["method"], message["params"])
        except RoostError as error:
            answer["error"] = error.to_problem()
        except Exception as error:
            log.exception("call failed", method=message["method"])
            answer["error"] = InternalError(f"{type(error).__name__}: {error}").to_problem()
        try:
            await control.send(_text(answer))
        except (OSError, WebSocketException):
            return

    async def _stream(self, message: dict[str, Any]) -> None:
        socket: ClientConnection | None = None
        try:
            async with self._dial(f"/internal/v1/streams/{message['stream']}") as socket:
                try:
                    await self._serve(message["kind"], message["params"], socket)
                except asyncio.CancelledError:
                    await socket.close(GOING_AWAY)  # not to be taken for the end of what was streamed
                    raise
        except (OSError, TimeoutError, WebSocketException) as error:
            log.info("stream broke", kind=message["kind"], error=str(error))
        except Exception:
            log.exception("stream failed", kind=message["kind"])
        finally:
            if socket is not None:
                socket.transport.abort()  # hung up amid the goodbyes, it would stay open


def _text(message: dict[str, Any]) -> str:
    """JSON in which nothing is left that a database or an answer could not encode (bytes of file names, undecoded)."""
    return json.dumps(message, ensure_ascii=False).encode("utf-8", "replace").decode()


async def _end(tasks: Iterable[asyncio.Task[None]]) -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
