"""Containers that are entries of a dictionary, volumes that are directories, commands that are local processes.

What is true to life: states and their order, idempotence, errors, labels, logs per start, exec with its streams,
signals, terminal and exit codes, tools beside an image and a volume.  What is not: a command sees this host's files,
its working directory alone is the container's (a mount's target or the container's own directory), and it runs as
whoever we are.

For tests: `add_image`, `say`, `crash`, `oom`, `fail_next`, `hold`, `engine_down`, `calls`, `tools`.
"""

from __future__ import annotations

import asyncio
import builtins
import os
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path, PurePosixPath

from roost.errors import (
    ContainerNotFound,
    EngineFailed,
    EngineUnreachable,
    ExecFailed,
    ExecNotExecutable,
    ExecNotFound,
    ImageNotFound,
    VolumeNotFound,
    WorkspaceNotRunning,
)
from roost.runtimes.fake.session import FakeSession
from roost.runtimes.programs import run_tool
from roost.runtimes.protocol import (
    Channel,
    ContainerId,
    ContainerSpec,
    ContainerState,
    ContainerStats,
    ContainerStatus,
    ExecSession,
    ExecSpec,
    ImageDigest,
    ImageInfo,
    ImageRef,
    LogLine,
    RegistryAuth,
    RuntimeEvent,
    Tool,
    ToolResult,
    VolumeInfo,
    VolumeName,
)

_POLL_S = 0.02
_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

ToolFake = Callable[[Tool, ImageInfo, VolumeName | None], ToolResult | Awaitable[ToolResult]]


@dataclass
class _Container:
    spec: ContainerSpec
    state: ContainerState = ContainerState.created
    exit_code: int | None = None
    reason: str = ""
    started_at: float | None = None
    log: list[LogLine] = field(default_factory=list)
    sessions: set[FakeSession] = field(default_factory=set)

    def status(self) -> ContainerStatus:
        return ContainerStatus(
            self.spec.container,
            self.state,
            dict(self.spec.labels),
            self.exit_code,
            self.reason,
            self.started_at,
        )


@dataclass
class _Volume:
    path: Path
    limit_bytes: int
    labels: Mapping[str, str]
    trashed_at: float | None = None


class FakeRuntime:
    """`Runtime` (see the protocol) in memory. `root`: a directory of the test's own."""

    name = "fake"

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[tuple[str, str]] = []
        """What was asked of it: method and name (container, volume, image), in order."""
        self.engine_down = False
        """While true, every call raises EngineUnreachable and event streams end with it."""
        self.tools: dict[str, ToolFake] = {}
        """By module: what answers instead of running it."""
        self._images: dict[ImageRef, ImageInfo] = {}
        self._registry: dict[ImageRef, ImageInfo] = {}
        self._containers: dict[ContainerId, _Container] = {}
        self._logs: dict[ContainerId, list[list[LogLine]]] = defaultdict(list)
        self._volumes: dict[VolumeName, _Volume] = {}
        self._failures: dict[str, list[Exception]] = defaultdict(list)
        self._holds: dict[str, list[asyncio.Event]] = defaultdict(list)
        self._listeners: set[asyncio.Queue[RuntimeEvent]] = set()

    # what tests do to it

    def add_image(
        self,
        ref: str,
        *,
        user: str = "",
        env: tuple[str, ...] = (),
        labels: Mapping[str, str] | None = None,
        present: bool = True,
        content: str = "",
    ) -> ImageInfo:
        """An image, here or (`present=False`) in the registry only; its digest follows from `ref` and `content`."""
        digest = ImageDigest("sha256:" + sha256(f"{ref}\0{content}".encode()).hexdigest())
        info = ImageInfo(ImageRef(ref), digest, 1 << 20, env, user, "", dict(labels or {}))
        self._registry[info.ref] = info
        if present:
            self._images[info.ref] = info
        self.image_root(info).mkdir(parents=True, exist_ok=True)
        return info

    def image_root(self, image: ImageInfo) -> Path:
        """The directory that tools see as the image; tests put files there."""
        return self.root / "images" / image.digest.removeprefix("sha256:")[:16]

    def volume_path(self, name: VolumeName) -> Path:
        """Raises VolumeNotFound."""
        volume = self._volumes.get(name)
        if volume is None or volume.trashed_at is not None:
            raise VolumeNotFound(f"no volume {name}")
        return volume.path

    def say(self, container: ContainerId, text: str, channel: Channel = Channel.stdout) -> None:
        """A line of PID 1's output."""
        self._containers[container].log.append(LogLine(time.time(), channel, text))

    def crash(self, container: ContainerId, exit_code: int = 137, reason: str = "Error") -> None:
        """PID 1 dies by itself."""
        self._end(self._containers[container], exit_code, reason)

    def oom(self, container: ContainerId) -> None:
        self.crash(container, 137, "OOMKilled")

    def lose(self, container: ContainerId) -> None:
        """The engine forgets the container, as after a crash of its helper: state unknown."""
        self._containers[container].state = ContainerState.unknown
        self._tell(container)

    def fail_next(self, method: str, error: Exception, times: int = 1) -> None:
        """The next calls of that method raise this, and do nothing."""
        self._failures[method].extend([error] * times)

    def hold(self, method: str) -> asyncio.Event:
        """The next call of that method waits, before it does anything, until this is set."""
        event = asyncio.Event()
        self._holds[method].append(event)
        return event

    async def _enter(self, method: str, name: str = "") -> None:
        self.calls.append((method, name))
        if self._holds[method]:
            await self._holds[method].pop(0).wait()
        await asyncio.sleep(0)
        if self.engine_down:
            raise EngineUnreachable("the engine is down (a test said so)")
        if self._failures[method]:
            raise self._failures[method].pop(0)

    # engine

    async def check(self) -> None:
        await self._enter("check")

    async def recover(self) -> None:
        await self._enter("recover")

    async def close(self) -> None:
        for container in self._containers.values():
            for session in list(container.sessions):
                await session.close()

    # images

    async def image(self, ref: ImageRef) -> ImageInfo | None:
        await self._enter("image", ref)
        return self._images.get(ref)

    async def images(self) -> builtins.list[ImageInfo]:
        await self._enter("images")
        return list(self._images.values())

    async def pull(self, ref: ImageRef, auth: RegistryAuth | None = None) -> ImageInfo:
        await self._enter("pull", ref)
        info = self._registry.get(ref)
        if info is None:
            raise ImageNotFound(f"the registry has no {ref}")
        self._images[ref] = info
        return info

    # volumes

    async def create_volume(self, name: VolumeName, limit_bytes: int, labels: Mapping[str, str]) -> bool:
        await self._enter("create_volume", name)
        volume = self._volumes.get(name)
        if volume is not None:
            if volume.trashed_at is not None:
                raise EngineFailed(f"a volume {name} is in the trash", next_step="Restore or purge it first.")
            volume.limit_bytes, volume.labels = limit_bytes, dict(labels)
            return False
        path = self.root / "volumes" / name
        path.mkdir(parents=True)
        self._volumes[name] = _Volume(path, limit_bytes, dict(labels))
        return True

    async def volumes(self) -> builtins.list[VolumeInfo]:
        await self._enter("volumes")
        return [
            VolumeInfo(name, None, volume.limit_bytes, volume.trashed_at)
            for name, volume in sorted(self._volumes.items())
        ]

    async def trash_volume(self, name: VolumeName) -> None:
        await self._enter("trash_volume", name)
        volume = self._volumes.get(name)
        if volume is not None and volume.trashed_at is None:
            volume.trashed_at = time.time()

    async def restore_volume(self, name: VolumeName) -> None:
        await self._enter("restore_volume", name)
        if name not in self._volumes:
            raise VolumeNotFound(f"no volume {name}")
        self._volumes[name].trashed_at = None

    async def purge_volume(self, name: VolumeName) -> None:
        await self._enter("purge_volume", name)
        volume = self._volumes.get(name)
        if volume is not None and volume.trashed_at is not None:
            shutil.rmtree(volume.path)
            del self._volumes[name]

    async def run_tool(
        self, tool: Tool, image: ImageInfo, volume: VolumeName | None = None, *, timeout_s: float = 600.0
    ) -> ToolResult:
        await self._enter("run_tool", tool.module)
        if all(known.digest != image.digest for known in self._images.values()):
            raise ImageNotFound(f"image {image.ref} is not here")
        paths = {"{image}": str(self.image_root(image))}
        if volume is not None:
            paths["{volume}"] = str(self.volume_path(volume))
        if tool.module in self.tools:
            answer = self.tools[tool.module](tool, image, volume)
            return answer if isinstance(answer, ToolResult) else await answer
        args = list(tool.args)
        for key, value in paths.items():
            args = [arg.replace(key, value) for arg in args]
        return await run_tool([sys.executable], tool.module, args, timeout_s)

    # containers

    def _find(self, container: ContainerId) -> _Container:
        found = self._containers.get(container)
        if found is None:
            raise ContainerNotFound(f"no container {container}")
        return found

    def _running(self, container: ContainerId) -> _Container:
        found = self._find(container)
        if found.state is not ContainerState.running:
            raise WorkspaceNotRunning(f"{container} is not running")
        return found

    async def create(self, spec: ContainerSpec) -> None:
        await self._enter("create", spec.container)
        there = self._containers.get(spec.container)
        if there is not None:
            if dict(there.spec.labels) == dict(spec.labels) and there.state is not ContainerState.unknown:
                return
            raise EngineFailed(f"a container {spec.container} is there already", next_step="Delete it first.")
        if all(known.digest != spec.image.digest for known in self._images.values()):
            raise ImageNotFound(f"image {spec.image.ref} is no longer here")
        for mount in spec.mounts:
            self.volume_path(mount.volume)
        container = _Container(replace(spec, labels=dict(spec.labels)))
        self._containers[spec.container] = container
        self._logs[spec.container].append(container.log)

    async def start(self, container: ContainerId) -> None:
        await self._enter("start", container)
        found = self._find(container)
        if found.state is ContainerState.running:
            return
        if found.state is not ContainerState.created:
            raise EngineFailed(f"{container} has ended and cannot be started again", next_step="Delete it first.")
        found.state, found.started_at = ContainerState.running, time.time()
        (self.root / "containers" / container).mkdir(parents=True, exist_ok=True)
        self._tell(container)

    async def stop(self, container: ContainerId, grace_s: float) -> None:
        await self._enter("stop", container)
        found = self._containers.get(container)
        if found is not None and found.state is ContainerState.running:
            self._end(found, 0, "Completed")

    async def delete(self, container: ContainerId) -> None:
        await self._enter("delete", container)
        found = self._containers.get(container)
        if found is None:
            return
        if found.state is ContainerState.running:
            self._end(found, 137, "Error")
        del self._containers[container]
        shutil.rmtree(self.root / "containers" / container, ignore_errors=True)
        self._tell(container)

    def _end(self, container: _Container, exit_code: int, reason: str) -> None:
        container.state, container.exit_code, container.reason = ContainerState.exited, exit_code, reason
        for session in list(container.sessions):
            session.kill()
        self._tell(container.spec.container)

    async def status(self, container: ContainerId) -> ContainerStatus | None:
        await self._enter("status", container)
        found = self._containers.get(container)
        return found.status() if found else None

    async def list(self) -> builtins.list[ContainerStatus]:
        await self._enter("list")
        return [container.status() for container in self._containers.values()]

    async def stats(self, container: ContainerId) -> ContainerStats:
        await self._enter("stats", container)
        found = self._running(container)
        return ContainerStats(0.01, 1 << 20, 2 + len(found.sessions))

    # exec

    async def exec(self, container: ContainerId, spec: ExecSpec) -> ExecSession:
        await self._enter("exec", container)
        found = self._running(container)
        env = self._environment(found.spec, spec)
        cwd = self._directory(found.spec, spec.cwd)
        if not cwd.is_dir():
            raise ExecFailed(f"the working directory {spec.cwd} cannot be entered: no such directory")
        program = _program(spec.argv[0] if spec.argv else "", env.get("PATH", _DEFAULT_PATH))
        session = FakeSession(found.sessions.discard)
        try:
            await session.begin([program, *spec.argv[1:]], cwd, env, spec.tty, spec.stdin)
        except OSError as error:
            raise ExecNotExecutable(f"{spec.argv[0]}: {error.strerror}") from error
        found.sessions.add(session)
        return session

    @staticmethod
    def _environment(container: ContainerSpec, spec: ExecSpec) -> dict[str, str]:
        of_image = dict(item.partition("=")[::2] for item in container.image.env)
        env = {**of_image, **container.env, **spec.env}
        return {"PATH": _DEFAULT_PATH, **env}

    def _directory(self, spec: ContainerSpec, path: str) -> Path:
        for mount in sorted(spec.mounts, key=lambda mount: -len(mount.target)):
            try:
                inner = PurePosixPath(path).relative_to(mount.target)
            except ValueError:
                continue
            return self.volume_path(mount.volume) / inner
        return self.root / "containers" / spec.container / path.lstrip("/")

    # logs, events

    async def logs(
        self, container: ContainerId, *, follow: bool = False, previous: bool = False
    ) -> AsyncIterator[LogLine]:
        await self._enter("logs", container)
        logs, wanted = self._logs.get(container, []), 2 if previous else 1
        if len(logs) < wanted:
            raise ContainerNotFound(f"no log of {container} is here")
        log, sent = logs[-wanted], 0
        while True:
            now = self._containers.get(container)
            ended = (
                now is None or now.log is not log or now.state not in (ContainerState.created, ContainerState.running)
            )
            while sent < len(log):
                yield log[sent]
                sent += 1
            if not follow or previous or ended:
                return
            await asyncio.sleep(_POLL_S)

    async def events(self) -> AsyncIterator[RuntimeEvent]:
        queue: asyncio.Queue[RuntimeEvent] = asyncio.Queue()
        self._listeners.add(queue)
        try:
            await self._enter("events")
            while True:
                try:
                    async with asyncio.timeout(_POLL_S):
                        event = await queue.get()
                except TimeoutError:
                    if self.engine_down:
                        raise EngineUnreachable("the engine is down (a test said so)") from None
                    continue
                yield event
        finally:
            self._listeners.discard(queue)

    def _tell(self, container: ContainerId) -> None:
        for queue in self._listeners:
            queue.put_nowait(RuntimeEvent(container))


def _program(name: str, path: str) -> str:
    """Raises ExecNotFound, ExecNotExecutable."""
    if "/" in name:
        if not Path(name).exists():
            raise ExecNotFound(f"{name}: no such file")
        if not os.access(name, os.X_OK) or Path(name).is_dir():
            raise ExecNotExecutable(f"{name}: permission denied")
        return name
    found = shutil.which(name, path=path) if name else None
    if found is None:
        raise ExecNotFound(f"{name}: no such command in PATH")
    return found
