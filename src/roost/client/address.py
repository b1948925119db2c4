"""Where the server is and how to be let in, found without pydantic: the quick verbs cannot afford 0.2 s of settings.

`ROOST_SERVER_URL` and `ROOST_TOKEN` say it; without them it is the local server: its unix socket, where the kernel says
who we are, else its loopback port with the admin token, where we may read that.  The names, the defaults and the order
of sources (environment over TOML file) are those of `roost.settings`; tests/unit/test_client_address.py compares them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from roost.errors import InvalidConfig

DEFAULT_CONFIG = "/etc/roost/roost.toml"
DEFAULT_STATE_DIR = "/var/lib/roost"
DEFAULT_RUN_DIR = "/run/roost"
DEFAULT_PORT = 7766
SCHEMES = ("http", "https", "unix")


@dataclass(frozen=True)
class Address:
    """One server, as one can dial it."""

    socket: str | None = None
    """Path of a unix socket; None: TCP."""
    host: str = "localhost"
    port: int = DEFAULT_PORT
    tls: bool = False
    prefix: str = ""
    """Path before `/api/v1`, for a server behind a proxy; no slash at its end."""
    token: str | None = field(default=None, repr=False)
    is_default: bool = False
    """Nobody named a server: this is the host's own one, which `roost up` may start."""

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        standard = 443 if self.tls else 80
        return host if self.socket is not None or self.port == standard else f"{host}:{self.port}"

    def __str__(self) -> str:
        if self.socket is not None:
            return self.socket
        return f"{'https' if self.tls else 'http'}://{self.host_header}{self.prefix}"


@dataclass(frozen=True)
class LocalPaths:
    """The few settings of the local installation that a client needs."""

    state_dir: Path
    run_dir: Path
    port: int

    @property
    def socket(self) -> Path:
        return self.run_dir / "server" / "api.sock"

    @property
    def token_file(self) -> Path:
        return self.state_dir / "server" / "admin-token"

    @property
    def logs(self) -> Path:
        """Where processes started in the background write."""
        return self.state_dir / "logs"

    def pidfile(self, name: str) -> Path:
        """Of `server` or `node`."""
        return self.run_dir / name / f"{name}.pid"


def local_paths(environ: Mapping[str, str] | None = None) -> LocalPaths:
    """Read what a client needs of the local settings. Raises InvalidConfig."""
    env = os.environ if environ is None else environ
    table = _toml(env)
    section = table.get("server")
    port = env.get("ROOST_SERVER__PORT") or (section.get("port") if isinstance(section, dict) else None) or DEFAULT_PORT
    try:
        number = int(port)
    except (TypeError, ValueError) as error:
        raise InvalidConfig(f"setting server.port: {port!r} is not a port") from error
    return LocalPaths(
        Path(env.get("ROOST_STATE_DIR") or table.get("state_dir") or DEFAULT_STATE_DIR),
        Path(env.get("ROOST_RUN_DIR") or table.get("run_dir") or DEFAULT_RUN_DIR),
        number,
    )


def find_server(environ: Mapping[str, str] | None = None) -> Address:
    """The server to talk to. Raises InvalidConfig; whether it answers is not looked at."""
    env = os.environ if environ is None else environ
    token = env.get("ROOST_TOKEN") or None
    if url := env.get("ROOST_SERVER_URL"):
        return parse_server_url(url, token)
    paths = local_paths(env)
    if paths.socket.exists():
        return Address(socket=str(paths.socket), token=token, is_default=True)
    if token is None:
        try:
            token = paths.token_file.read_text().strip() or None
        except OSError:  # not there, or not ours: then the server says what it wants
            token = None
    return Address(host="127.0.0.1", port=paths.port, token=token, is_default=True)


def parse_server_url(url: str, token: str | None = None) -> Address:
    """Read `http(s)://host[:port][/prefix]` or `unix:///path`. Raises InvalidConfig."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InvalidConfig(f"ROOST_SERVER_URL: {error}") from error
    if parts.scheme not in SCHEMES or (parts.scheme != "unix" and not parts.hostname):
        raise InvalidConfig(
            "ROOST_SERVER_URL is not an address of a server",
            next_step="Write it as https://host, http://127.0.0.1:7766 or unix:///path/to/api.sock.",
        )
    if parts.scheme == "unix":
        return Address(socket=parts.path, token=token)
    tls = parts.scheme == "https"
    host = parts.hostname or ""
    return Address(host=host, port=port or (443 if tls else 80), tls=tls, prefix=parts.path.rstrip("/"), token=token)


def _toml(env: Mapping[str, str]) -> dict[str, Any]:
    path = Path(env.get("ROOST_CONFIG") or DEFAULT_CONFIG)
    if not path.exists():
        if env.get("ROOST_CONFIG"):
            raise InvalidConfig(f"ROOST_CONFIG names {path}, which does not exist")
        return {}
    import tomllib  # 20 ms, only where there is a file

    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidConfig(f"{path}: {error}") from error
