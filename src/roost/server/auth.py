"""Who is asking: peer credentials on the unix socket, else the admin token.  Users and scoped tokens come behind it."""

from __future__ import annotations

import hmac
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from roost.errors import HostNotAllowed, Unauthenticated
from roost.server.peercred import PREFIX

TOKEN_PREFIX = "roost_adm_"
LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})


@dataclass(frozen=True)
class Principal:
    """Whoever passed; `local_root` is root on the server's own host."""

    name: str
    local_root: bool


class Gatekeeper:
    """Decides who passes; knows the admin token and the names this server is called by."""

    def __init__(self, token: str, allowed_hosts: frozenset[str]) -> None:
        self._token = token
        self._hosts = LOOPBACK_NAMES | allowed_hosts

    def admit(self, connection: HTTPConnection) -> Principal:
        """Raises HostNotAllowed, Unauthenticated."""
        client = connection.client
        if client is not None and client.host.startswith(PREFIX):
            uid = int(client.host.removeprefix(PREFIX))
            if uid in (0, os.geteuid()):
                return Principal("root" if uid == 0 else "server", uid == 0)
        else:
            self.check_host(connection)
        scheme, _, given = connection.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._token.encode()):
            return Principal("admin", False)
        raise Unauthenticated("no credentials were sent" if not given else "the token is not valid")

    def check_host(self, connection: HTTPConnection) -> None:
        """Refuse a Host that is not ours: a page on a name that was rebound to loopback (DNS rebinding)."""
        host = connection.headers.get("host", "")
        name = host if host.endswith("]") else host.rsplit(":", 1)[0]
        if name.lower() not in self._hosts:
            raise HostNotAllowed(f"this server is not called {name!r}")


def admin_token(path: Path) -> str:
    """The admin token of this server, made at the first start with mode 0600."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        token = TOKEN_PREFIX + secrets.token_urlsafe(32)
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(token + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
    return token


def principal(connection: HTTPConnection) -> Principal:
    """FastAPI dependency: the caller, admitted."""
    gatekeeper: Gatekeeper = connection.app.state.gatekeeper
    return gatekeeper.admit(connection)


def node_only(connection: HTTPConnection) -> None:
    """FastAPI dependency: only the local node (root over the unix socket) may pass."""
    client = connection.client
    if client is None or client.host != f"{PREFIX}0":
        raise Unauthenticated("only a node may come here")


Caller = Annotated[Principal, Depends(principal)]
