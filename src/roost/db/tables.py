"""Tables.  A change here needs a migration under migrations/versions; a test compares the two."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import JSON, DateTime, Dialect, Float, ForeignKey, Index, Integer, String, Text, TypeDecorator
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC in Python, naive UTC in the database (SQLite keeps no zone)."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


class Base(DeclarativeBase):
    type_annotation_map: ClassVar[dict[Any, Any]] = {dict[str, Any]: JSON, list[Any]: JSON, datetime: UtcDateTime}


class WorkspaceRow(Base):
    """A workspace: what is wanted of it (`desired`, `spec`) and what was last seen of it (`observed`, `facts`)."""

    __tablename__ = "workspaces"
    __table_args__ = (
        # A deleted workspace frees its name; the live ones are unique per server.
        Index("ix_workspaces_live_name", "live_name", unique=True),
        Index("ix_workspaces_tenant", "tenant"),
    )

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    owner: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(40))
    live_name: Mapped[str | None] = mapped_column(String(40))
    """The name while the workspace is not deleted, else null."""
    spec: Mapped[dict[str, Any]]
    """workspaces.model.WorkspaceSpec"""
    desired: Mapped[str] = mapped_column(String(16))
    generation: Mapped[int] = mapped_column(Integer)
    """Counts changes of what is wanted; the fence: a report about an older one changes nothing."""
    start: Mapped[int] = mapped_column(Integer)
    """Counts containers made; the label of the one that is wanted."""
    observed: Mapped[str] = mapped_column(String(16))
    observed_generation: Mapped[int] = mapped_column(Integer)
    reason: Mapped[str] = mapped_column(Text)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON, nullable=True)
    facts: Mapped[dict[str, Any]]
    """workspaces.model.Facts: what the node found out and need not find out again."""
    last_start: Mapped[dict[str, Any] | None] = mapped_column(JSON, nullable=True)
    failures: Mapped[int] = mapped_column(Integer)
    """Failed or crashed starts in a row; drives the back-off."""
    retry_at: Mapped[datetime | None]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]
    purged_at: Mapped[datetime | None]


class EventRow(Base):
    """Something that happened to a workspace; append-only."""

    __tablename__ = "events"
    __table_args__ = (Index("ix_events_workspace", "workspace_id", "id"), {"sqlite_autoincrement": True})

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    workspace_id: Mapped[str] = mapped_column(ForeignKey("workspaces.id", ondelete="CASCADE"))
    at: Mapped[datetime]
    kind: Mapped[str] = mapped_column(String(8))
    start: Mapped[int] = mapped_column(Integer)
    before: Mapped[str | None] = mapped_column(String(16))
    after: Mapped[str | None] = mapped_column(String(16))
    step: Mapped[str | None] = mapped_column(String(32))
    status: Mapped[str | None] = mapped_column(String(16))
    ms: Mapped[float | None] = mapped_column(Float)
    detail: Mapped[str] = mapped_column(Text)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON, nullable=True)
