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

Where a connection goes, and what git gets for it, is told in roost.repos.towards.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol

import structlog

from roost import faults
from roost.errors import (
    BadRef,
    CloneFailed,
    InternalError,
    InvalidConfig,
    RoostError,
)
from roost.repos import unbundle
from roost.repos.askpass import Askpass, can_reach
from roost.repos.git import Git, OnProgress, User
from roost.repos.tar import stream_tar
from roost.repos.towards import Towards
from roost.repos.urls import RepoUrl, allowed_protocols, check_protocol

__all__ = ["CloneRequest", "CloneResult", "clone", "discard", "stream_tar", "sweep"]

log = structlog.get_logger()

_MAKING: Final = ".making-"
_DONE: Final = "clone-"
_BRANCH = re.compile(r"(?![-/.])(?!.*(?:\.\.|@\{|//|\.lock$|[/.]$))[^\x00-\x20\x7f~^:?*\[\\]{1,255}")


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
        self._git = git
        self._settings = settings
        self._on_progress = on_progress
        self._towards = Towards(
            work,
            git,
            allow=net.allow,
            trusted=request.trusted,
            ca_file=settings.ca_file,
            known_hosts=request.known_hosts or staging / "known_hosts",
            agent_socket=agent_socket,
        )

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
            moved = await self._towards.redirection(url, error)
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
        way = await self._towards.way(url)
        git = way.git
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
                    way.url,
                    self._tree.name,
                    cwd=self._work,
                    what=f"cloning {url.url}",
                    on_progress=self._on_progress,
                )
        finally:
            await self._towards.keep_new_hosts(way)

    async def _fresh_tree(self) -> None:
        await asyncio.to_thread(shutil.rmtree, self._tree, ignore_errors=True)

    async def _output(self, git: Git, *args: str) -> str | None:
        return (await git.run(*args, cwd=self._tree, check=False)).text or None


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
