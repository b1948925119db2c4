"""A relay for ssh-agents: git on the node signs with keys that stay on the caller's machine.

The node listens on a unix socket where its git's ssh expects an agent; each request travels to the CLI, which asks the
real agent.  Only two kinds of requests pass: "which keys are there" and "sign this".  Adding or removing keys, locking,
smartcards and extensions are answered with a failure here, so a node can use keys while a clone runs, and nothing else.

Wire format (draft-miller-ssh-agent): uint32 length, then the body, whose first byte is the type.  A body here is
without the length.  OpenSSH bounds messages at 256 KiB, so do we.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Final

import structlog

from roost.repos.askpass import bind_unix, peer_uid
from roost.repos.git import User

log = structlog.get_logger()

MESSAGE_MAX: Final = 256 << 10
SSH_AGENT_FAILURE: Final = 5
REQUEST_IDENTITIES: Final = 11
SIGN_REQUEST: Final = 13
EXTENSION: Final = 27
ALLOWED: Final = frozenset({REQUEST_IDENTITIES, SIGN_REQUEST})
FAILURE: Final = bytes([SSH_AGENT_FAILURE])

Ask = Callable[[bytes], Awaitable[bytes]]


class AgentRelay:
    """`async with AgentRelay(socket_path, ask, user=(uid, gid)):` the socket acts as an ssh-agent meanwhile.

    `ask` gets the body of a request and returns the body of the reply; whatever goes wrong in it is a failure for ssh.
    """

    def __init__(self, path: Path, ask: Ask, *, user: User | None = None, timeout_s: float = 60.0) -> None:
        self.path = path
        self._ask = ask
        self._user = user
        self._timeout_s = timeout_s
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._ended = False

    async def __aenter__(self) -> AgentRelay:
        self.path.unlink(missing_ok=True)
        listener = bind_unix(self.path.parent, self.path.name, self._user)
        self._server = await asyncio.start_unix_server(self._connected, sock=listener)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
        self._ended = True
        for task in tuple(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        self.path.unlink(missing_ok=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            if self._ended:  # accepted while we were ending
                return
            if self._user is not None and peer_uid(writer) not in (self._user[0], 0):
                return
            while (body := await read_message(reader)) is not None:
                write_message(writer, await self._reply(body))
                await writer.drain()
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            log.warning("ssh-agent relay: the connection ended badly", error=str(error))
        except asyncio.CancelledError:
            # Ours to end: only __aexit__ cancels this task, and it waits for it.
            return
        finally:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            self._connections.discard(task)

    async def _reply(self, body: bytes) -> bytes:
        if not body or body[0] not in ALLOWED:
            return FAILURE
        try:
            async with asyncio.timeout(self._timeout_s):
                reply = await self._ask(body)
        except TimeoutError:
            log.warning("ssh-agent relay: no answer in time", request=body[0])
            return FAILURE
        except Exception as error:  # `ask` is the transport of somebody else; ssh must get an answer all the same
            log.warning("ssh-agent relay: the request could not be passed on", request=body[0], error=repr(error))
            return FAILURE
        return reply if 0 < len(reply) <= MESSAGE_MAX else FAILURE


async def answer(body: bytes, socket_path: str, *, timeout_s: float = 60.0) -> bytes:
    """The caller's side: pass one request to the real agent; a failure body when it is refused or does not answer."""
    if not body or body[0] not in ALLOWED or len(body) > MESSAGE_MAX:
        return FAILURE
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_unix_connection(socket_path)
            write_message(writer, body)
            await writer.drain()
            return await read_message(reader) or FAILURE
    except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError):
        return FAILURE
    finally:
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def read_message(reader: asyncio.StreamReader) -> bytes | None:
    """The next body; None at the end of the stream, ValueError when its length is out of bounds."""
    try:
        header = await reader.readexactly(4)
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    (length,) = struct.unpack(">I", header)
    if not 0 < length <= MESSAGE_MAX:
        raise ValueError(f"an agent message of {length} bytes")
    return await reader.readexactly(length)


def write_message(writer: asyncio.StreamWriter, body: bytes) -> None:
    """Queue one body with its length in front."""
    writer.write(struct.pack(">I", len(body)) + body)
