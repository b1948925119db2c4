"""Who is at the other end of the unix socket: uvicorn's protocols with the kernel's word for it in the scope.

`scope["client"]` of a connection over the unix socket is `("uid:<uid>", <pid>)` from SO_PEERCRED (unix(7)); of one over
TCP it is address and port as always.  No header can set it: proxy headers are off.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any, cast

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

PREFIX = "uid:"


def peer_of(transport: asyncio.BaseTransport) -> tuple[str, int] | None:
    """`("uid:N", pid)` of a unix socket's peer; None for any other transport."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family != socket.AF_UNIX:
        return None
    pid, uid, _gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return f"{PREFIX}{uid}", pid


class HttpProtocol(H11Protocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.client = peer_of(transport) or self.client


class WebSocketProtocol(WebSocketsSansIOProtocol):
    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.client = peer_of(cast(asyncio.BaseTransport, transport)) or self.client

    def shutdown(self) -> None:
        if self.transport.is_closing():
            # The peer said goodbye and does not take our rest. uvicorn 0.54 would send a second close frame: an error
            # that ends its whole shutdown half-way, with the database open.
            self.transport.abort()
        else:
            super().shutdown()
