"""The server's process: listeners first, then no more root, then serving."""

from __future__ import annotations

import grp
import os
import pwd
import socket
from pathlib import Path

import structlog
import uvicorn

from roost import statedirs
from roost.errors import MissingFeature, PortInUse
from roost.linux.claim import claim
from roost.logs import configure
from roost.server.app import create_app
from roost.server.peercred import HttpProtocol, WebSocketProtocol
from roost.settings import Settings, load

log = structlog.get_logger()

BACKLOG = 1024
GOODBYE_S = 2
"""Seconds open requests get when the server stops."""


class Server(uvicorn.Server):
    """uvicorn, ending the event streams before it waits for its connections."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        bus = getattr(self.config.loaded_app.state, "bus", None) if hasattr(self.config.loaded_app, "state") else None
        if bus is not None:
            bus.close()
        await super().shutdown(sockets)


def run() -> None:
    """Serve until SIGTERM or SIGINT. Raises AlreadyRunning, PortInUse, MissingFeature."""
    settings = load()
    configure(settings.log_level)
    statedirs.prepare(settings)
    with claim(settings.server_run, "server"):
        _serve(settings)


def _serve(settings: Settings) -> None:
    sockets = [_tcp(settings), _unix(settings.api_socket)]
    if os.geteuid() == 0:
        drop_privileges(settings.server.user)
    os.umask(0o077)
    config = uvicorn.Config(
        create_app(settings),
        http=HttpProtocol,
        ws=WebSocketProtocol,
        ws_max_size=4 << 20,
        ws_per_message_deflate=False,
        # No pings: the reader of a long output may pause for an hour (a pager), and could not answer them meanwhile.
        # Local peers end with their sockets; a node pings on its control connection by itself.
        ws_ping_interval=None,
        proxy_headers=False,
        server_header=False,
        access_log=False,
        log_config=None,
        lifespan="on",
        backlog=BACKLOG,
        timeout_graceful_shutdown=GOODBYE_S,
    )
    log.info("server starts", port=settings.server.port, socket=str(settings.api_socket), uid=os.geteuid())
    Server(config).run(sockets=sockets)


def _tcp(settings: Settings) -> socket.socket:
    host, port = settings.server.host, settings.server.port
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise PortInUse(
            f"{host}:{port} cannot be listened on: {error.strerror}",
            next_step="Stop the other process, or set [server] port (ROOST_SERVER__PORT).",
        ) from error
    return listener


def _unix(path: Path) -> socket.socket:
    # Everybody may connect; who is let in is decided by the kernel's word on the peer.
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    path.chmod(0o666)
    listener.listen(BACKLOG)
    return listener


def drop_privileges(user: str) -> None:
    """Become that user for good. Raises MissingFeature when the host has no such user."""
    try:
        entry = pwd.getpwnam(user)
    except KeyError as error:
        raise MissingFeature(
            f"the host has no user {user!r}", next_step="`make setup` makes it, or name another in [server] user."
        ) from error
    groups = [item.gr_gid for item in grp.getgrall() if user in item.gr_mem]
    os.setgroups(groups)
    os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
    os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
    os.environ["HOME"] = entry.pw_dir
    os.chdir("/")
