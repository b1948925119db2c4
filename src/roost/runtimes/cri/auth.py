"""Registry credentials as `docker login` leaves them."""

from __future__ import annotations

import base64
import binascii
import json
import os
from pathlib import Path

import structlog

from roost.runtimes.protocol import ImageRef, RegistryAuth

log = structlog.get_logger()

_HUB = "https://index.docker.io/v1/"


def registry_host(ref: str) -> str:
    """Host (and port) of a reference, by docker's rule: the first part, if it looks like one, else Docker Hub."""
    first, slash, _ = ref.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        return "docker.io" if first == "index.docker.io" else first
    return "docker.io"


def docker_auth(ref: ImageRef, config: Path | None = None) -> RegistryAuth | None:
    """Credentials for the reference's registry from docker's config.json, None when there are none. Blocks.

    Default file: $DOCKER_CONFIG/config.json, else ~/.docker/config.json (the node runs as root).  Credential helper
    programs are not asked.  A file that cannot be read counts as none, with a warning.
    """
    if config is None:
        folder = os.environ.get("DOCKER_CONFIG")
        config = (Path(folder) if folder else Path.home() / ".docker") / "config.json"
    try:
        auths = json.loads(config.read_text()).get("auths", {})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        log.warning("docker's config.json cannot be read", file=str(config), error=str(error))
        return None
    host = registry_host(ref)
    keys = [host, f"https://{host}", f"http://{host}", f"https://{host}/v2/", f"https://{host}/v1/"]
    if host == "docker.io":
        keys = [_HUB, "index.docker.io", *keys]
    for key in keys:
        entry = auths.get(key) if isinstance(auths, dict) else None
        if isinstance(entry, dict) and (auth := _decode(entry)) is not None:
            return auth
    return None


def _decode(entry: dict[str, object]) -> RegistryAuth | None:
    user, password = entry.get("username"), entry.get("password")
    if isinstance(user, str) and isinstance(password, str) and user:
        return RegistryAuth(user, password)
    try:
        name, colon, secret = base64.b64decode(str(entry.get("auth", "")), validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return None
    return RegistryAuth(name, secret.rstrip("\0")) if colon and name else None
