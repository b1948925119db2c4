"""up: a workspace from a repository, ready when it returns; the same again changes nothing.

What SRC is, in this order: a URL; a directory here (then its git repository is sent as a bundle, with what is not
committed); the name of a workspace.  The server never opens a path that a client names: `file://` too is read here, for
root of the server's own host; anywhere else the server decides by its settings.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from roost.cli.frame import Json, verb
from roost.cli.output import human_bytes, note, print_json
from roost.cli.values import parse_cpus, parse_size
from roost.errors import InvalidRepository, WorkspaceExists, WorkspaceNotFound

if TYPE_CHECKING:
    from roost.client import AsyncClient, LimitRequest, RepoRequest, Workspace
    from roost.repos.urls import RepoUrl

app = typer.Typer(rich_markup_mode=None)


@dataclass(frozen=True)
class Source:
    """What a workspace is to be made of."""

    repo_name: str
    workspace_name: str
    url: str | None
    """Of the repository, or of a local one's origin; without credentials."""
    sent_url: str | None = None
    """What the server is to clone; None: it gets a bundle."""
    path: Path | None = None
    """Read here."""

    def is_of(self, workspace: Workspace) -> bool:
        """Whether a workspace was made from the same."""
        from roost.repos.urls import strip_credentials

        repo = workspace.repo
        if repo is None:
            return False
        theirs = strip_credentials(repo.url) if repo.url else None
        return repo.name == self.repo_name and theirs == self.url


@app.command()
@verb
def up(
    source: Annotated[str, typer.Argument(metavar="[SRC]", help="Git URL, local repository, or name.")] = ".",
    name: Annotated[str | None, typer.Option("--name", help="Name; default: the repository's.")] = None,
    image: Annotated[str | None, typer.Option("--image", help="Image; default: [workspaces] default_image.")] = None,
    branch: Annotated[str | None, typer.Option("--branch", "-b", help="Branch or tag to check out.")] = None,
    cpus: Annotated[float | None, typer.Option("--cpus", parser=parse_cpus, metavar="N", help="Cores; 0: all.")] = None,
    memory: Annotated[
        int | None, typer.Option("--memory", "-m", parser=parse_size, metavar="SIZE", help="As 4G; 0: no limit.")
    ] = None,
    disk: Annotated[
        int | None, typer.Option("--disk", parser=parse_size, metavar="SIZE", help="Of HOME, as 20G; 0: no limit.")
    ] = None,
    pids: Annotated[int | None, typer.Option("--pids", min=0, help="Processes; 0: no limit.")] = None,
    user: Annotated[str | None, typer.Option("--user", "-u", help="User of the image, or uid.")] = None,
    as_json: Json = False,
) -> None:
    """Make a workspace from a repository, or start one, and wait until it is ready."""
    from roost.cli.progress import interrupted_start, tell_start
    from roost.client import LimitRequest
    from roost.repos.urls import check_workspace_name

    if name is not None:
        check_workspace_name(name)
    wish = Wish(source, name, image, branch, user, LimitRequest(cpus, memory, disk, pids), as_json)
    try:
        workspace = asyncio.run(wish.fulfil())
    except KeyboardInterrupt:
        if wish.called is None:
            raise KeyboardInterrupt("interrupted; nothing was made") from None
        raise interrupted_start(wish.called) from None
    if as_json:
        print_json(workspace.document)
    else:
        tell_start(workspace)


@dataclass
class Wish:
    """One `roost up`."""

    source: str
    name: str | None
    image: str | None
    branch: str | None
    user: str | None
    limits: LimitRequest
    quiet: bool
    called: str | None = None
    """Name of the workspace, from when the server may know of it."""

    async def fulfil(self) -> Workspace:
        from roost.cli.background import ensure
        from roost.cli.progress import follow_start
        from roost.client import AsyncClient

        client = AsyncClient()
        found = await asyncio.to_thread(_read, self.source, client)  # before anything is started: it may be nonsense
        client = await ensure(client)
        name = self.name or (found.workspace_name if found is not None else self.source)
        return await follow_start(client, name, lambda: self._ask(client, name, found), quiet=self.quiet)

    async def _ask(self, client: AsyncClient, name: str, source: Source | None) -> Workspace:
        existing = await _existing(client, name)
        if source is None:
            if existing is None or self.name is not None:
                raise InvalidRepository(f"{self.source!r} is neither a repository nor the name of a workspace")
            return await self._start(client, existing)
        if existing is None:
            try:
                return await self._create(client, name, source)
            except WorkspaceExists:  # made by another `up` a moment ago, perhaps of the same
                existing = await client.workspace(name)
        if not source.is_of(existing):
            made_of = (existing.repo.url or existing.repo.name) if existing.repo is not None else "no repository"
            raise WorkspaceExists(f"{name!r} was made from {made_of}", details={"workspace": name, "repo": made_of})
        return await self._start(client, existing)

    async def _start(self, client: AsyncClient, existing: Workspace) -> Workspace:
        self.called = existing.name
        given = {"--image": self.image, "--branch": self.branch, "--user": self.user}
        ignored = [option for option, value in given.items() if value is not None]
        limits = self.limits
        ignored += (
            ["limits"] if (limits.cpus, limits.memory_bytes, limits.disk_bytes, limits.pids) != (None,) * 4 else []
        )
        if ignored:
            note(f"{existing.name} is there already; {', '.join(ignored)} of this command do not change it")
        return await client.request(existing.name, "start")

    async def _create(self, client: AsyncClient, name: str, source: Source) -> Workspace:
        repo = await self._repo(client, source)
        self.called = name  # from here on it may be there, whether we hear of it or not
        return await client.create(name, image=self.image, user=self.user, repo=repo, limits=self.limits)

    async def _repo(self, client: AsyncClient, source: Source) -> RepoRequest:
        from roost.client import RepoRequest

        if source.path is None:
            return RepoRequest(source.repo_name, url=source.sent_url, branch=self.branch)
        from roost.repos.bundle import make_bundle

        with tempfile.TemporaryDirectory(prefix="roost-up-") as work:
            out = Path(work) / "bundle"
            info = await asyncio.to_thread(make_bundle, source.path, out)
            for sentence in info.notes:
                note(sentence)
            if not self.quiet:
                changes = " with uncommitted changes" if info.has_changes else ""
                note(f"sending {source.path}{changes}, {human_bytes(out.stat().st_size)}")
            with out.open("rb") as file:
                upload = await client.upload(file)
        return RepoRequest(source.repo_name, url=source.url, upload=upload, branch=self.branch)


async def _existing(client: AsyncClient, name: str) -> Workspace | None:
    try:
        found = await client.workspace(name)
    except WorkspaceNotFound:
        return None
    return None if found.desired == "deleted" else found


def _read(text: str, client: AsyncClient) -> Source | None:
    """What SRC says; None: perhaps a name. Raises InvalidRepository and what reading a local repository raises."""
    from roost.repos.urls import LocalPath, parse

    parsed = parse(text)
    if isinstance(parsed, LocalPath):
        if parsed.path.is_dir():
            return _local(parsed.path, None)
        if parsed.explicit or "/" in text:
            raise InvalidRepository(f"{text} is not a directory here")
        return None
    if parsed.scheme == "file" and client.address.is_default and os.geteuid() == 0:
        return _local(_path_of(parsed), parsed.url)
    return Source(parsed.repo_name, parsed.workspace_name, parsed.url, sent_url=text)


def _path_of(url: RepoUrl) -> Path:
    from urllib.parse import unquote_to_bytes

    path = Path(os.fsdecode(unquote_to_bytes(url.path)))
    if not path.is_dir():
        raise InvalidRepository(f"{url} is not a directory here")
    return path


def _local(path: Path, origin: str | None) -> Source:
    from roost.repos.bundle import find_top
    from roost.repos.urls import LocalPath

    top = find_top(path)
    named = LocalPath(top, True)
    return Source(named.repo_name, named.workspace_name, origin or _origin(top), path=top)


def _origin(top: Path) -> str | None:
    """URL of the remote `origin`, without credentials; None when there is none, or it is a path of this machine."""
    import subprocess

    from roost.repos.urls import strip_credentials

    asked = subprocess.run(
        ["git", "-C", str(top), "config", "--get", "remote.origin.url"],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
    return strip_credentials(asked.stdout.decode(errors="replace").strip()) if asked.returncode == 0 else None
