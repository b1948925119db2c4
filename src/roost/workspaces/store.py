"""Workspaces in the database.  The one place that queries them; a tenant's scope is applied here and nowhere else."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from roost.db.engine import Database
from roost.db.tables import EventRow, WorkspaceRow
from roost.errors import WorkspaceExists, WorkspaceNotFound
from roost.repos.urls import check_workspace_name
from roost.workspaces import decide
from roost.workspaces.model import (
    DEFAULT_TENANT,
    Assignment,
    Desired,
    Facts,
    Observed,
    Report,
    WorkspaceId,
    WorkspaceSpec,
)


def utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class Change:
    """A workspace after a transaction, and the events it left."""

    row: WorkspaceRow
    events: Sequence[EventRow]


class WorkspaceStore:
    """All reads and writes of workspaces; every method is one transaction."""

    def __init__(self, database: Database, tenant: str = DEFAULT_TENANT) -> None:
        self._db = database
        self._tenant = tenant

    async def create(self, spec: WorkspaceSpec) -> Change:
        """Record a new workspace that is wanted running. Raises WorkspaceExists, InvalidName."""
        check_workspace_name(spec.name)
        now = utc_now()
        row = WorkspaceRow(
            id=secrets.token_hex(6),
            tenant=spec.tenant,
            owner=spec.owner,
            name=spec.name,
            live_name=spec.name,
            spec=spec.model_dump(mode="json"),
            desired=Desired.running.value,
            generation=1,
            start=1,
            observed=Observed.pending.value,
            observed_generation=0,
            reason="",
            facts={},
            failures=0,
            created_at=now,
            updated_at=now,
        )
        event = EventRow(workspace_id=row.id, at=now, kind="note", start=1, detail="created")
        try:
            async with self._db.writing() as session:
                session.add(row)
                await session.flush()
                session.add(event)
        except IntegrityError as error:
            raise WorkspaceExists(f"a workspace named {spec.name!r} exists") from error
        return Change(row, [event])

    async def get(self, name: str) -> WorkspaceRow:
        """The live workspace of that name. Raises WorkspaceNotFound."""
        async with self._db.reading() as session:
            row = await session.scalar(
                select(WorkspaceRow).where(WorkspaceRow.live_name == name, WorkspaceRow.tenant == self._tenant)
            )
        if row is None:
            raise WorkspaceNotFound(f"there is no workspace named {name!r}")
        return row

    async def latest(self, name: str) -> WorkspaceRow:
        """The live workspace of that name, else the one deleted last that is not destroyed yet."""
        try:
            return await self.get(name)
        except WorkspaceNotFound:
            return await self._trashed(name)

    async def _trashed(self, name: str) -> WorkspaceRow:
        async with self._db.reading() as session:
            row = await session.scalar(
                select(WorkspaceRow)
                .where(
                    WorkspaceRow.name == name,
                    WorkspaceRow.tenant == self._tenant,
                    WorkspaceRow.live_name.is_(None),
                    WorkspaceRow.desired == Desired.deleted.value,
                )
                .order_by(WorkspaceRow.deleted_at.desc())
            )
        if row is None:
            raise WorkspaceNotFound(f"there is no workspace named {name!r}")
        return row

    async def by_id(self, workspace: str) -> WorkspaceRow:
        """Any workspace, the deleted ones too. Raises WorkspaceNotFound."""
        async with self._db.reading() as session:
            row = await session.get(WorkspaceRow, workspace)
        if row is None:
            raise WorkspaceNotFound(f"there is no workspace with the id {workspace!r}")
        return row

    async def all(self, *, deleted: bool = False) -> Sequence[WorkspaceRow]:
        """The live workspaces by name; with `deleted`, those in the trash after them."""
        query = select(WorkspaceRow).where(WorkspaceRow.tenant == self._tenant)
        if deleted:
            query = query.where(WorkspaceRow.purged_at.is_(None))
        else:
            query = query.where(WorkspaceRow.live_name.is_not(None))
        async with self._db.reading() as session:
            rows = (await session.scalars(query)).all()
        return sorted(rows, key=lambda row: (row.live_name is None, row.name, row.created_at))

    async def request(self, name: str, desired: Desired, *, anew: bool = False) -> Change:
        """Change what is wanted of a live workspace. Raises WorkspaceNotFound."""
        row = await self.get(name)
        return await self._change(row.id, lambda row, now: decide.request(row, desired, now, anew=anew))

    async def undelete(self, name: str) -> Change:
        """Take the workspace deleted last under that name out of the trash, stopped.

        Raises WorkspaceNotFound, WorkspaceExists when the name is taken again.
        """
        row = await self._trashed(name)

        def back(row: WorkspaceRow, now: datetime) -> list[EventRow]:
            if row.desired != Desired.deleted:
                raise WorkspaceNotFound(f"{name!r} is being destroyed")
            row.live_name, row.deleted_at = row.name, None
            return decide.request(row, Desired.stopped, now)

        try:
            return await self._change(row.id, back)
        except IntegrityError as error:
            raise WorkspaceExists(f"a workspace named {name!r} exists again") from error

    async def apply(self, report: Report) -> Change:
        """Take in a node's report. Raises WorkspaceNotFound for a workspace this server does not know."""

        def seen(row: WorkspaceRow, now: datetime) -> list[EventRow]:
            events = decide.apply(row, report, now)
            if row.desired == Desired.purged and row.observed == Observed.deleted and decide.settled(row):
                row.purged_at = now
            return events

        return await self._change(report.workspace, seen)

    async def retry_due(self) -> list[Change]:
        """Start again what waited long enough, destroy what lay in the trash long enough."""
        async with self._db.reading() as session:
            due = await session.scalars(select(WorkspaceRow.id).where(WorkspaceRow.retry_at <= utc_now()))
            ids = list(due)

        def again(row: WorkspaceRow, now: datetime) -> list[EventRow]:
            return decide.retry(row, now) if row.retry_at is not None and row.retry_at <= now else []

        return [await self._change(found, again) for found in ids]

    async def purge_due(self, trash: timedelta) -> list[Change]:
        """Want the HOMEs destroyed that lay in the trash for the whole period."""
        async with self._db.reading() as session:
            due = await session.scalars(
                select(WorkspaceRow.id).where(
                    WorkspaceRow.desired == Desired.deleted.value, WorkspaceRow.deleted_at <= utc_now() - trash
                )
            )
            ids = list(due)

        def destroy(row: WorkspaceRow, now: datetime) -> list[EventRow]:
            # Looked at again within the transaction: it may have been undeleted since.
            due = row.desired == Desired.deleted and row.deleted_at is not None and row.deleted_at <= now - trash
            return decide.request(row, Desired.purged, now) if due else []

        return [await self._change(found, destroy) for found in ids]

    async def next_retry(self) -> datetime | None:
        """When the next retry is due."""
        async with self._db.reading() as session:
            found: datetime | None = await session.scalar(
                select(WorkspaceRow.retry_at)
                .where(WorkspaceRow.retry_at.is_not(None))
                .order_by(WorkspaceRow.retry_at)
                .limit(1)
            )
        return found

    async def assignments(self) -> list[Assignment]:
        """What is wanted of everything that is not destroyed, for a node that has just connected."""
        async with self._db.reading() as session:
            rows = await session.scalars(
                select(WorkspaceRow).where(WorkspaceRow.purged_at.is_(None), WorkspaceRow.retry_at.is_(None))
            )
            # Of what lies in the trash there is nothing to do, and nothing to look at; what failed waits for its user.
            return [assignment(row) for row in rows if not decide.settled(row) or _held(row)]

    async def events(self, workspace: str | None, after: int, limit: int = 1000) -> Sequence[tuple[EventRow, str]]:
        """Events after an id, oldest first, each with its workspace's name."""
        query = (
            select(EventRow, WorkspaceRow.name)
            .join(WorkspaceRow, EventRow.workspace_id == WorkspaceRow.id)
            .where(EventRow.id > after, WorkspaceRow.tenant == self._tenant)
            .order_by(EventRow.id)
            .limit(limit)
        )
        if workspace is not None:
            query = query.where(EventRow.workspace_id == workspace)
        async with self._db.reading() as session:
            return [(event, name) for event, name in (await session.execute(query)).all()]

    async def _change(self, workspace: str, act: Callable[[WorkspaceRow, datetime], list[EventRow]]) -> Change:
        async with self._db.writing() as session:
            row = await session.get(WorkspaceRow, workspace, with_for_update=True)
            if row is None:
                raise WorkspaceNotFound(f"there is no workspace with the id {workspace!r}")
            events = act(row, utc_now())
            session.add_all(events)
            await session.flush()
        return Change(row, events)


def _held(row: WorkspaceRow) -> bool:
    """A state that a node is to keep up, now that it is reached."""
    return row.live_name is not None and row.observed != Observed.error


def assignment(row: WorkspaceRow) -> Assignment:
    """What the node is told of a row."""
    return Assignment(
        workspace=WorkspaceId(row.id),
        generation=row.generation,
        start=row.start,
        desired=Desired(row.desired),
        spec=WorkspaceSpec.model_validate(row.spec),
        facts=Facts.model_validate(row.facts),
    )


def event_json(event: EventRow, name: str) -> dict[str, Any]:
    """An event as the API shows it."""
    return {
        "id": event.id,
        "workspace": event.workspace_id,
        "name": name,
        "at": event.at.isoformat(),
        "kind": event.kind,
        "start": event.start,
        "from": event.before,
        "to": event.after,
        "step": event.step,
        "status": event.status,
        "ms": event.ms,
        "detail": event.detail,
        "error": event.error,
    }
