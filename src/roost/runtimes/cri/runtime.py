"""The CRI runtime: containers on a containerd of this host, HOMEs as directories of this host."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import structlog

from roost.errors import EngineUnreachable, MissingFeature, RoostError, VolumeNotFound
from roost.runtimes.cri import methods
from roost.runtimes.cri.config import CriConfig
from roost.runtimes.cri.containers import Containers
from roost.runtimes.cri.engine import Engine
from roost.runtimes.cri.events import Events
from roost.runtimes.cri.execs import Execs
from roost.runtimes.cri.images import Images
from roost.runtimes.cri.logs import Logs
from roost.runtimes.cri.podspec import log_name
from roost.runtimes.cri.proto import cri_pb2
from roost.runtimes.cri.views import Views
from roost.runtimes.protocol import (
    ContainerId,
    ContainerSpec,
    ContainerState,
    ContainerStats,
    ContainerStatus,
    ExecSession,
    ExecSpec,
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

log = structlog.get_logger()

_VOLUME_THREADS = 4
T = TypeVar("T")


class CriRuntime:
    """`Runtime` (see the protocol) on containerd.  Needs root, and containerd on this host: mounts, FIFOs, logs."""

    name = "cri"

    def __init__(self, config: CriConfig) -> None:
        self.config = config
        self._engine = Engine(config.socket, config.namespace)
        self._images = Images(config, self._engine)
        self._containers = Containers(config, self._engine)
        self._execs = Execs(config, self._engine, self._containers)
        self._views = Views(config, self._engine, self._images)
        self._logs = Logs(config.log_dir, self._runs)
        self._events = Events(self._engine, self._containers, config.namespace)
        self._threads = ThreadPoolExecutor(_VOLUME_THREADS, thread_name_prefix="volumes")

    async def check(self) -> None:
        answer = await self._engine.call(methods.STATUS, cri_pb2.StatusRequest())
        for condition in answer.status.conditions:
            if condition.status:
                continue
            why = condition.message or condition.reason
            if condition.type == "NetworkReady":
                raise MissingFeature(f"containerd has no network for containers: {why}")
            if condition.type == "RuntimeReady":
                raise EngineUnreachable(f"containerd is not ready: {why}")

    async def recover(self) -> None:
        """End and remove what an earlier process of ours left half-done: containers not yet started, execs, views.

        To be called once, when no other process of ours works on the same run_dir.
        """
        await self._containers.recover()
        await self._execs.recover()
        await self._views.recover()

    async def close(self) -> None:
        await self._execs.close()
        await self._engine.close()
        self._threads.shutdown(wait=False)

    # images

    async def image(self, ref: ImageRef) -> ImageInfo | None:
        return await self._images.get(ref)

    async def images(self) -> list[ImageInfo]:
        return await self._images.list()

    async def pull(self, ref: ImageRef, auth: RegistryAuth | None = None) -> ImageInfo:
        return await self._images.pull(ref, auth)

    # volumes

    async def create_volume(self, name: VolumeName, limit_bytes: int, labels: Mapping[str, str]) -> bool:
        def create() -> bool:
            store = self.config.volumes
            try:
                store.path(name)
                fresh = False
            except VolumeNotFound:
                fresh = True
            store.create(name, limit_bytes, labels)
            return fresh

        return await self._blocking(create)

    async def volumes(self) -> list[VolumeInfo]:
        return await self._blocking(self.config.volumes.list)

    async def trash_volume(self, name: VolumeName) -> None:
        await self._blocking(partial(self.config.volumes.trash, name))

    async def restore_volume(self, name: VolumeName) -> None:
        await self._blocking(partial(self.config.volumes.restore, name))

    async def purge_volume(self, name: VolumeName) -> None:
        await self._blocking(partial(self.config.volumes.purge, name))

    async def _blocking(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def run_tool(
        self, tool: Tool, image: ImageInfo, volume: VolumeName | None = None, *, timeout_s: float = 600.0
    ) -> ToolResult:
        return await self._views.run(tool, image, volume, timeout_s)

    # containers

    async def create(self, spec: ContainerSpec) -> None:
        await self._containers.create(spec)

    async def start(self, container: ContainerId) -> None:
        await self._containers.start(container)

    async def stop(self, container: ContainerId, grace_s: float) -> None:
        await self._containers.stop(container, grace_s)

    async def delete(self, container: ContainerId) -> None:
        await self._containers.delete(container)

    async def status(self, container: ContainerId) -> ContainerStatus | None:
        return await self._containers.status(container)

    async def list(self) -> list[ContainerStatus]:
        return await self._containers.all()

    async def stats(self, container: ContainerId) -> ContainerStats:
        return await self._containers.stats(container)

    async def exec(self, container: ContainerId, spec: ExecSpec) -> ExecSession:
        return await self._execs.start(container, spec)

    def logs(self, container: ContainerId, *, follow: bool = False, previous: bool = False) -> AsyncIterator[LogLine]:
        return self._logs.read(container, follow=follow, previous=previous)

    def events(self) -> AsyncIterator[RuntimeEvent]:
        return self._events.subscribe()

    async def _runs(self, container: ContainerId, start: str) -> bool:
        try:
            status = await self._containers.status(container)
        except RoostError as error:
            log.debug("followed container cannot be looked at", container=container, error=error.message)
            return True  # the engine is away, the container may well run
        return (
            status is not None
            and status.state in (ContainerState.created, ContainerState.running)
            and log_name(status.labels) == f"{start}.log"
        )
