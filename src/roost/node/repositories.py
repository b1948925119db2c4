"""Repositories for workspaces of this node: cloned here without privileges, then streamed into the container.

The clone never touches HOME from outside: the container's own user unpacks a tar beside the place and renames it there.
So it works on every runtime, no symlink in HOME can lead our root anywhere, and a repository is there whole or not at
all.  The sync service will put its ready copies behind the same `place`.
"""

from __future__ import annotations

import asyncio
import pwd
import secrets
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import httpx
import structlog

from roost import faults
from roost.errors import CloneFailed, HomeFull, NodeUnreachable, RoostError, StaleUpload
from roost.repos.agent import AgentRelay
from roost.repos.clone import CloneRequest, CloneResult, clone, discard, stream_tar, sweep
from roost.repos.git import OnProgress, Progress
from roost.repos.urls import parse_url
from roost.runtimes.protocol import TOOLS_DIR, Channel, ContainerUser, ExecSpec, Runtime
from roost.settings import Settings
from roost.workspaces.model import Assignment, UserFact

log = structlog.get_logger()

BUSYBOX = f"{TOOLS_DIR}/bin/busybox"
NOBODY = 65534
AGENT_FAILURE = b"\x05"
"""SSH_AGENT_FAILURE of the ssh-agent protocol."""
REFRESH_S = 60.0
EXISTS = 17
"""Exit code of the unpacking when something lies at the place already."""

# $1 the place, $2 the folder beside it.  Unpack, write out, rename; what an earlier try left beside is removed first.
UNPACK = f"""
set -e
bb={BUSYBOX}
[ -e "$1" ] && exit {EXISTS}
$bb rm -rf "$2"
$bb mkdir -p "${{1%/*}}" "$2"
$bb tar -xf - -C "$2"
$bb sync
[ -e "$1" ] && {{ $bb rm -rf "$2"; exit {EXISTS}; }}
$bb mv "$2" "$1"
"""


class NodeRepositories:
    """Clones and places; implements `roost.workspaces.start.Repositories`."""

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        self._settings = settings
        self._runtime = runtime
        self._staging = settings.node_state / "staging"
        self._user = _unprivileged(settings.server.user)

    async def open(self) -> None:
        """Make the staging directory; drop what a killed node left in it."""
        await asyncio.to_thread(_passable, self._staging)
        await sweep(self._staging, finished=True)
        for left in self._staging.glob("upload-*"):
            left.unlink()

    async def place(self, assignment: Assignment, user: UserFact, path: str, note: Callable[[str], None]) -> str:
        """See `roost.workspaces.start.Repositories.place`. Raises the errors of a clone, HomeFull, StaleUpload."""
        inside = user.container_user()
        if await self._run(assignment, inside, (BUSYBOX, "test", "-e", path)) == 0:
            note(f"{path} is there already; it is left as it is")
            return ""
        result = await self._clone(assignment, note)
        try:
            for remark in result.notes:
                note(remark)
            faults.point("repository.cloned")
            note(f"unpacking to {path}")
            await self._unpack(assignment, inside, result.path, path, note)
            faults.point("repository.placed")
        finally:
            await discard(result)
        return result.commit or ""

    async def _clone(self, a: Assignment, note: Callable[[str], None]) -> CloneResult:
        repo = a.spec.repo
        assert repo is not None
        note(f"cloning {repo.url or 'the repository that was sent'}")
        url = parse_url(repo.url) if repo.url else None
        if repo.upload is None:
            request = CloneRequest(url=url, branch=repo.branch, trusted=a.spec.trusted)
            return await self._run_clone(a, request, note)
        bundle = self._staging / f"upload-{secrets.token_hex(8)}"
        try:
            await self._fetch_upload(repo.upload, bundle)
            origin = url.url if url else None
            request = CloneRequest(bundle=bundle, origin_url=origin, branch=repo.branch, trusted=a.spec.trusted)
            return await self._run_clone(a, request, note)
        finally:
            await asyncio.to_thread(bundle.unlink, True)

    async def _run_clone(self, a: Assignment, request: CloneRequest, note: Callable[[str], None]) -> CloneResult:
        async def ask(body: bytes) -> bytes:
            async with self._http() as client:
                answer = await client.post(f"/internal/v1/agents/{a.workspace}", content=body)
                return answer.content if answer.status_code == 200 else AGENT_FAILURE

        lent = request.bundle is None and await self._agent_lent(a.workspace)
        # In the run directory, for sun_path holds 108 bytes; the relay gives the socket to the clone's user alone.
        socket = self._settings.node_run / "agents" / f"{secrets.token_hex(6)}.sock"
        await asyncio.to_thread(_passable, socket.parent)
        async with AgentRelay(socket, ask, user=self._user) if lent else nullcontext():
            return await clone(
                request,
                self._staging,
                user=self._user,
                settings=self._settings.repos,
                net=self._settings.net,
                agent_socket=socket if lent else None,
                on_progress=_milestones(note),
            )

    def _http(self) -> httpx.AsyncClient:
        transport = httpx.AsyncHTTPTransport(uds=str(self._settings.api_socket))
        return httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=httpx.Timeout(70.0))

    async def _agent_lent(self, workspace: str) -> bool:
        try:
            async with self._http() as client:
                answer = await client.get(f"/internal/v1/agents/{workspace}")
                return bool(answer.status_code == 200 and answer.json()["lent"])
        except httpx.HTTPError:
            return False

    async def _fetch_upload(self, ident: str, target: Path) -> None:
        try:
            async with self._http() as client, client.stream("GET", f"/internal/v1/uploads/{ident}") as answer:
                if answer.status_code != 200:
                    await answer.aread()
                    raise StaleUpload(f"the server has no upload {ident[:8]}… any more")
                with target.open("xb") as file:
                    async for piece in answer.aiter_bytes(1 << 20):
                        await asyncio.to_thread(file.write, piece)
        except httpx.HTTPError as error:
            raise NodeUnreachable(f"the server did not hand over the upload: {error}") from error
        await asyncio.to_thread(target.chmod, 0o644)

    async def _unpack(
        self, a: Assignment, user: ContainerUser, tree: Path, path: str, note: Callable[[str], None]
    ) -> None:
        beside = f"{path.rsplit('/', 1)[0]}/.roost-incoming-{a.workspace}"
        argv = (BUSYBOX, "sh", "-c", UNPACK, "unpack", path, beside)
        session = await self._runtime.exec(a.container, ExecSpec(argv, user, user.home, {}, stdin=True))
        said = bytearray()

        async def listen() -> None:
            async for channel, data in session.output():
                if channel is Channel.stderr and len(said) < 4096:
                    said.extend(data)

        listening = asyncio.create_task(listen(), name="unpack output")
        try:
            async for piece in stream_tar(tree):
                await session.write(piece)
            await session.close_stdin()
            code = await session.wait()
            await listening
        finally:
            listening.cancel()
            await session.close()
            await asyncio.gather(listening, return_exceptions=True)
        if code == 0:
            await self._refresh_index(a, user, path)
        if code == EXISTS:
            note(f"{path} appeared meanwhile; it is left as it is")
        elif code != 0:
            words = said.decode(errors="replace").strip()
            await self._run(a, user, (BUSYBOX, "rm", "-rf", beside))
            if "No space left" in words or "quota" in words.lower():
                raise HomeFull(f"the repository does not fit into HOME: {words[-300:]}")
            raise CloneFailed(f"the repository could not be unpacked into {path}: {words[-1000:]}")

    async def _refresh_index(self, a: Assignment, user: ContainerUser, path: str) -> None:
        """Spare the first `git status` from reading every file: their times are new. Without git inside: nothing."""
        argv = ("git", "-C", path, "-c", "core.fsmonitor=", "update-index", "-q", "--refresh")
        try:
            async with asyncio.timeout(REFRESH_S):
                await self._run(a, user, argv)
        except (RoostError, TimeoutError):
            return

    async def _run(self, a: Assignment, user: ContainerUser, argv: tuple[str, ...]) -> int:
        session = await self._runtime.exec(a.container, ExecSpec(argv, user, user.home))
        try:
            return await session.wait()
        finally:
            await session.close()


def _unprivileged(name: str) -> tuple[int, int]:
    """Whom clones run as: the server's user, else nobody; never root."""
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return NOBODY, NOBODY
    return (entry.pw_uid, entry.pw_gid) if entry.pw_uid else (NOBODY, NOBODY)


def _passable(folder: Path) -> None:
    """Others may go through to what they know the name of, and see nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o711)


def _milestones(note: Callable[[str], None]) -> OnProgress:
    """Git's progress as a line each phase, when it is through."""

    def heard(progress: Progress) -> None:
        if progress.percent == 100 and not progress.remote:
            note(f"{progress.phase}: {progress.done}")

    return heard
