"""The node's side of a workspace: makes what is wanted so, and says what it saw.

A newer assignment cancels what goes on for a workspace and begins anew; nothing is ever busy.  An assignment that is
met already costs one question to the engine.  The events of the engine wake the workspace of the container they name,
and every `relist_s` all are looked at, so a lost event delays and does not hide.

The invariants
- One task at a time works on a workspace: whoever works holds its lock, so what was cancelled has cleaned up before the
  next begins, however many assignments come meanwhile.
- What happens to a container while somebody works on it is looked at afterwards (`stirred`).
- The end of a container that was said to run is reported once.  When it is started again is the server's to say, under
  another start number: a start that failed, or whose container ended, is not begun anew under the same one.
- What this node found out is newer than what the server has heard, so facts are kept here over assignments.
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
    lock: asyncio.Lock
    """Held by whoever works on the workspace; handed on to the entry of the next assignment."""
    task: asyncio.Task[None] | None = None
    over: bool = False
    """The assignment was met, or failed: nothing to do until something changes."""
    up: bool = False
    """It was said to run, and its end was not seen yet."""
    stirred: bool = False
    """Something happened to the container that was not looked at yet."""


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
        self._tasks: set[asyncio.Task[None]] = set()

    def assignment(self, workspace: str) -> Assignment | None:
        """What is wanted of a workspace now."""
        found = self._workspaces.get(workspace)
        return found.assignment if found else None

    def busy(self, workspace: str) -> bool:
        """Whether the newest assignment is still being worked on."""
        found = self._workspaces.get(workspace)
        return found is not None and not found.over

    def assign(self, new: Assignment) -> None:
        """Take an assignment; an older one, or the one that is being worked on, changes nothing."""
        known = self._workspaces.get(new.workspace)
        lock = asyncio.Lock()
        if known is not None:
            old = known.assignment
            if (new.generation, new.start) < (old.generation, old.start):
                return
            if (new.generation, new.start, new.desired) == (old.generation, old.start, old.desired):
                ended = new.desired is Desired.running and not known.up
                if not known.over or ended:
                    return
            new, lock = new.model_copy(update={"facts": old.facts}), known.lock
            if known.task is not None:
                known.task.cancel()
        entry = self._workspaces[new.workspace] = _Workspace(new, lock)
        self._work_on(entry)

    def look(self, container: ContainerId) -> None:
        """Something happened to a container: see whether what is wanted still holds."""
        for entry in self._workspaces.values():
            if entry.assignment.container == container:
                entry.stirred = True
                if entry.task is None or entry.task.done():
                    self._work_on(entry)

    async def relist(self) -> list[ContainerStatus]:
        """Compare all containers with what is wanted; returns those that nobody wants (reported, never touched)."""
        statuses = {status.container: status for status in await self._runtime.list()}
        known = {container_of(entry.assignment.workspace) for entry in self._workspaces.values()}
        for entry in self._workspaces.values():
            a = entry.assignment
            running = a.container in statuses and statuses[a.container].state is ContainerState.running
            if entry.over and (a.desired is Desired.running) != running:
                self.look(a.container)
        return [status for name, status in statuses.items() if name not in known]

    def again(self) -> None:
        """Look at every workspace, as after the engine was away."""
        for entry in list(self._workspaces.values()):
            self.look(entry.assignment.container)

    async def close(self) -> None:
        """Stop working; workspaces go on as they are."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _work_on(self, entry: _Workspace) -> None:
        task = entry.task = asyncio.create_task(self._work(entry), name=f"workspace-{entry.assignment.workspace}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _work(self, entry: _Workspace) -> None:
        async with entry.lock:
            if not entry.over:
                await self._run(entry)
            while entry.stirred:
                entry.stirred = False
                await self._check(entry)

    async def _run(self, entry: _Workspace) -> None:
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
        finally:
            entry.over = True

    def _fail(
        self, a: Assignment, error: RoostError, *, steps: tuple[StepReport, ...] = (), total_ms: float | None = None
    ) -> None:
        log.warning("workspace failed", workspace=a.workspace, code=error.code, error=error.message)
        self._say(a, Observed.error, reason=error.message, error=error, steps=steps, total_ms=total_ms)

    async def _running(self, entry: _Workspace) -> None:
        a = entry.assignment
        if _complete(a) and await self._is_up(a):
            entry.up = True
            self._say(a, Observed.running, reason="already running")
            return
        begun = time.monotonic()
        self._say(a, Observed.starting if a.facts.ever_ready else Observed.creating)
        start_log = self._logs.open(a.workspace, a.start)
        start = Start(a, self._tools, start_log, self._tell)
        try:
            await start.run()
        except RoostError as error:
            start_log.write(f"failed: {error.message} ({error.code})\nnext: {error.hint}")
            self._fail(a, error, steps=tuple(start.steps), total_ms=_ms_since(begun))
            return
        finally:
            start_log.close()
        entry.up = True
        facts = Facts.model_validate(start.found)
        self._say(a, Observed.running, facts=facts, steps=tuple(start.steps), total_ms=_ms_since(begun))

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
        self._say(a, Observed.stopped, total_ms=_ms_since(begun))

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
        """Look whether what was reached still holds."""
        a = entry.assignment
        if a.desired is Desired.running and not entry.up:
            return
        try:
            status = await self._runtime.status(a.container)
        except RoostError as error:
            log.warning("container cannot be looked at", workspace=a.workspace, error=error.message)
            return
        except Exception:
            log.exception("container cannot be looked at", workspace=a.workspace)
            return
        running = status is not None and status.state is ContainerState.running
        if a.desired is not Desired.running and running:
            await self._run(entry)  # somebody else started it: what is wanted holds
        elif a.desired is Desired.running and not running:
            entry.up = False
            self._crashed(a, status)

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
        self._tell(
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

    def _tell(self, report: Report) -> None:
        """Report, and keep the facts in it for what is assigned next."""
        entry = self._workspaces.get(report.workspace)
        if entry is not None and report.facts is not None:
            known = {**entry.assignment.facts.model_dump(), **report.facts.model_dump(exclude_unset=True)}
            entry.assignment = entry.assignment.model_copy(update={"facts": Facts.model_validate(known)})
        self._report(report)


def _complete(a: Assignment) -> bool:
    """Nothing of a start is left to do, if its container runs."""
    placed = a.spec.repo is None or a.facts.repo_path is not None
    return a.facts.ever_ready and a.facts.user is not None and a.facts.seeded_digest is not None and placed


def _ms_since(begun: float) -> float:
    return round((time.monotonic() - begun) * 1000, 3)
