"""What a request or a report does to a workspace: pure functions over its row, tested without a database.

The invariants
- A request changes the desired state at once, whatever goes on; nothing is ever busy.  It raises the generation.
- A start that is wanted has a number; the node makes a new container for a new number and keeps the old one for the
  same.  So a lost answer, a restarted node or a second assignment never starts anything twice.
- A report changes the observed state only if it speaks of the newest generation and start (the fence).  What it found
  out (`facts`) is kept in any case.
- A workspace that once was ready is started again by itself after a crash, with a growing delay; one whose first start
  failed waits for its user, who has just read why.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from roost.db.tables import EventRow, WorkspaceRow
from roost.errors import InternalError, WorkspaceStartFailed, from_problem
from roost.workspaces.model import AIMS, Desired, Facts, Observed, Report, StepReport

STEADY_S = 60.0
"""A container that ran this long did not crash at its start: the back-off begins anew."""
MAX_DELAY_S = 300.0

FINAL = frozenset({Observed.running, Observed.stopped, Observed.deleted, Observed.error})


def retry_delay_s(failures: int) -> float:
    """Seconds to wait after so many failures in a row: 0, 1, 2, 4 … 300."""
    return 0.0 if failures <= 1 else float(min(2.0 ** (failures - 2), MAX_DELAY_S))


def settled(row: WorkspaceRow) -> bool:
    """What is wanted has come about, or cannot."""
    if row.observed_generation < row.generation or row.retry_at is not None:
        return False
    return row.observed == Observed.error or row.observed == AIMS[Desired(row.desired)]


def request(row: WorkspaceRow, desired: Desired, now: datetime, *, anew: bool = False) -> list[EventRow]:
    """Change what is wanted. `anew` makes a new container even if one runs (restart)."""
    if row.desired == desired and not anew:
        idle = row.observed in (Observed.error, Observed.stopped) and desired is Desired.running
        if not idle and row.observed != Observed.error:
            return []
    row.desired = desired
    row.generation += 1
    if desired is Desired.running:
        row.start += 1
        row.last_start = None
    row.failures = 0
    row.retry_at = None
    row.error = None
    row.updated_at = now
    if desired is Desired.deleted:
        row.live_name = None
        row.deleted_at = now
    events = [_note(row, now, f"{'restart' if anew else desired.value} requested")]
    coming = {
        Desired.running: Observed.pending,
        Desired.stopped: Observed.stopping,
        Desired.deleted: Observed.deleting,
        Desired.purged: Observed.deleting,
    }[desired]
    return events + _observe(row, coming, now, "")


def apply(row: WorkspaceRow, report: Report, now: datetime) -> list[EventRow]:
    """Take in what the node saw; returns the events to keep."""
    events: list[EventRow] = []
    if report.facts is not None:
        row.facts = _merge(row.facts, report.facts)
    if report.generation < row.generation or report.start < row.start:
        return events
    if report.step is not None:
        row.last_start = _with_step(row.last_start, report.start, report.step)
        if report.step.status != "running":
            events.append(_step(row, report, report.step))
    if report.note:
        events.append(_note(row, now, report.note))
    if report.observed is None:
        return events
    if report.observed is Observed.error and row.observed == Observed.error and row.retry_at is not None:
        return events  # told twice: it counts once
    if report.observed in FINAL:
        row.observed_generation = report.generation
    row.error = report.error
    row.updated_at = now
    if report.total_ms is not None and report.steps:
        row.last_start = {
            "start": report.start,
            "total_ms": report.total_ms,
            "steps": [_step_json(step) for step in report.steps],
        }
    if report.observed is Observed.running:
        if row.observed != Observed.running or row.started_at is None:  # else it is said again, as after a reconnect
            row.started_at = now
        row.retry_at = None
    if report.observed is Observed.stopped:
        row.started_at = None
    if report.observed is Observed.error:
        events += _failed(row, report, now)
    else:
        events += _observe(row, report.observed, now, report.reason, report.total_ms)
    return events


def _failed(row: WorkspaceRow, report: Report, now: datetime) -> list[EventRow]:
    error = from_problem(report.error) if report.error else InternalError("the node named no error")
    events = _observe(row, Observed.error, now, report.reason, report.total_ms, report.error)
    if row.desired != Desired.running:
        # A stop or delete that failed is tried again: nothing else can bring it about.
        row.failures += 1
        row.retry_at = now + timedelta(seconds=max(1.0, retry_delay_s(row.failures)))
        return events
    if row.started_at is not None and (now - row.started_at).total_seconds() > STEADY_S:
        row.failures = 0
    row.started_at = None
    ready_once = Facts.model_validate(row.facts).ever_ready
    if ready_once and (report.crashed or error.retryable or isinstance(error, WorkspaceStartFailed)):
        row.failures += 1
        delay = retry_delay_s(row.failures)
        row.retry_at = now + timedelta(seconds=delay)
        events.append(_note(row, now, f"starting again in {delay:g} s (attempt {row.failures})"))
    return events


def retry(row: WorkspaceRow, now: datetime) -> list[EventRow]:
    """The delay is over: try again under a new start number."""
    row.retry_at = None
    row.error = None
    row.updated_at = now
    if row.desired == Desired.running:
        row.start += 1
        row.last_start = None
        return _observe(row, Observed.pending, now, "starting again")
    return _observe(
        row, Observed.stopping if row.desired == Desired.stopped else Observed.deleting, now, "trying again"
    )


def _merge(stored: dict[str, Any], found: Facts) -> dict[str, Any]:
    return {**stored, **found.model_dump(mode="json", exclude_unset=True)}


def _with_step(last: dict[str, Any] | None, start: int, step: StepReport) -> dict[str, Any]:
    steps = list(last["steps"]) if last and last.get("start") == start else []
    steps = [item for item in steps if item["step"] != step.step] + [_step_json(step)]
    return {"start": start, "total_ms": sum(item["ms"] for item in steps), "steps": steps}


def _step_json(step: StepReport) -> dict[str, Any]:
    return {"step": step.step, "ms": step.ms, "status": step.status, "detail": step.detail}


def _observe(
    row: WorkspaceRow,
    observed: Observed,
    now: datetime,
    reason: str,
    ms: float | None = None,
    error: dict[str, Any] | None = None,
) -> list[EventRow]:
    before = row.observed
    row.observed, row.reason = observed.value, reason
    if before == observed:
        return []
    return [
        EventRow(
            workspace_id=row.id, at=now, kind="state", start=row.start, before=before, after=observed.value,
            ms=ms, detail=reason, error=error,
        )
    ]  # fmt: skip


def _note(row: WorkspaceRow, now: datetime, detail: str) -> EventRow:
    return EventRow(workspace_id=row.id, at=now, kind="note", start=row.start, detail=detail)


def _step(row: WorkspaceRow, report: Report, step: StepReport) -> EventRow:
    return EventRow(
        workspace_id=row.id,
        at=datetime.fromtimestamp(step.at, tz=row.created_at.tzinfo),
        kind="step",
        start=report.start,
        step=step.step,
        status=step.status,
        ms=step.ms,
        detail=step.detail,
    )
