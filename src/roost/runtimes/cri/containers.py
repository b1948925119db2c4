"""Containers and their sandboxes.

Invariants
- What exists is what the engine lists under LABEL_CONTAINER; nothing is remembered here, so a new process of ours
  takes over whatever runs.
- A sandbox without a container is half-made: this process or an earlier one was killed between the two calls, or the
  engine was.  It is reported as a container in state `unknown` (so that whoever owns the name deletes it), and `create`
  removes it and begins anew.
- The engine reserves a name from before an object is listed until after it is gone; a call that was cut off in the
  middle goes on inside the engine.  "is reserved" is therefore waited for, not believed at once.
- A start that was cut off leaves a container that may yet come up, or fail in a moment.  A new process of ours does not
  wait to see which: `recover` removes what was made and does not run.
- One create or delete at a time for a name; different names go in parallel.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from typing import Any
from weakref import WeakValueDictionary

import structlog

from roost import faults
from roost.errors import (
    ContainerNotFound,
    EngineFailed,
    EngineTimeout,
    ImageNotFound,
    PoolFull,
    RoostError,
    WorkspaceNotRunning,
)
from roost.runtimes.cri import methods
from roost.runtimes.cri.config import CriConfig
from roost.runtimes.cri.engine import Engine, absent, said
from roost.runtimes.cri.podspec import (
    LABEL_CONTAINER,
    container_config,
    hosts_file,
    name_of,
    own_labels,
    sandbox_config,
)
from roost.runtimes.cri.proto import cri_pb2, tasks_pb2
from roost.runtimes.protocol import ContainerId, ContainerSpec, ContainerState, ContainerStats, ContainerStatus

log = structlog.get_logger()

_UNDER_WAY_S = 15.0
_UNDER_WAY = ("is reserved for", "in starting state", "in removing state", "not fully stopped")
"""containerd's words (pkg/cri) for: another call works on this."""
_HALF_MADE = "HalfMade"
_KILL_S = 30.0
"""Beyond the grace, for the engine to kill and reap."""

_STATES = {
    cri_pb2.CONTAINER_CREATED: ContainerState.created,
    cri_pb2.CONTAINER_RUNNING: ContainerState.running,
    cri_pb2.CONTAINER_EXITED: ContainerState.exited,
}


class Containers:
    def __init__(self, config: CriConfig, engine: Engine) -> None:
        self._config = config
        self._engine = engine
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def _lock(self, container: str) -> asyncio.Lock:
        lock = self._locks.get(container)
        if lock is None:
            lock = self._locks[container] = asyncio.Lock()
        return lock

    # what is there

    async def listed(self, container: str = "", *, engine_id: str = "") -> list[cri_pb2.Container]:
        """Containers of ours, of that name or engine's id if given."""
        request = cri_pb2.ListContainersRequest()
        if container:
            request.filter.label_selector[LABEL_CONTAINER] = container
        if engine_id:
            request.filter.id = engine_id
        answer = await self._engine.call(methods.LIST_CONTAINERS, request)
        return [found for found in answer.containers if name_of(found.labels)]

    async def _sandboxes(self, container: str = "") -> list[cri_pb2.PodSandbox]:
        request = cri_pb2.ListPodSandboxRequest()
        if container:
            request.filter.label_selector[LABEL_CONTAINER] = container
        answer = await self._engine.call(methods.LIST_POD_SANDBOX, request)
        return [found for found in answer.items if name_of(found.labels)]

    async def find(self, container: ContainerId) -> cri_pb2.Container:
        """Raises ContainerNotFound."""
        found = await self.listed(container)
        if not found:
            raise ContainerNotFound(f"no container {container}")
        return max(found, key=lambda item: item.created_at)

    async def running(self, container: ContainerId) -> cri_pb2.Container:
        """Raises ContainerNotFound, WorkspaceNotRunning."""
        found = await self.find(container)
        if found.state != cri_pb2.CONTAINER_RUNNING:
            raise WorkspaceNotRunning(f"{container} is not running")
        return found

    async def status(self, container: ContainerId) -> ContainerStatus | None:
        statuses = await self._statuses(container)
        return statuses[0] if statuses else None

    async def all(self) -> list[ContainerStatus]:
        return await self._statuses("")

    async def _statuses(self, container: str) -> list[ContainerStatus]:
        # Containers first: a sandbox made between the two answers would else look half-made.
        sandboxes = await self._sandboxes(container)
        containers = await self.listed(container)
        newest: dict[str, cri_pb2.Container] = {}
        for item in sorted(containers, key=lambda item: item.created_at):
            newest[item.labels[LABEL_CONTAINER]] = item
        statuses = list(await asyncio.gather(*(self._details(item) for item in newest.values())))
        for sandbox in sandboxes:
            name = ContainerId(sandbox.labels[LABEL_CONTAINER])
            if name not in newest and not self._lock(name).locked():
                newest[name] = cri_pb2.Container()
                statuses.append(
                    ContainerStatus(name, ContainerState.unknown, own_labels(sandbox.labels), reason=_HALF_MADE)
                )
        return [status for status in statuses if status is not None]

    async def _details(self, item: cri_pb2.Container) -> ContainerStatus | None:
        try:
            answer = await self._engine.call(
                methods.CONTAINER_STATUS, cri_pb2.ContainerStatusRequest(container_id=item.id)
            )
        except EngineFailed as error:
            if absent(error):
                return None
            raise
        status = answer.status
        state = _STATES.get(status.state, ContainerState.unknown)
        ended = state is ContainerState.exited
        return ContainerStatus(
            container=ContainerId(item.labels[LABEL_CONTAINER]),
            state=state,
            labels=own_labels(status.labels),
            exit_code=status.exit_code if ended else None,
            reason=(status.reason or status.message) if state is not ContainerState.running else "",
            started_at=status.started_at / 1e9 if status.started_at else None,
        )

    async def stats(self, container: ContainerId) -> ContainerStats:
        found = await self.running(container)
        try:
            usage, pids = await asyncio.gather(
                self._engine.call(methods.CONTAINER_STATS, cri_pb2.ContainerStatsRequest(container_id=found.id)),
                self._engine.call(methods.TASK_LIST_PIDS, tasks_pb2.ListPidsRequest(container_id=found.id)),
            )
        except EngineFailed as error:
            raise await self._gone(container, error) from error
        return ContainerStats(
            cpu_seconds=usage.stats.cpu.usage_core_nano_seconds.value / 1e9,
            memory_bytes=usage.stats.memory.working_set_bytes.value,
            pids=len(pids.processes),
        )

    async def _gone(self, container: ContainerId, error: EngineFailed) -> RoostError:
        """An engine's refusal, or that the container ended meanwhile if that is why."""
        try:
            await self.running(container)
        except (ContainerNotFound, WorkspaceNotRunning) as why:
            return why
        return error

    # what is done

    async def recover(self) -> None:
        """Remove what an earlier process of ours made and did not get to run."""
        created = {
            item.labels[LABEL_CONTAINER] for item in await self.listed() if item.state == cri_pb2.CONTAINER_CREATED
        }
        for status in await self.all():
            if status.container in created or status.reason == _HALF_MADE:
                log.info("half-made container removed", container=status.container, state=status.state)
                await self.delete(status.container)

    async def create(self, spec: ContainerSpec) -> None:
        name = spec.container
        async with self._lock(name):
            sandboxes, containers = await asyncio.gather(self._sandboxes(name), self.listed(name))
            if containers:
                newest = max(containers, key=lambda item: item.created_at)
                known = newest.state in _STATES
                if known and own_labels(newest.labels) == dict(spec.labels):
                    return
                raise EngineFailed(
                    f"a container {name} is there already, made for something else or in an unknown state",
                    next_step="Delete it first.",
                )
            for sandbox in sandboxes:
                log.info("half-made sandbox removed", container=name, sandbox=sandbox.id)
                await self._remove_sandbox(sandbox.id)
            await self._make(spec)

    async def _make(self, spec: ContainerSpec) -> None:
        config, name = self._config, spec.container
        volumes = await asyncio.to_thread(
            lambda: {mount.volume: config.volumes.path(mount.volume) for mount in spec.mounts}
        )
        await asyncio.to_thread(self._prepare, spec)
        pod = sandbox_config(config, spec)
        request = cri_pb2.RunPodSandboxRequest(config=pod, runtime_handler=config.runtime_handler)
        sandbox = await self._work(methods.RUN_POD_SANDBOX, request)
        try:
            faults.point("cri.create.sandbox")
            container = cri_pb2.CreateContainerRequest(
                pod_sandbox_id=sandbox.pod_sandbox_id,
                config=container_config(config, spec, volumes),
                sandbox_config=pod,
            )
            # The network's policy and the container come about side by side; nothing runs before both are there.
            guarded = asyncio.ensure_future(self._guard())
            try:
                await self._work(methods.CREATE_CONTAINER, container)
            finally:
                await guarded
            faults.point("cri.create.container")
        except BaseException as error:
            await _finish(self._undo(name, sandbox.pod_sandbox_id))
            if isinstance(error, EngineFailed) and "no space left on device" in said(error):
                raise PoolFull(f"no room for {name}: {said(error)}") from error
            if isinstance(error, EngineFailed) and absent(error) and "image" in said(error):
                raise ImageNotFound(
                    f"image {spec.image.ref} is no longer here: {said(error)}", next_step="Try again: it is pulled."
                ) from error
            raise

    async def _guard(self) -> None:
        if self._config.network_ready is not None:
            await self._config.network_ready()

    def _prepare(self, spec: ContainerSpec) -> None:
        (self._config.log_dir / spec.container).mkdir(parents=True, exist_ok=True)
        hosts = self._config.hosts(spec.container)
        hosts.parent.mkdir(parents=True, exist_ok=True)
        hosts.write_text(hosts_file(spec))
        if self._config.prepare_cgroup is not None:
            self._config.prepare_cgroup(self._config.cgroup(spec.container), spec.limits)

    async def _undo(self, name: ContainerId, sandbox: str) -> None:
        try:
            await self._remove_sandbox(sandbox)
            await self._remove_leftovers(name)
        except RoostError as error:
            # It stays visible as half-made, and the next create or delete removes it.
            log.warning("half-made sandbox stays", container=name, sandbox=sandbox, error=error.message)

    async def _work(
        self, method: methods.Method[methods.RequestT, methods.ResponseT], request: methods.RequestT
    ) -> methods.ResponseT:
        """A call that changes something; waits while one that was cut off is still at it inside the engine."""
        deadline = asyncio.get_running_loop().time() + _UNDER_WAY_S
        while True:
            try:
                return await self._engine.call(method, request, timeout_s=self._config.call_timeout_s)
            except EngineFailed as error:
                under_way = any(word in said(error) for word in _UNDER_WAY)
                if not under_way or asyncio.get_running_loop().time() > deadline:
                    raise
            await asyncio.sleep(0.1)

    async def start(self, container: ContainerId) -> None:
        async with self._lock(container):
            await self._start(container)

    async def _start(self, container: ContainerId) -> None:
        found = await self.find(container)
        if found.state == cri_pb2.CONTAINER_RUNNING:
            return
        if found.state != cri_pb2.CONTAINER_CREATED:
            raise EngineFailed(
                f"{container} has ended and cannot be started again", next_step="Delete it and create it anew."
            )
        try:
            await self._work(methods.START_CONTAINER, cri_pb2.StartContainerRequest(container_id=found.id))
        except EngineFailed as error:
            if (await self.find(container)).state != cri_pb2.CONTAINER_RUNNING:
                raise EngineFailed(f"{container} did not start: {said(error)}", details=error.details) from error
        faults.point("cri.start.started")

    async def stop(self, container: ContainerId, grace_s: float) -> None:
        for found in await self.listed(container):
            if found.state != cri_pb2.CONTAINER_RUNNING and found.state in _STATES:
                continue
            request = cri_pb2.StopContainerRequest(container_id=found.id, timeout=math.ceil(grace_s))
            try:
                await self._engine.call(methods.STOP_CONTAINER, request, timeout_s=math.ceil(grace_s) + _KILL_S)
            except EngineFailed as error:
                if not absent(error):
                    raise

    async def delete(self, container: ContainerId) -> None:
        async with self._lock(container):
            sandboxes, containers = await asyncio.gather(self._sandboxes(container), self.listed(container))
            for sandbox in sandboxes:
                await self._remove_sandbox(sandbox.id)
            alive = {sandbox.id for sandbox in sandboxes}
            for orphan in containers:
                if orphan.pod_sandbox_id not in alive:
                    await self._remove_container(orphan.id)
            faults.point("cri.delete.removed")
            await self._remove_leftovers(container)

    async def _remove_container(self, engine_id: str) -> None:
        try:
            await self._work(methods.REMOVE_CONTAINER, cri_pb2.RemoveContainerRequest(container_id=engine_id))
        except EngineFailed as error:
            if not absent(error):
                raise

    async def _remove_sandbox(self, sandbox: str) -> None:
        """Kill what runs in it, take its network down, forget it. Gone: no error."""
        try:
            await self._work(methods.STOP_POD_SANDBOX, cri_pb2.StopPodSandboxRequest(pod_sandbox_id=sandbox))
            faults.point("cri.delete.stopped")
            await self._work(methods.REMOVE_POD_SANDBOX, cri_pb2.RemovePodSandboxRequest(pod_sandbox_id=sandbox))
        except EngineFailed as error:
            if not absent(error):
                raise

    async def _remove_leftovers(self, container: ContainerId) -> None:
        self._config.hosts(container).unlink(missing_ok=True)
        if self._config.remove_cgroup is not None:
            await asyncio.to_thread(self._config.remove_cgroup, self._config.cgroup(container))


async def _finish(work: Coroutine[Any, Any, None]) -> None:
    """Complete a clean-up even though our task is being cancelled; a second cancellation does not wait."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task], timeout=_KILL_S)
        raise
    except EngineTimeout:
        raise
