"""ssh-agents of callers, lent to the clones that run on their behalf.

A caller's command line keeps a websocket open; a request of ssh on the node comes in, goes to the caller, who asks
the real agent, and the answer goes back.  No key and no socket ever leaves the caller's machine.
"""

from __future__ import annotations

import asyncio
import itertools
import struct

from fastapi import WebSocket, WebSocketDisconnect

from roost.errors import RepoAuth

ANSWER_TIMEOUT_S = 60.0
"""A key may ask its owner for a touch or a passphrase."""


class _Lender:
    def __init__(self, socket: WebSocket) -> None:
        self.socket = socket
        self.ids = itertools.count(1)
        self.asked: dict[int, asyncio.Future[bytes]] = {}


class Agents:
    """At most one lender a workspace: the newest."""

    def __init__(self) -> None:
        self._lenders: dict[str, _Lender] = {}

    async def lend(self, workspace: str, socket: WebSocket) -> None:
        """Serve a caller's websocket until it closes."""
        lender = self._lenders[workspace] = _Lender(socket)
        try:
            while True:
                message = await socket.receive_bytes()
                (number,) = struct.unpack_from(">I", message)
                future = lender.asked.pop(number, None)
                if future is not None and not future.done():
                    future.set_result(message[4:])
        except (WebSocketDisconnect, struct.error, KeyError):
            return
        finally:
            if self._lenders.get(workspace) is lender:
                del self._lenders[workspace]
            for future in lender.asked.values():
                future.cancel()

    def lent(self, workspace: str) -> bool:
        return workspace in self._lenders

    async def ask(self, workspace: str, body: bytes) -> bytes:
        """Ask the caller's agent. Raises RepoAuth when none is lent, or it does not answer."""
        lender = self._lenders.get(workspace)
        if lender is None:
            raise RepoAuth("no ssh-agent is lent to this workspace")
        number = next(lender.ids)
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        lender.asked[number] = future
        try:
            await lender.socket.send_bytes(struct.pack(">I", number) + body)
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await future
        except (TimeoutError, WebSocketDisconnect, RuntimeError, asyncio.CancelledError) as error:
            current = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and current is not None and current.cancelling():
                raise
            raise RepoAuth("the ssh-agent does not answer") from error
        finally:
            lender.asked.pop(number, None)
