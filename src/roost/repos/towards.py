"""The way towards a URL: what git is given so that it reaches this repository, by this protocol, and nothing else.

Where a connection goes is decided here, once (net.egress): git gets the checked address and never resolves the name
itself.  Behind a proxy the proxy resolves, so only addresses written in the URL are checked, and the policy on names
is the proxy's.  A redirect is looked at by us: to the same host it is followed once, to another never.

What git reads on its way (a trusting configuration, the CAs, a copy of the known host keys) are files of its work
directory, which it owns: each is removed and made anew, without following links, before every use.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import re
import shutil
import socket
import ssl
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

from roost.errors import (
    AddressNotAllowed,
    InvalidConfig,
    InvalidRepository,
    RepoAuth,
    RepoNotFound,
    RepoUnreachable,
    RoostError,
)
from roost.net import egress
from roost.repos import ssh
from roost.repos.askpass import can_reach
from roost.repos.git import Git, User, proxies
from roost.repos.urls import RepoUrl, parse_url

_REDIRECT = re.compile(r"requested URL returned error: 30[12378]|unable to update url base from redirection")
_LOCATION = re.compile(r"Recv header:? +location: *(\S+)", re.IGNORECASE)
_SYSTEM_CA = "/etc/ssl/certs/ca-certificates.crt"


@dataclass(frozen=True, slots=True)
class Way:
    """How one URL is reached."""

    git: Git
    """With the configuration and environment for it."""
    url: str
    """What git is told to fetch: the URL, or (git://) the URL with the checked address in the name's place."""
    hosts_before: bytes | None = None
    """ssh only: the known host keys that git got."""


class Towards:
    """The ways of one clone, whose work directory is `work`."""

    def __init__(
        self,
        work: Path,
        git: Git,
        *,
        allow: list[str],
        trusted: bool,
        ca_file: str,
        known_hosts: Path,
        agent_socket: Path | None,
    ) -> None:
        self._work = work
        self._git = git
        self._allow = allow
        self._trusted = trusted
        self._ca_file = ca_file
        self._known_hosts = known_hosts
        self._agent_socket = agent_socket

    async def way(self, url: RepoUrl) -> Way:
        """git with what it needs to reach this URL, and nothing but this URL's protocol.

        Raises AddressNotAllowed, RepoUnreachable, RepoNotFound or RepoAuth (a file's), InvalidConfig, MissingProgram,
        InternalError.
        """
        git = replace(self._git, protocols=(url.scheme,), secrets=_secrets(url))
        if url.scheme == "file":
            config = self._trusting(_readable_source(url, git.user))
            return Way(replace(git, env={"GIT_CONFIG_GLOBAL": str(config)}), url.url)
        if url.scheme in ("http", "https"):
            return Way(await self._http(url, git), url.url)
        endpoint = await self._endpoint(url)
        if url.scheme == "git":
            # No option pins an address here: it stands in the name's place, and the name is sent as the host.
            named = replace(git, env={"GIT_OVERRIDE_VIRTUAL_HOST": f"{url.host}:{url.effective_port}"})
            return Way(named, replace(url, host=endpoint.addresses[0]).url)
        ssh.check_user(git.user)
        copy = self._work / "known_hosts"
        copy.unlink(missing_ok=True)
        hosts_before = ssh.copy_known_hosts(self._known_hosts, copy, git.user)
        command = ssh.command(
            url,
            endpoint.addresses[0],
            program=shutil.which("ssh", path="/usr/bin:/bin:/usr/local/bin"),
            known_hosts=copy,
            agent_socket=self._agent_socket,
        )
        return Way(replace(git, env={"GIT_SSH_COMMAND": command}), url.url, hosts_before)

    async def keep_new_hosts(self, way: Way) -> None:
        """Append the host keys that ssh saw first on this way, also after a failure, to the tenant's; else nothing."""
        if way.hosts_before is not None:
            await asyncio.to_thread(self._keep_hosts, way.hosts_before)

    async def redirection(self, url: RepoUrl, error: RoostError) -> RepoUrl | None:
        """Where the server sent us, if it did and it is the same host; AddressNotAllowed if it is another."""
        if url.scheme not in ("http", "https") or not _REDIRECT.search(str(error.details.get("stderr", ""))):
            return None
        git = (await self.way(url)).git
        trace = {"GIT_TRACE_CURL": "1", "GIT_TRACE_CURL_NO_DATA": "1", "GIT_TRACE_REDACT": "1"}
        probe = await git.run("ls-remote", "--", url.url, "HEAD", cwd=self._work, check=False, env=trace)
        location = _LOCATION.search(probe.stderr)
        target = location[1] if location else ""
        if target.startswith("/"):
            target = f"{url.scheme}://{url.host}{f':{url.port}' if url.port else ''}{target}"
        target = re.sub(r"/info/refs(?:\?.*)?$", "", target)
        try:
            moved = parse_url(target)
        except InvalidRepository:
            raise RepoNotFound(f"{url.url} redirects to something that is not a repository") from error
        upgraded = (url.scheme, moved.scheme) == ("http", "https") and not url.port and not moved.port
        same = (moved.scheme, moved.effective_port) == (url.scheme, url.effective_port) or upgraded
        if moved.host != url.host or not same:
            raise AddressNotAllowed(
                f"{url.url} redirects to {moved.url}; redirects to other hosts are not followed",
                next_step="Use that URL, if you trust it.",
            ) from error
        return replace(moved, credential=url.credential)

    def _trusting(self, source: Path) -> Path:
        """A configuration file that lets git read a repository of another owner.

        It must be a file: git takes configuration given by environment away from the upload-pack it starts there.
        """
        text = str(source).replace("\\", "\\\\").replace('"', '\\"')
        lines = "".join(f'\tdirectory = "{text}{suffix}"\n' for suffix in ("", "/.git"))
        return self._fresh_file("gitconfig", f"[safe]\n{lines}".encode())

    def _fresh_file(self, name: str, content: bytes) -> Path:
        """A file in the work directory that the git user can read and did not make."""
        target = self._work / name
        target.unlink(missing_ok=True)
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), 0o644)
        return target

    async def _http(self, url: RepoUrl, git: Git) -> Git:
        config: list[tuple[str, str]] = []
        proxy = proxy_for(url)
        if proxy is None:
            endpoint = await self._endpoint(url)
            config += [("http.curloptResolve", endpoint.curl_resolve), ("http.proxy", "")]
        else:
            self._check_literal(url)
            config.append(("http.proxy", proxy))
        if url.scheme == "https" and (bundle := await asyncio.to_thread(self._ca_bundle)) is not None:
            config.append(("http.sslCAInfo", str(bundle)))
        # Our own reading of NO_PROXY decided; curl must not read it differently.
        return replace(git, config=tuple(config), env={"no_proxy": "*" if proxy is None else ""})

    async def _endpoint(self, url: RepoUrl) -> egress.Endpoint:
        port = url.effective_port
        try:
            found = await egress.resolve(url.host, port, allow=self._allow, trusted=self._trusted)
            return await egress.first_reachable(found)
        except TimeoutError as error:
            raise RepoUnreachable(f"{url.host} did not answer on port {port} in time") from error
        except (socket.gaierror, UnicodeError) as error:
            raise RepoUnreachable(f"{url.host} has no address: {error}") from error
        except OSError as error:
            raise RepoUnreachable(f"{url.host} cannot be reached on port {port}: {error.strerror or error}") from error

    def _check_literal(self, url: RepoUrl) -> None:
        if self._trusted:
            return
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(url.host)
            egress.check(url.host, url.host, self._allow)
        if (url.host == "localhost" or url.host.endswith(".localhost")) and url.host not in self._allow:
            raise AddressNotAllowed(f"{url.host} is this host itself")

    def _ca_bundle(self) -> Path | None:
        """The CAs git shall trust, as one file it can read; None: git's own default."""
        base = os.environ.get("GIT_SSL_CAINFO") or os.environ.get("SSL_CERT_FILE")
        extra = self._ca_file
        if not base and not extra:
            return None
        base = base or ssl.get_default_verify_paths().cafile or _SYSTEM_CA
        content = b""
        for name in (base, extra):
            try:
                content += (Path(name).read_bytes() + b"\n") if name else b""
            except OSError as error:
                if name == extra:
                    raise InvalidConfig(f"[repos] ca_file: {name}: {error.strerror}") from error
        return self._fresh_file("ca.pem", content)

    def _keep_hosts(self, before: bytes) -> None:
        copy = self._work / "known_hosts"
        if copy.exists():
            ssh.keep_new_hosts(copy, before, self._known_hosts)


def proxy_for(url: RepoUrl, environ: Mapping[str, str] | None = None) -> str | None:
    """The proxy that an http(s) URL goes through, from the usual variables; None: directly."""
    found = proxies(os.environ if environ is None else environ)
    proxy = found.get(f"{url.scheme}_proxy") or found.get("all_proxy")
    if proxy is None:
        return None
    host = f"{url.host}:{url.port}" if url.port else url.host
    bypass = urllib.request.proxy_bypass_environment(host, {"no": found.get("no_proxy", "")})  # type: ignore[attr-defined]
    return None if bypass else proxy


def _secrets(url: RepoUrl) -> tuple[str, ...]:
    return (url.credential.username, url.credential.password) if url.credential else ()


def _readable_source(url: RepoUrl, user: User | None) -> Path:
    path = Path(unquote(url.path))
    if not path.exists():
        raise RepoNotFound(f"{path} does not exist")
    if not can_reach(path, user, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        raise RepoAuth(
            f"{path} cannot be read by the user that git runs as",
            next_step=f"Give the path itself ({path}): then it is read as you and sent.",
        )
    return path
