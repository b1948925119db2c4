"""The node's side of a workspace: makes what is wanted so, and says what it saw.

One task a workspace.  A newer assignment cancels what the task is doing and begins anew with it; nothing is ever busy.
An assignment that is met already costs one question to the engine.  The engine's events wake the task of the container
they name, and every `relist_s` all are looked at, so a lost event delays and does not hide.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from roost import faults
from roost.errors import ContainerCrashed, InternalError, RoostError, VolumeNotFound
from roost.runtimes.protocol import LABEL_START, ContainerId, ContainerState, ContainerStatus
from roost.workspaces.model import Assignment, Desired, Facts, Observed, Report, StepReport, container_of
from roost.workspaces.start import Start, StartTools
from roost.workspaces.startlog import StartLogs

log = structlog.get_logger()


@dataclass
class _Workspace:
    assignment: Assignment
    task: asyncio.Task[None] | None = None
    met: bool = False
    """The assignment was met, or failed: nothing to do until something changes."""


class Converger:
    """Drives every assigned workspace on one runtime."""

    def __init__(
        self, tools: StartTools, logs: StartLogs, report: Callable[[Report], None], *, stop_grace_s: float
    ) -> None:
        self._tools = tools
        self._runtime = tools.runtime
        self._logs = logs
        self._report = report
        self._grace = stop_grace_s
        self._workspaces: dict[str, _Workspace] = {}

    def assignment(self, workspace: str) -> Assignment | None:
        """What is wanted of a workspace now."""
        found = self._workspaces.get(workspace)
        return found.assignment if found else None

    def busy(self, workspace: str) -> bool:
        """Whether the newest assignment is still being worked on."""
        found = self._workspaces.get(workspace)
        return found is not None and not found.met

    def assign(self, new: Assignment) -> None:
        """Take an assignment; an older one, or the one that is being worked on, changes nothing."""
        known = self._workspaces.get(new.workspace)
        if known is not None:
            old = known.assignment
            if (new.generation, new.start) < (old.generation, old.start):
                return
            same = (new.generation, new.start, new.desired) == (old.generation, old.start, old.desired)
            if same and known.task is not None and not known.task.done():
                return
        previous = known.task if known else None
        entry = _Workspace(new)
        self._workspaces[new.workspace] = entry
        entry.task = asyncio.create_task(self._run(entry, previous), name=f"workspace-{new.workspace}")

    def look(self, container: ContainerId) -> None:
        """Something happened to a container: see whether what is wanted still holds."""
        for entry in self._workspaces.values():
            if entry.assignment.container == container and entry.met:
                entry.met = False
                entry.task = asyncio.create_task(self._check(entry), name=f"look-{entry.assignment.workspace}")

    async def relist(self) -> list[ContainerStatus]:
        """Compare all containers with what is wanted; returns those that nobody wants (reported, never touched)."""
        statuses = {status.container: status for status in await self._runtime.list()}
        known = {container_of(entry.assignment.workspace) for entry in self._workspaces.values()}
        for entry in self._workspaces.values():
            a = entry.assignment
            running = a.container in statuses and statuses[a.container].state is ContainerState.running
            if entry.met and (a.desired is Desired.running) != running:
                self.look(a.container)
        return [status for name, status in statuses.items() if name not in known]

    def again(self) -> None:
        """Look at every workspace, as after the engine was away."""
        for entry in list(self._workspaces.values()):
            self.look(entry.assignment.container)

    async def close(self) -> None:
        """Stop working; workspaces go on as they are."""
        tasks = [entry.task for entry in self._workspaces.values() if entry.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, entry: _Workspace, previous: asyncio.Task[None] | None) -> None:
        if previous is not None:
            previous.cancel()
            await asyncio.wait([previous])
        a = entry.assignment
        try:
            match a.desired:
                case Desired.running:
                    await self._running(entry)
                case Desired.stopped:
                    await self._stopped(a)
                case Desired.deleted:
                    await self._deleted(a)
                case Desired.purged:
                    await self._purged(a)
        except RoostError as error:
            self._fail(a, error)
        except Exception as error:
            log.exception("converging failed", workspace=a.workspace, desired=a.desired.value)
            self._fail(a, InternalError(f"{type(error).__name__}: {error}"))
        entry.met = True

    def _fail(self, a: Assignment, error: RoostError, *, steps: tuple[StepReport, ...] = ()) -> None:
        log.warning("workspace failed", workspace=a.workspace, code=error.code, error=error.message)
        self._say(a, Observed.error, reason=error.message, error=error, steps=steps)

    async def _running(self, entry: _Workspace) -> None:
        a = entry.assignment
        if a.facts.ever_ready and await self._is_up(a):
            self._say(a, Observed.running, reason="already running")
            return
        begun = time.monotonic()
        self._say(a, Observed.starting if a.facts.ever_ready else Observed.creating)
        start_log = self._logs.open(a.workspace, a.start)
        start = Start(a, self._tools, start_log, self._report)
        try:
            await start.run()
        except RoostError as error:
            start_log.write(f"failed: {error.message} ({error.code})\nnext: {error.hint}")
            raise
        finally:
            start_log.close()
        total_ms = round((time.monotonic() - begun) * 1000, 3)
        facts = Facts.model_validate(start.found)
        known = {**a.facts.model_dump(), **facts.model_dump(exclude_unset=True)}
        entry.assignment = a.model_copy(update={"facts": Facts.model_validate(known)})
        self._say(a, Observed.running, facts=facts, steps=tuple(start.steps), total_ms=total_ms)

    async def _is_up(self, a: Assignment) -> bool:
        status = await self._runtime.status(a.container)
        return (
            status is not None
            and status.state is ContainerState.running
            and status.labels.get(LABEL_START) == str(a.start)
        )

    async def _stopped(self, a: Assignment) -> None:
        begun = time.monotonic()
        await self._down(a)
        volumes = {volume.name: volume for volume in await self._runtime.volumes()}
        if a.volume in volumes and volumes[a.volume].trashed_at is not None:
            await self._runtime.restore_volume(a.volume)
        elif a.volume not in volumes and a.facts.seeded_digest is not None:
            raise VolumeNotFound(f"HOME of {a.spec.name!r} is not on this node")
        self._say(a, Observed.stopped, total_ms=round((time.monotonic() - begun) * 1000, 3))

    async def _down(self, a: Assignment) -> None:
        if await self._runtime.status(a.container) is None:
            await self._runtime.delete(a.container)  # what a killed create may have left
            return
        await self._runtime.stop(a.container, self._grace)
        faults.point("stop.container.down")
        await self._runtime.delete(a.container)
        faults.point("stop.container.deleted")

    async def _deleted(self, a: Assignment) -> None:
        await self._down(a)
        await self._runtime.trash_volume(a.volume)
        faults.point("rm.volume.trashed")
        self._say(a, Observed.deleted)

    async def _purged(self, a: Assignment) -> None:
        await self._down(a)
        await self._runtime.trash_volume(a.volume)
        await self._runtime.purge_volume(a.volume)
        faults.point("rm.volume.purged")
        self._logs.forget(a.workspace)
        self._say(a, Observed.deleted, reason="destroyed")

    async def _check(self, entry: _Workspace) -> None:
        """A met assignment, looked at again."""
        a = entry.assignment
        try:
            status = await self._runtime.status(a.container)
            up = status is not None and status.state is ContainerState.running
            if a.desired is not Desired.running and up:
                await self._run(entry, None)  # somebody else started it: what is wanted holds
            elif a.desired is Desired.running and not up:
                self._crashed(a, status)
        except RoostError as error:
            log.warning("container cannot be looked at", workspace=a.workspace, error=error.message)
        entry.met = True

    def _crashed(self, a: Assignment, status: ContainerStatus | None) -> None:
        if status is None:
            reason = "the container is gone"
        else:
            code = "" if status.exit_code is None else f" with exit code {status.exit_code}"
            why = f" ({status.reason})" if status.reason and status.reason != "Error" else ""
            reason = f"the container ended by itself{code}{why}"
        self._say(a, Observed.error, reason=reason, error=ContainerCrashed(reason), crashed=True)

    def _say(
        self,
        a: Assignment,
        observed: Observed,
        *,
        reason: str = "",
        error: RoostError | None = None,
        facts: Facts | None = None,
        steps: tuple[StepReport, ...] = (),
        total_ms: float | None = None,
        crashed: bool = False,
    ) -> None:
        self._report(
            Report(
                workspace=a.workspace,
                generation=a.generation,
                start=a.start,
                observed=observed,
                reason=reason,
                error=error.to_problem() if error else None,
                facts=facts,
                steps=steps,
                total_ms=total_ms,
                crashed=crashed,
            )
        )
