"""One clone, from a URL or from a bundle that a client sent, into a staging directory of the node.

    staging/                 root's, 0711; one node uses it at a time
      known_hosts            host keys seen so far, unless the request names another file
      .making-<random>/      the git user's, 0700: everything half-made
        home/                HOME of git, empty
        private/             askpass' socket, nonce and helper, while a password is needed
        tree/                the repository
      clone-<random>/        complete: renamed from tree/, then read only by root

A clone exists under its final name or not at all; after an error, a cancel or a timeout its `.making-` directory is
gone and no process of it is left.  After kill -9 of ours both may be left over: `sweep`, before the first clone of the
next run, ends processes that still work below the staging directory (they are known by their working directory, since
pids are not remembered), then removes what is half-made.

Root never writes below `.making-…/tree`: the git user parsed hostile bytes there and could have laid links.  It only
renames, removes and reads it without following links.

Where a connection goes is decided here, once (net.egress): git gets the checked address and never resolves the name
itself.  Behind a proxy the proxy resolves, so only addresses written in the URL are checked, and the policy on names
is the proxy's.  A redirect is looked at by us: to the same host it is followed once, to another never.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import re
import secrets
import shutil
import signal
import socket
import ssl
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import unquote

import structlog

from roost import faults
from roost.errors import (
    AddressNotAllowed,
    BadRef,
    CloneFailed,
    InternalError,
    InvalidConfig,
    InvalidRepository,
    RepoAuth,
    RepoNotFound,
    RepoUnreachable,
    RoostError,
)
from roost.net import egress
from roost.repos import ssh, unbundle
from roost.repos.askpass import Askpass, can_reach
from roost.repos.git import Git, OnProgress, User, proxies
from roost.repos.tar import stream_tar
from roost.repos.urls import RepoUrl, allowed_protocols, check_protocol, parse_url

__all__ = ["CloneRequest", "CloneResult", "clone", "discard", "stream_tar", "sweep"]

log = structlog.get_logger()

_MAKING: Final = ".making-"
_DONE: Final = "clone-"
_BRANCH = re.compile(r"(?![-/.])(?!.*(?:\.\.|@\{|//|\.lock$|[/.]$))[^\x00-\x20\x7f~^:?*\[\\]{1,255}")
_REDIRECT = re.compile(r"requested URL returned error: 30[12378]|unable to update url base from redirection")
_LOCATION = re.compile(r"Recv header:? +location: *(\S+)", re.IGNORECASE)
_SYSTEM_CA = "/etc/ssl/certs/ca-certificates.crt"


class RepoLimits(Protocol):
    """What a clone needs of roost.settings.RepoSettings."""

    @property
    def allow_protocols(self) -> Sequence[str]: ...
    @property
    def command_timeout_s(self) -> float: ...
    @property
    def progress_timeout_s(self) -> float: ...
    @property
    def ca_file(self) -> str: ...


class NetPolicy(Protocol):
    """What a clone needs of roost.settings.NetSettings."""

    @property
    def allow(self) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class CloneRequest:
    """A repository to clone: either `url`, or `bundle` (a file of ours with a client's bytes)."""

    url: RepoUrl | None = None
    bundle: Path | None = None
    origin_url: str | None = None
    """bundle only: overrides the origin that the bundle names."""
    branch: str | None = None
    """Branch or tag to check out; None: the one HEAD names."""
    trusted: bool = False
    """From the local administrator: private addresses and file URLs are allowed."""
    known_hosts: Path | None = None
    """The tenant's file of ssh host keys; None: `known_hosts` in the staging directory."""


@dataclass(frozen=True, slots=True)
class CloneResult:
    """A complete clone; whoever asked for it removes `path` (`discard`)."""

    path: Path
    commit: str | None
    """None: the repository is empty."""
    branch: str | None
    """None: HEAD is detached (a tag was asked for)."""
    bytes: int
    """Size of the history (packs), without the work tree."""
    seconds: float
    notes: tuple[str, ...] = ()
    """What is not there, as sentences for people (submodules, LFS, changes left out)."""


async def clone(
    request: CloneRequest,
    staging: Path,
    *,
    user: User | None,
    settings: RepoLimits,
    net: NetPolicy,
    agent_socket: Path | None = None,
    on_progress: OnProgress | None = None,
) -> CloneResult:
    """Clone into `staging`; root gives an unprivileged `user` (uid, gid) that can enter the staging directory.

    Raises what roost.repos.outcome knows, ProtocolNotAllowed, AddressNotAllowed, InvalidRepository, BadRef,
    RepoUnreachable, RepoTimeout.  Cancelling it ends git and removes what was made.
    """
    if (request.url is None) == (request.bundle is None):
        raise InternalError("a clone needs either a URL or a bundle")
    if request.branch is not None and not _BRANCH.fullmatch(request.branch):
        raise BadRef(f"{request.branch[:80]!r} is not a name that a branch can have")
    if user is not None and not can_reach(staging, user, os.X_OK):
        raise InternalError(f"the git user (uid {user[0]}) cannot enter {staging}")
    started = time.monotonic()
    work = await asyncio.to_thread(_make_work, staging, user)
    git = Git(
        home=work / "home",
        user=user,
        timeout_s=command_timeout(settings.command_timeout_s),
        progress_timeout_s=settings.progress_timeout_s,
    )
    try:
        faults.point("clone.made-work")
        making = _Making(request, work, staging, git, settings, net, agent_socket, on_progress)
        branch, commit, notes = await (making.from_url() if request.url else making.from_bundle())
        faults.point("clone.cloned")
        notes = (*notes, *await making.notes(commit))
        size = await asyncio.to_thread(_pack_bytes, work / "tree")
        final = staging / f"{_DONE}{work.name.removeprefix(_MAKING)}"
        (work / "tree").rename(final)
        faults.point("clone.renamed")
    finally:
        await _remove(work)
    return CloneResult(final, commit, branch, size, time.monotonic() - started, notes)


async def sweep(staging: Path, *, finished: bool = False) -> list[str]:
    """End what a killed process of ours left running here and remove what it left half-made; names what was removed.

    Only before the first clone of a process.  With `finished`, complete clones go too.
    """
    if not staging.is_dir():
        return []
    await asyncio.to_thread(_end_leftovers, staging.resolve())
    prefixes = (_MAKING, _DONE) if finished else (_MAKING,)
    names = sorted(entry.name for entry in staging.iterdir() if entry.name.startswith(prefixes))
    for name in names:
        await _remove(staging / name)
    return names


async def discard(result: CloneResult) -> None:
    """Remove a complete clone that is no longer needed."""
    await _remove(result.path)


def command_timeout(configured: float, environ: Mapping[str, str] | None = None) -> float:
    """Seconds for one command: `GIT_COMMAND_TIMEOUT` overrides the setting."""
    text = (os.environ if environ is None else environ).get("GIT_COMMAND_TIMEOUT", "")
    if not text:
        return configured
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise InvalidConfig(f"GIT_COMMAND_TIMEOUT={text!r} is not a number of seconds")
    return seconds


class _Making:
    def __init__(
        self,
        request: CloneRequest,
        work: Path,
        staging: Path,
        git: Git,
        settings: RepoLimits,
        net: NetPolicy,
        agent_socket: Path | None,
        on_progress: OnProgress | None,
    ) -> None:
        self._request = request
        self._work = work
        self._tree = work / "tree"
        self._staging = staging
        self._git = git
        self._settings = settings
        self._net = net
        self._agent_socket = agent_socket
        self._on_progress = on_progress
        self._address = ""
        self._hosts_before = b""

    async def from_bundle(self) -> tuple[str | None, str | None, tuple[str, ...]]:
        request = self._request
        assert request.bundle is not None
        restored = await unbundle.restore(
            self._git,
            request.bundle,
            self._tree,
            branch=request.branch,
            origin_url=request.origin_url,
            on_progress=self._on_progress,
        )
        return restored.branch, restored.commit, restored.notes

    async def from_url(self) -> tuple[str | None, str | None, tuple[str, ...]]:
        url = self._request.url
        assert url is not None
        allowed = allowed_protocols(self._settings.allow_protocols)
        check_protocol(url, (*allowed, "file") if self._request.trusted else allowed)
        try:
            await self._clone(url)
        except RoostError as error:
            moved = await self._redirection(url, error)
            if moved is None:
                raise
            check_protocol(moved, allowed)
            await self._fresh_tree()
            await self._clone(moved)
        own = replace(self._git, protocols=())
        if await self._output(own, "config", "remote.origin.url") != url.url:
            await own.run("config", "--", "remote.origin.url", url.url, cwd=self._tree)
        branch = await self._output(own, "symbolic-ref", "-q", "--short", "HEAD")
        commit = await self._output(own, "rev-parse", "-q", "--verify", "HEAD^{commit}")
        return branch, commit, ()

    async def notes(self, commit: str | None) -> list[str]:
        """What the clone lacks, in words."""
        if commit is None:
            return ["The repository is empty."]
        notes = []
        listed = await self._git.run("ls-tree", "-z", "--full-tree", commit, cwd=self._tree)
        if b"\t.gitmodules\0" in listed.stdout:
            notes.append("Submodules were not fetched; run `git submodule update --init` inside.")
        grep = ("grep", "-q", "-I", "-e", "filter=lfs", commit, "--", ":(glob)**/.gitattributes")
        if (await self._git.run(*grep, cwd=self._tree, check=False)).exit_code == 0:
            notes.append("Files in Git LFS are pointers; run `git lfs pull` inside.")
        return notes

    async def _clone(self, url: RepoUrl) -> None:
        git = await self._towards(url)
        arguments = ["clone", "--progress", "--template=", "--origin=origin", "--no-recurse-submodules", "--no-local"]
        if self._request.branch is not None:
            arguments.append(f"--branch={self._request.branch}")
        try:
            async with contextlib.AsyncExitStack() as stack:
                if url.credential is not None:
                    directory = self._work / "private"
                    askpass = await stack.enter_async_context(Askpass(directory, url, url.credential, git.user))
                    git = replace(git, env={**git.env, **askpass.environment})
                await git.run(
                    *arguments,
                    "--",
                    replace(url, host=self._address).url if url.scheme == "git" else url.url,
                    self._tree.name,
                    cwd=self._work,
                    what=f"cloning {url.url}",
                    on_progress=self._on_progress,
                )
        finally:
            if url.scheme == "ssh":
                await asyncio.to_thread(self._keep_hosts)

    async def _towards(self, url: RepoUrl) -> Git:
        """git with what it needs to reach this URL, and nothing but this URL's protocol."""
        git = replace(self._git, protocols=(url.scheme,), secrets=_secrets(url))
        if url.scheme == "file":
            return replace(git, env={"GIT_CONFIG_GLOBAL": str(self._trusting(_readable_source(url, git.user)))})
        if url.scheme in ("http", "https"):
            return await self._towards_http(url, git)
        endpoint = await self._endpoint(url)
        if url.scheme == "git":
            # No option pins an address here: `_clone` puts it in the name's place, and the name is sent as the host.
            self._address = endpoint.addresses[0]
            return replace(git, env={"GIT_OVERRIDE_VIRTUAL_HOST": f"{url.host}:{url.effective_port}"})
        ssh.check_user(git.user)
        copy = self._work / "known_hosts"
        copy.unlink(missing_ok=True)
        self._hosts_before = ssh.copy_known_hosts(self._known_hosts, copy, git.user)
        command = ssh.command(
            url,
            endpoint.addresses[0],
            program=shutil.which("ssh", path="/usr/bin:/bin:/usr/local/bin"),
            known_hosts=copy,
            agent_socket=self._agent_socket,
        )
        return replace(git, env={"GIT_SSH_COMMAND": command})

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

    async def _towards_http(self, url: RepoUrl, git: Git) -> Git:
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
            found = await egress.resolve(url.host, port, allow=self._net.allow, trusted=self._request.trusted)
            return await egress.first_reachable(found)
        except TimeoutError as error:
            raise RepoUnreachable(f"{url.host} did not answer on port {port} in time") from error
        except (socket.gaierror, UnicodeError) as error:
            raise RepoUnreachable(f"{url.host} has no address: {error}") from error
        except OSError as error:
            raise RepoUnreachable(f"{url.host} cannot be reached on port {port}: {error.strerror or error}") from error

    def _check_literal(self, url: RepoUrl) -> None:
        if self._request.trusted:
            return
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(url.host)
            egress.check(url.host, url.host, self._net.allow)
        if (url.host == "localhost" or url.host.endswith(".localhost")) and url.host not in self._net.allow:
            raise AddressNotAllowed(f"{url.host} is this host itself")

    def _ca_bundle(self) -> Path | None:
        """The CAs git shall trust, as one file it can read; None: git's own default."""
        base = os.environ.get("GIT_SSL_CAINFO") or os.environ.get("SSL_CERT_FILE")
        extra = self._settings.ca_file
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

    @property
    def _known_hosts(self) -> Path:
        return self._request.known_hosts or self._staging / "known_hosts"

    def _keep_hosts(self) -> None:
        copy = self._work / "known_hosts"
        if copy.exists():
            ssh.keep_new_hosts(copy, self._hosts_before, self._known_hosts)

    async def _redirection(self, url: RepoUrl, error: RoostError) -> RepoUrl | None:
        """Where the server sent us, if it did and it is the same host; AddressNotAllowed if it is another."""
        if url.scheme not in ("http", "https") or not _REDIRECT.search(str(error.details.get("stderr", ""))):
            return None
        git = await self._towards(url)
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

    async def _fresh_tree(self) -> None:
        await asyncio.to_thread(shutil.rmtree, self._tree, ignore_errors=True)

    async def _output(self, git: Git, *args: str) -> str | None:
        return (await git.run(*args, cwd=self._tree, check=False)).text or None


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


def _make_work(staging: Path, user: User | None) -> Path:
    work = staging / f"{_MAKING}{secrets.token_hex(6)}"
    work.mkdir(mode=0o700)
    (work / "home").mkdir(mode=0o700)
    if user is not None:
        os.chown(work / "home", *user)
        os.chown(work, *user)
    return work


async def _remove(path: Path) -> None:
    """rmtree that a cancel does not cut short: shielded, in a thread; it does not follow links (fd-based)."""
    job = asyncio.ensure_future(asyncio.to_thread(shutil.rmtree, path, ignore_errors=True))
    try:
        await asyncio.shield(job)
    except asyncio.CancelledError:
        await job
        raise
    if path.exists():
        log.warning("a directory could not be removed", path=str(path))


def _pack_bytes(tree: Path) -> int:
    size = 0
    with contextlib.suppress(OSError), os.scandir(tree / ".git" / "objects" / "pack") as entries:
        for entry in entries:
            size += entry.stat(follow_symlinks=False).st_size
    return size


def _end_leftovers(staging: Path) -> None:
    """SIGKILL every process whose working directory lies in the staging directory, until none is left (5 s)."""
    end = time.monotonic() + 5
    while found := [pid for pid in _processes_in(staging) if pid != os.getpid()]:
        if time.monotonic() > end:
            raise CloneFailed(f"processes of an earlier run do not end: {found}", next_step="Look at them with `ps`.")
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _processes_in(staging: Path) -> list[int]:
    found = []
    for name in os.listdir("/proc"):  # noqa: PTH208 - names only
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError):
            where = os.readlink(f"/proc/{name}/cwd").removesuffix(" (deleted)")  # noqa: PTH115 - may be deleted
            if where.startswith(f"{staging}/{_MAKING}"):
                found.append(int(name))
    return found
