"""What the server does with workspaces: takes requests, decides, hands assignments to the node, takes in reports."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Any

import structlog

from roost.db.tables import WorkspaceRow
from roost.errors import NodeTimeout, NodeUnreachable, Superseded, WaitTimeout, WorkspaceNotFound
from roost.server.bus import Bus, News
from roost.server.nodes import NodeConnection, Nodes
from roost.server.uploads import Uploads
from roost.workspaces import decide
from roost.workspaces.model import Desired, Facts, Observed, Report, WorkspaceSpec
from roost.workspaces.store import Change, WorkspaceStore, assignment, event_json, utc_now

log = structlog.get_logger()

PURGE_EVERY_S = 600.0
AFTER_FAILURE_S = 1.0


class WorkspaceService:
    """The verbs of the API on workspaces; keeps the node told and the waiting informed."""

    def __init__(self, store: WorkspaceStore, nodes: Nodes, bus: Bus, uploads: Uploads, trash: timedelta) -> None:
        self.store = store
        self.nodes = nodes
        self.bus = bus
        self.uploads = uploads
        self.trash = trash
        self._due = asyncio.Event()

    async def create(self, spec: WorkspaceSpec) -> WorkspaceRow:
        if spec.repo is not None and spec.repo.upload is not None:
            self.uploads.check(spec.repo.upload)
        return await self._tell(await self.store.create(spec))

    async def request(self, name: str, desired: Desired, *, anew: bool = False) -> WorkspaceRow:
        return await self._tell(await self.store.request(name, desired, anew=anew))

    async def undelete(self, name: str) -> WorkspaceRow:
        return await self._tell(await self.store.undelete(name))

    async def settled(self, name: str, generation: int, timeout_s: float) -> WorkspaceRow:
        """Wait until what was wanted at `generation` has come about, or failed.

        Raises Superseded when something else is wanted meanwhile, WaitTimeout, WorkspaceNotFound.
        """
        row = await self.store.latest(name)
        desired = row.desired
        with self.bus.subscribe() as news:
            try:
                async with asyncio.timeout(timeout_s):
                    while True:
                        row = await self.store.by_id(row.id)
                        if row.generation > generation and row.desired != desired:
                            raise Superseded(f"{name!r} is wanted {row.desired} now")
                        if row.generation >= generation and decide.settled(row):
                            return row
                        while (item := await news.get()) is not None and item.workspace != row.id:
                            pass
                        if item is None:  # we are told no more; callers ask again as after any other timeout
                            raise WaitTimeout(f"{name!r} is {row.observed}, and the server stops or lost count")
            except TimeoutError as error:
                raise WaitTimeout(f"{name!r} is {row.observed} after {timeout_s:g} s") from error

    async def on_node(self, node: NodeConnection) -> None:
        """A node connected: tell it everything that is wanted."""
        for wanted in await self.store.assignments():
            await node.assign(wanted)

    async def on_report(self, report: Report) -> None:
        """Take in what a node saw."""
        try:
            change = await self.store.apply(report)
        except WorkspaceNotFound:
            log.warning("report about a workspace that is not known", workspace=report.workspace)
            return
        row, step = change.row, report.step
        newest = (report.generation, report.start) == (row.generation, row.start)
        if step is not None and step.status == "running" and newest:
            self.bus.publish(News(row.id, _step_event(row, step.step, step.at)))
        facts, spec = Facts.model_validate(row.facts), WorkspaceSpec.model_validate(row.spec)
        if spec.repo is not None and spec.repo.upload is not None and facts.repo_path is not None:
            self.uploads.drop(spec.repo.upload)
        self._publish(change)
        if change.row.retry_at is not None:
            self._due.set()

    async def run(self) -> None:
        """Start again what is due, destroy what lay in the trash long enough; runs until cancelled."""
        purged_at: float | None = None
        loop = asyncio.get_running_loop()
        while True:
            self._due.clear()
            try:
                for change in await self.store.retry_due():
                    await self._tell(change)
                if purged_at is None or loop.time() - purged_at > PURGE_EVERY_S:
                    purged_at = loop.time()
                    for change in await self.store.purge_due(self.trash):
                        await self._tell(change)
                    await asyncio.to_thread(self.uploads.sweep)
                await self._sleep(await self.store.next_retry())
            except Exception:
                # Without this task nothing is ever started again: a database that is locked or full passes.
                log.exception("workspace timers failed; they go on")
                await asyncio.sleep(AFTER_FAILURE_S)

    async def _sleep(self, until: datetime | None) -> None:
        delay = PURGE_EVERY_S if until is None else max(0.0, (until - utc_now()).total_seconds())
        try:
            async with asyncio.timeout(min(delay + 0.005, PURGE_EVERY_S)):
                await self._due.wait()
        except TimeoutError:
            return

    async def _tell(self, change: Change) -> WorkspaceRow:
        """After a change of what is wanted: tell the listeners and the node.

        The listeners first, with nothing awaited since the change: they take events in the order of their ids.
        """
        self._publish(change)
        try:
            await self.nodes.any().assign(assignment(change.row))
        except (NodeUnreachable, NodeTimeout):
            log.warning("no node takes it; told when one connects", workspace=change.row.id)
        return change.row

    def _publish(self, change: Change) -> None:
        for event in change.events:
            self.bus.publish(News(change.row.id, event_json(event, change.row.name)))
        if not change.events:
            self.bus.publish(News(change.row.id, {}))

    async def step_at_work(self, workspace: str) -> dict[str, Any] | None:
        """The step a start is at, as an event, for those who begin to watch in the middle of it."""
        row = await self.store.by_id(workspace)
        last = row.last_start or {}
        if row.observed not in (Observed.creating, Observed.starting) or last.get("start") != row.start:
            return None
        running = [step["step"] for step in last["steps"] if step["status"] == "running"]
        return _step_event(row, running[-1], row.updated_at.timestamp()) if running else None


def _step_event(row: WorkspaceRow, step: str, at: float) -> dict[str, Any]:
    """A step that begins: told, and not kept (its end is)."""
    when = datetime.fromtimestamp(at, tz=row.created_at.tzinfo).isoformat()
    return {
        "id": None, "workspace": row.id, "name": row.name, "at": when, "kind": "step", "start": row.start,
        "from": None, "to": None, "step": step, "status": "running", "ms": None, "detail": "", "error": None,
    }  # fmt: skip
