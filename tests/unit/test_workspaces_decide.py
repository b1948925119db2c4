"""What requests and reports do to a workspace: the fence, the back-off, what counts as settled."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from roost.db.tables import WorkspaceRow
from roost.errors import ContainerCrashed, EngineUnreachable, ImageNotFound, RoostError
from roost.workspaces import decide
from roost.workspaces.model import Desired, Facts, Observed, Report, StepReport, WorkspaceId

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def row(**changes: object) -> WorkspaceRow:
    values = {
        "id": "abc", "tenant": "default", "owner": "root", "name": "w", "live_name": "w", "spec": {},
        "desired": "running", "generation": 1, "start": 1, "observed": "pending", "observed_generation": 0,
        "reason": "", "error": None, "facts": {}, "last_start": None, "failures": 0, "retry_at": None,
        "created_at": NOW, "updated_at": NOW, "started_at": None, "deleted_at": None, "purged_at": None,
    }  # fmt: skip
    return WorkspaceRow(**{**values, **changes})


def report(observed: Observed | None = None, *, error: RoostError | None = None, **changes: object) -> Report:
    values: dict[str, Any] = {"workspace": WorkspaceId("abc"), "generation": 1, "start": 1, **changes}
    return Report(observed=observed, error=error.to_problem() if error else None, **values)


def test_running_settles_and_is_an_event() -> None:
    w = row()
    assert not decide.settled(w)
    events = decide.apply(w, report(Observed.running, total_ms=12.5), NOW)
    assert decide.settled(w)
    assert [(e.kind, e.before, e.after, e.ms) for e in events] == [("state", "pending", "running", 12.5)]
    assert w.started_at == NOW


def test_an_older_generation_changes_nothing_but_its_facts_are_kept() -> None:
    w = row(generation=2, desired="stopped", observed="stopping")
    events = decide.apply(w, report(Observed.running, facts=Facts(image_digest="sha256:1")), NOW)
    assert events == []
    assert w.observed == "stopping"
    assert w.facts == {"image_digest": "sha256:1"}


def test_an_older_start_changes_nothing() -> None:
    w = row(start=3)
    assert decide.apply(w, report(Observed.running, start=2), NOW) == []
    assert w.observed == "pending"


def test_facts_merge_and_can_be_taken_back() -> None:
    w = row(facts={"seeded_digest": "sha256:1", "image_digest": "sha256:1"})
    decide.apply(w, report(facts=Facts(seeded_digest=None, repo_path="/home/a/r")), NOW)
    assert w.facts == {"seeded_digest": None, "image_digest": "sha256:1", "repo_path": "/home/a/r"}


def test_start_of_a_running_workspace_is_no_change() -> None:
    w = row(observed="running", observed_generation=1)
    assert decide.request(w, Desired.running, NOW) == []
    assert (w.generation, w.start) == (1, 1)


def test_start_again_after_an_error_is_a_new_start() -> None:
    w = row(observed="error", observed_generation=1, error={"code": "image.not_found"})
    decide.request(w, Desired.running, NOW)
    assert (w.generation, w.start, w.error) == (2, 2, None)
    assert not decide.settled(w)


def test_restart_of_a_running_workspace_is_a_new_start() -> None:
    w = row(observed="running", observed_generation=1)
    decide.request(w, Desired.running, NOW, anew=True)
    assert (w.generation, w.start, w.observed) == (2, 2, "pending")


def test_stop_while_starting_changes_the_desire_at_once() -> None:
    w = row(observed="creating")
    decide.request(w, Desired.stopped, NOW)
    assert (w.desired, w.observed) == ("stopped", "stopping")
    decide.apply(w, report(Observed.running), NOW)
    assert w.observed == "stopping"
    decide.apply(w, report(Observed.stopped, generation=2), NOW)
    assert decide.settled(w)


def test_delete_frees_the_name() -> None:
    w = row(observed="running", observed_generation=1)
    decide.request(w, Desired.deleted, NOW)
    assert w.live_name is None
    assert w.deleted_at == NOW


def test_a_first_start_that_failed_waits_for_its_user() -> None:
    w = row()
    decide.apply(w, report(Observed.error, error=EngineUnreachable("gone")), NOW)
    assert w.retry_at is None
    assert decide.settled(w)


def test_a_crash_of_a_ready_workspace_is_started_again_with_growing_delay() -> None:
    w = row(facts={"ever_ready": True})
    delays = []
    for _ in range(5):
        decide.apply(w, report(Observed.running, start=w.start), NOW)
        decide.apply(w, report(Observed.error, start=w.start, error=ContainerCrashed("x"), crashed=True), NOW)
        assert w.retry_at is not None
        assert not decide.settled(w)
        delays.append((w.retry_at - NOW).total_seconds())
        start = w.start
        decide.retry(w, NOW)
        assert w.start == start + 1
    assert delays == [0, 1, 2, 4, 8]


def test_a_crash_after_a_steady_time_begins_the_back_off_anew() -> None:
    w = row(facts={"ever_ready": True}, failures=6, started_at=NOW - timedelta(seconds=61), observed="running")
    decide.apply(w, report(Observed.error, error=ContainerCrashed("x"), crashed=True), NOW)
    assert w.failures == 1
    assert w.retry_at == NOW


def test_an_error_that_trying_cannot_mend_is_not_tried_again() -> None:
    w = row(facts={"ever_ready": True})
    decide.apply(w, report(Observed.error, error=ImageNotFound("no")), NOW)
    assert w.retry_at is None


def test_a_stop_that_failed_is_tried_again() -> None:
    w = row(desired="stopped")
    decide.apply(w, report(Observed.error, error=EngineUnreachable("gone")), NOW)
    assert w.retry_at == NOW + timedelta(seconds=1)
    decide.retry(w, NOW)
    assert w.observed == "stopping"
    assert w.start == 1


@pytest.mark.parametrize(("failures", "delay"), [(0, 0), (1, 0), (2, 1), (3, 2), (10, 256), (11, 300), (60, 300)])
def test_delays(failures: int, delay: float) -> None:
    assert decide.retry_delay_s(failures) == delay


def test_steps_are_kept_in_order_and_the_last_word_counts() -> None:
    w = row()
    for status in ("running", "done"):
        decide.apply(w, report(step=StepReport(step="image", status=status, ms=5.0)), NOW)
    events = decide.apply(w, report(step=StepReport(step="seed", status="failed", ms=7.0)), NOW)
    assert w.last_start is not None
    assert [(s["step"], s["status"]) for s in w.last_start["steps"]] == [("image", "done"), ("seed", "failed")]
    assert [(e.step, e.status) for e in events] == [("seed", "failed")]


def test_what_is_told_twice_counts_once() -> None:
    w = row(facts={"ever_ready": True}, observed="running", started_at=NOW)
    crash = report(Observed.error, error=ContainerCrashed("x"), crashed=True)
    decide.apply(w, crash, NOW)
    assert decide.apply(w, crash, NOW) == []
    assert w.failures == 1


def test_running_said_again_is_not_started_again() -> None:
    w = row(observed="running", started_at=NOW)
    decide.apply(w, report(Observed.running), NOW + timedelta(seconds=9))
    assert w.started_at == NOW
