"""Image references, as docker writes them.

The grammar is that of github.com/distribution/reference: `[host[:port]/]path[:tag][@algorithm:hex]`.  The first part is
a host if it has a dot or a colon, is `localhost`, or has an upper-case letter; else the image is on Docker Hub, whose
one-part names lie under `library/`.  Two further forms name files: `oci:DIR[:TAG]` and `docker-archive:FILE[:TAG]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import NewType

from roost.errors import InvalidReference

Digest = NewType("Digest", str)
"""`sha256:<64 hex digits>`"""

DOCKER_HUB = "docker.io"
_DOCKER_HUB_API = "registry-1.docker.io"
_DOCKER_HUB_ALIASES = frozenset({DOCKER_HUB, "index.docker.io", _DOCKER_HUB_API})
_PATH_MAX = 255

_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]+\])(?::[0-9]{{1,5}})?", re.ASCII)
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_PATH = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*", re.ASCII)
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_HEX64 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True)
class Reference:
    """An image in a registry; normalized: host explicit, and a tag or a digest (or both: the digest decides)."""

    host: str
    """`name[:port]`, Docker Hub as docker.io."""
    path: str
    tag: str = ""
    digest: Digest | None = None

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.host}/{self.path}{tag}{digest}"

    @property
    def familiar(self) -> str:
        """The short form that people write: `debian:12` for docker.io/library/debian:12."""
        text = str(self)
        if self.host == DOCKER_HUB:
            text = text.removeprefix(f"{DOCKER_HUB}/").removeprefix("library/")
        return text

    @property
    def selector(self) -> str:
        """What comes after /manifests/: the digest where there is one."""
        return self.digest or self.tag

    @property
    def api_host(self) -> str:
        """Where the registry's API is: differs from the host for Docker Hub only."""
        return _DOCKER_HUB_API if self.host == DOCKER_HUB else self.host

    def with_digest(self, digest: Digest) -> Reference:
        return Reference(self.host, self.path, self.tag, digest)


@dataclass(frozen=True)
class LayoutReference:
    """An image in an OCI layout: a directory with index.json and blobs/."""

    directory: Path
    tag: str = ""
    """Its `org.opencontainers.image.ref.name`; empty: the only image there."""

    def __str__(self) -> str:
        return f"oci:{self.directory}" + (f":{self.tag}" if self.tag else "")


@dataclass(frozen=True)
class ArchiveReference:
    """An image in a tar file as `docker save` writes it."""

    file: Path
    tag: str = ""
    """`name:tag` inside; empty: the only image there."""

    def __str__(self) -> str:
        return f"docker-archive:{self.file}" + (f":{self.tag}" if self.tag else "")


AnyReference = Reference | LayoutReference | ArchiveReference


def parse(text: str) -> AnyReference:
    """Read any form of reference. Raises InvalidReference, saying which part is wrong."""
    for prefix, make in (("oci:", _layout), ("docker-archive:", _archive)):
        if text.startswith(prefix):
            return make(text.removeprefix(prefix), text)
    return parse_remote(text)


def parse_remote(text: str) -> Reference:
    """Read and normalize a reference to a registry. Raises InvalidReference, saying which part is wrong."""
    rest = text
    if not rest:
        raise InvalidReference("the image reference is empty")
    if "://" in rest:
        raise InvalidReference(f"{text!r}: leave out the {rest.split('://', 1)[0]}://")
    digest: Digest | None = None
    if "@" in rest:
        rest, _, found = rest.partition("@")
        if not _DIGEST.fullmatch(found):
            raise InvalidReference(f"{text!r}: {found!r} is not sha256: and 64 hexadecimal digits")
        digest = Digest(found)
    first, slash, remainder = rest.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost" or first.lower() != first):
        host, rest = first, remainder
        if not _HOST.fullmatch(host) or not _valid_port(host):
            raise InvalidReference(f"{text!r}: {host!r} is not a registry's host")
    else:
        host = DOCKER_HUB
    path, colon, tag = rest.partition(":")
    if colon and not _TAG.fullmatch(tag):
        raise InvalidReference(f"{text!r}: {tag!r} is not a tag")
    if host in _DOCKER_HUB_ALIASES:
        host = DOCKER_HUB
        if "/" not in path:
            if _HEX64.fullmatch(path):
                raise InvalidReference(f"{text!r} is an image id, not a name", next_step="Name the image with its tag.")
            path = f"library/{path}"
    if not _PATH.fullmatch(path) or len(path) > _PATH_MAX:
        why = " (lower case only)" if path.lower() != path else ""
        raise InvalidReference(f"{text!r}: {path!r} is not a repository name{why}")
    return Reference(host, path, tag or ("" if digest else "latest"), digest)


def is_loopback(host: str) -> bool:
    """Whether `host[:port]` is this machine by name or number (no look-up)."""
    name = host.rsplit(":", 1)[0] if re.search(r":\d+$", host) else host
    name = name.strip("[]")
    if name == "localhost":
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


def is_plain_http(host: str, plain_http: Iterable[str] = ()) -> bool:
    """Whether a registry is spoken to without TLS: loopback, and hosts listed (`host`: any port)."""
    bare = re.sub(r":\d+$", "", host)
    return is_loopback(host) or any(entry in (host, bare) for entry in plain_http)


def _valid_port(host: str) -> bool:
    found = re.search(r":(\d+)$", host)
    return found is None or 0 < int(found[1]) < 65536


def _split_file(rest: str, text: str) -> tuple[Path, str]:
    name, _, tag = rest.partition(":")
    if not name:
        raise InvalidReference(f"{text!r} names no file")
    return Path(name), tag


def _layout(rest: str, text: str) -> LayoutReference:
    directory, tag = _split_file(rest, text)
    if tag and not _TAG.fullmatch(tag):
        raise InvalidReference(f"{text!r}: {tag!r} is not a tag")
    return LayoutReference(directory, tag)


def _archive(rest: str, text: str) -> ArchiveReference:
    file, tag = _split_file(rest, text)
    return ArchiveReference(file, str(parse_remote(tag)) if tag else "")
