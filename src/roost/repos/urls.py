"""What people give to `roost up`: repository URLs and local paths, read strictly and without secrets left in them.

The invariants other modules rely on:

- A `RepoUrl` never begins with a dash in any part that reaches a command line, holds no control character, and has a
  host that is a plain name or address; so it is never taken for an option, and what we resolve is what git connects to.
- A password or token is in `RepoUrl.credential` and nowhere else: `url`, `str()` and `repr()` are free of it.  For
  http(s) the user name goes with it, because `https://TOKEN@host/` is how tokens are written.
- `repo_name` is a directory name that can lie in HOME: never hidden, so no repository can call itself `.ssh`.

The command line imports this cold: standard library and `roost.errors` only.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from roost.errors import InvalidName, InvalidRepository, ProtocolNotAllowed

SCHEMES: Final = ("https", "http", "ssh", "git", "file")
DEFAULT_PORTS: Final[Mapping[str, int]] = {"https": 443, "http": 80, "ssh": 22, "git": 9418}
RESERVED_NAMES: Final = frozenset({"ls", "show", "cancel", "rm"})
NAME_MAX: Final = 40

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_HELPER = re.compile(r"[A-Za-z0-9+.-]+::")
_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9_])?")
_IPV6 = re.compile(r"[0-9A-Fa-f:]+(?:\.[0-9.]+)?")
_USER = re.compile(r"[A-Za-z0-9_.+][A-Za-z0-9_.+-]{0,127}")
_SOURCE_MAX = 4096
_DIRECTORY_MAX = 100


@dataclass(frozen=True, slots=True)
class Credential:
    """User name and password (or token) for one host; masked wherever it is printed."""

    username: str = field(repr=False)
    password: str = field(repr=False)

    def __repr__(self) -> str:
        return "Credential(***)"

    __str__ = __repr__


@dataclass(frozen=True, slots=True)
class RepoUrl:
    """A repository on some host; `url` is what git gets, without credentials."""

    scheme: str
    host: str
    """Lower case, punycode; an IPv6 address without brackets; empty for file."""
    port: int | None
    path: str
    """As written, percent-encoding included; begins with `/` unless the URL was scp-like."""
    login: str | None = None
    """ssh only: the user to log in as."""
    credential: Credential | None = None
    scp_like: bool = False

    @property
    def url(self) -> str:
        """The URL without password, token or http user name."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        login = f"{self.login}@" if self.login else ""
        if self.scp_like:
            return f"{login}{host}:{self.path}"
        port = f":{self.port}" if self.port is not None else ""
        return f"{self.scheme}://{login}{host}{port}{self.path}"

    @property
    def effective_port(self) -> int:
        return self.port or DEFAULT_PORTS.get(self.scheme, 0)

    @property
    def repo_name(self) -> str:
        """A safe directory name from the last part of the path."""
        decoded = self.path if self.scp_like else unquote_to_bytes(self.path).decode("utf-8", "replace")
        return directory_name(decoded)

    @property
    def workspace_name(self) -> str:
        """The name a workspace made from this gets when none is given."""
        return workspace_name(self.repo_name)

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"RepoUrl({self.url!r}{', credential=***' if self.credential else ''})"


@dataclass(frozen=True, slots=True)
class LocalPath:
    """A path on the caller's machine; only the command line reads it."""

    path: Path
    explicit: bool
    """Written as a path (`.`, `./x`, `/x`, `~/x`); a bare word may be a workspace's name as well."""

    @property
    def repo_name(self) -> str:
        return directory_name(self.path.absolute().as_posix())

    @property
    def workspace_name(self) -> str:
        return workspace_name(self.repo_name)


def parse(source: str) -> RepoUrl | LocalPath:
    """Read what a person wrote; InvalidRepository says what is wrong with it."""
    if not source or source.isspace():
        raise InvalidRepository("an empty string names no repository")
    if source.startswith("-"):
        raise InvalidRepository(f"{source[:80]!r} looks like an option, not like a repository")
    if len(source) > _SOURCE_MAX:
        raise InvalidRepository(f"a repository URL has at most {_SOURCE_MAX} characters")
    if _has_control(source):
        raise InvalidRepository("the repository has control characters in it")
    if _HELPER.match(source):
        raise InvalidRepository("remote helpers (`transport::address`) are not supported")
    if match := _SCHEME.match(source):
        return _parse_url(match[1].lower(), source[match.end() :])
    if (scp := _parse_scp(source)) is not None:
        return scp
    explicit = source in (".", "..", "~") or source.startswith(("./", "../", "/", "~/"))
    return LocalPath(Path(source).expanduser() if source.startswith("~") else Path(source), explicit)


def parse_url(source: str) -> RepoUrl:
    """As `parse`, for places where a path on the caller's machine makes no sense (the API, a node)."""
    parsed = parse(source)
    if isinstance(parsed, LocalPath):
        raise InvalidRepository("a repository URL is needed here, not a path")
    return parsed


def check_protocol(url: RepoUrl, allowed: Iterable[str]) -> None:
    """ProtocolNotAllowed unless the URL's protocol is among those allowed."""
    names = tuple(allowed)
    if url.scheme not in names:
        raise ProtocolNotAllowed(
            f"{url.scheme} repositories are not allowed here, only {', '.join(names) or 'none'}",
            details={"protocol": url.scheme, "allowed": list(names)},
        )


def allowed_protocols(configured: Iterable[str], environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The protocols in force: `GIT_ALLOW_PROTOCOL` (colon separated) overrides the setting, as it does for git."""
    override = (os.environ if environ is None else environ).get("GIT_ALLOW_PROTOCOL")
    if override is None:
        return tuple(configured)
    return tuple(name for name in override.split(":") if name in SCHEMES)


def check_workspace_name(name: str) -> str:
    """The name itself; InvalidName when it breaks the rule of names or is a verb."""
    if not _NAME.fullmatch(name) or "--" in name:
        raise InvalidName(f"{name[:80]!r} is not a valid workspace name")
    if name in RESERVED_NAMES:
        raise InvalidName(f"{name!r} is a word of the command line", next_step="Choose another with --name.")
    return name


def workspace_name(text: str) -> str:
    """A valid workspace name close to any text."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    name = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:NAME_MAX].strip("-")
    if not name:
        return "workspace"
    return f"{name}-repo" if name in RESERVED_NAMES else name


def directory_name(path: str) -> str:
    """A visible, single directory name from the last part of a path, without `.git`."""
    parts = [part for part in unicodedata.normalize("NFC", path).split("/") if part not in ("", ".", "..")]
    if len(parts) > 1 and parts[-1].lower() == ".git":
        parts.pop()
    last = parts[-1] if parts else ""
    last = re.sub(r"[^\w.+-]+", "-", last)
    if last.lower().endswith(".git"):
        last = last[:-4]
    last = last.encode("utf-8", "ignore")[:_DIRECTORY_MAX].decode("utf-8", "ignore").lstrip(".-").rstrip(".-")
    return last or "repository"


def strip_credentials(text: str) -> str | None:
    """The URL of a remote as it may be stored: without credentials; None when it is no URL we know."""
    try:
        parsed = parse(text)
    except InvalidRepository:
        return None
    return parsed.url if isinstance(parsed, RepoUrl) else None


def _parse_url(scheme: str, rest: str) -> RepoUrl:
    if scheme in ("git+ssh", "ssh+git"):
        scheme = "ssh"
    if scheme not in SCHEMES:
        raise InvalidRepository(f"{scheme} is no protocol for repositories; known are {', '.join(SCHEMES)}")
    authority, slash, tail = rest.partition("/")
    path = slash + tail
    if "?" in authority or "#" in authority:
        raise InvalidRepository("the URL has no path")
    if _has_control(unquote_to_bytes(path).decode("utf-8", "surrogateescape")):
        raise InvalidRepository("the repository's path has control characters in it")
    if scheme == "file":
        if authority not in ("", "localhost"):
            raise InvalidRepository("a file URL has three slashes: file:///path")
        if path in ("", "/"):
            raise InvalidRepository("the file URL has no path")
        return RepoUrl("file", "", None, path)
    if not path.strip("/"):
        raise InvalidRepository("the URL has no path")
    if scheme in ("http", "https") and ("?" in path or "#" in path):  # tokens travel there; they would be stored
        raise InvalidRepository("a repository URL has no query and no fragment")
    userinfo, at, hostport = authority.rpartition("@")
    host, port = _host_and_port(hostport)
    login, credential = _userinfo(scheme, userinfo) if at else (None, None)
    return RepoUrl(scheme, host, port, _checked_path(path), login, credential)


def _parse_scp(source: str) -> RepoUrl | None:
    """`[user@]host:path`, where git too sees a host: a colon before the first slash."""
    match = re.match(r"(?:([^@/:\[\]]*)@)?(\[[^\]/]*\]|[^@/:\[\]]+):(.*)\Z", source)
    if match is None:
        if ":" in source.partition("/")[0]:
            raise InvalidRepository("that is neither a URL nor host:path")
        return None
    user, host_text, path = match.groups()
    host, _ = _host_and_port(host_text)
    login, _ = _userinfo("ssh", user) if user is not None else (None, None)
    if not path.strip("/"):
        raise InvalidRepository("there is no path after the host")
    return RepoUrl("ssh", host, None, _checked_path(path), login, None, scp_like=True)


def _checked_path(path: str) -> str:
    if path.startswith("-"):
        raise InvalidRepository("the repository's path begins with a dash")
    return path


def _host_and_port(text: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::([0-9]*))?", text)
    if match is None:  # not echoed: with a stray slash in a password this is a part of the password
        raise InvalidRepository("the URL's host cannot be read")
    host, digits = match[1], match[2]
    if host.startswith("["):
        host = host[1:-1].lower()
        if not _IPV6.fullmatch(host) or ":" not in host:
            raise InvalidRepository(f"{host[:80]!r} is not an IPv6 address")
    else:
        if not host.isascii():
            try:
                host = host.encode("idna").decode("ascii")
            except UnicodeError as error:
                raise InvalidRepository(f"{host[:80]!r} is not a host name") from error
        host = host.lower().removesuffix(".")  # one spelling, so that a pinned address is found under it
        if not _HOST.fullmatch(host) or ".." in host:
            raise InvalidRepository(f"{host[:80]!r} is not a host name" if host else "the URL has no host")
    port = int(digits) if digits and len(digits) <= 5 else None
    if digits and (port is None or not 1 <= port <= 65535):
        raise InvalidRepository(f"{digits[:20]} is not a port")
    return host, port


def _userinfo(scheme: str, text: str) -> tuple[str | None, Credential | None]:
    name, colon, secret = text.partition(":")
    try:
        username = unquote_to_bytes(name).decode("utf-8")
        password = unquote_to_bytes(secret).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRepository("the credentials in the URL are not UTF-8") from error
    if _has_control(username) or _has_control(password):
        raise InvalidRepository("the credentials in the URL have control characters in them")
    if scheme in ("http", "https"):
        return None, Credential(username, password) if username or password else None
    if scheme == "ssh":
        if colon:
            raise InvalidRepository("an ssh URL takes no password", next_step="Use a key: `ssh-add` and an ssh URL.")
        if not _USER.fullmatch(username):
            raise InvalidRepository("the user in the ssh URL is not a login name")
        return username, None
    raise InvalidRepository(f"a {scheme} URL takes no user")


def _has_control(text: str) -> bool:
    # Line and paragraph separators count: a terminal or a log may treat them as new lines.
    return any(unicodedata.category(char) == "Cc" or char in "\u2028\u2029" for char in text)


def file_url(path: Path) -> RepoUrl:
    """The file URL of an absolute path."""
    return RepoUrl("file", "", None, quote(path.absolute().as_posix(), safe="/"))
