"""The node's work on workspaces, on a runtime in memory: cut off anywhere, it ends in what is wanted, and says so."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from roost.errors import CloneFailed, EngineFailed, EngineUnreachable, HomeFull, PoolFull, UnknownUser
from roost.runtimes.fake import FakeRuntime
from roost.runtimes.protocol import ContainerId, ContainerSpec, ContainerUser, ImageInfo, Tool, ToolResult, VolumeName
from roost.workspaces.converge import Converger
from roost.workspaces.model import (
    Assignment,
    Desired,
    Facts,
    Observed,
    Report,
    RepoSpec,
    UserFact,
    WorkspaceId,
    WorkspaceSpec,
)
from roost.workspaces.start import StartTools
from roost.workspaces.startlog import StartLogs

IMAGE = "127.0.0.1:5000/dev:1"
WORKSPACE = WorkspaceId("w1")
BOX = ContainerId("roost-w1")
HOME = VolumeName("roost-w1-home")


class ScriptedRepositories:
    """Places a repository as fast, or as badly, as a test says."""

    def __init__(self, runtime: FakeRuntime) -> None:
        self.runtime = runtime
        self.placed: list[int] = []
        self.failure: Exception | None = None
        self.hold: asyncio.Event | None = None
        self.cleanup: asyncio.Event | None = None
        """While it is not set, a cancelled placing is still cleaning up."""
        self.inside = 0
        self.most = 0

    async def place(self, assignment: Assignment, user: UserFact, path: str, note: Callable[[str], None]) -> str:
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            if self.hold is not None:
                await self.hold.wait()
            if self.failure is not None:
                raise self.failure
            note(f"placing {path}")
            self.placed.append(assignment.start)
            return "c0ffee" * 6
        finally:
            if self.cleanup is not None:
                await self.cleanup.wait()
            self.inside -= 1


class Node:
    """A converger with everything around it, and what it reported."""

    def __init__(self, root: Path) -> None:
        self.runtime = FakeRuntime(root / "engine")
        self.runtime.tools["roost.home"] = self._home
        self.runtime.add_image(IMAGE)
        self.repositories = ScriptedRepositories(self.runtime)
        self.reports: list[Report] = []
        self.room: Exception | None = None
        self.seeded: list[str] = []
        self.logs = StartLogs(root / "logs")
        self.generation = self.start = 0
        tools = StartTools(self.runtime, self.repositories, self._room, self._auth, "{home}/{repo}", True)
        self.converger = Converger(tools, self.logs, self.reports.append, stop_grace_s=0.1)

    async def _room(self) -> None:
        if self.room is not None:
            raise self.room

    async def _auth(self, ref: Any) -> None:
        return None

    async def _home(self, tool: Tool, image: ImageInfo, volume: VolumeName | None) -> ToolResult:
        if tool.args[0] == "resolve":
            answer: dict[str, Any] = {"user": {"uid": 1000, "gid": 1000, "name": "dev", "home": "/home/dev"}}
        else:
            await asyncio.sleep(0)
            assert volume is not None
            self.seeded.append(volume)
            answer = {"state": "seeded", "files": 1, "bytes": 2}
        return ToolResult(0, json.dumps(answer).encode(), b"")

    def wanted(self, desired: Desired, *, repo: bool = True, facts: Facts | None = None, **more: Any) -> Assignment:
        """The next assignment, as the server counts them."""
        self.generation += 1
        self.start += desired is Desired.running
        spec = WorkspaceSpec(name="w", owner="o", image=IMAGE, repo=RepoSpec(url="u", name="r") if repo else None)
        values = {"generation": self.generation, "start": self.start} | more
        return Assignment(workspace=WORKSPACE, desired=desired, spec=spec, facts=facts or Facts(), **values)

    def assign(self, desired: Desired, **more: Any) -> Assignment:
        a = self.wanted(desired, **more)
        self.converger.assign(a)
        return a

    async def idle(self) -> None:
        """Until nobody works on anything."""
        async with asyncio.timeout(5):
            while self.converger._tasks:
                await asyncio.wait(list(self.converger._tasks))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110 - the condition is anything
                await asyncio.sleep(0.001)

    async def called(self, method: str, times: int = 1) -> None:
        await self.until(lambda: self.count(method) >= times)

    async def called_again(self, method: str) -> None:
        await self.called(method, self.count(method) + 1)

    def count(self, method: str) -> int:
        return sum(name == method for name, _ in self.runtime.calls)

    @property
    def states(self) -> list[Observed]:
        return [report.observed for report in self.reports if report.observed is not None]

    def seen(self) -> Observed | None:
        """The newest observed state that was told."""
        return self.last.observed

    @property
    def last(self) -> Report:
        return next(report for report in reversed(self.reports) if report.observed is not None)

    def steps(self, start: int | None = None) -> list[tuple[str, str]]:
        return [(r.step.step, r.step.status) for r in self.reports
                if r.step is not None and r.step.status != "running" and start in (None, r.start)]  # fmt: skip

    async def up(self) -> Assignment:
        a = self.assign(Desired.running)
        await self.idle()
        assert self.last.observed is Observed.running, self.last
        return a

    async def state(self) -> str | None:
        status = await self.runtime.status(BOX)
        return None if status is None else f"{status.state} {status.labels['roost.dev/start']}"


@asynccontextmanager
async def working(root: Path) -> AsyncIterator[Node]:
    node = Node(root)
    try:
        yield node
    finally:
        await node.converger.close()
        await node.runtime.close()


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    async with working(tmp_path) as node:
        yield node


STEPS = ["image", "user", "volume", "seed", "container", "repository"]


async def test_a_first_start_and_a_restart_that_skips_what_is_known(node: Node) -> None:
    await node.up()
    assert node.states == [Observed.creating, Observed.running]
    assert [name for name, _ in node.steps(1)] == STEPS
    assert [step.step for step in node.last.steps] == STEPS
    assert node.last.facts is not None and node.last.facts.ever_ready and node.last.total_ms is not None
    node.runtime.calls.clear()
    await node.up()
    assert [status for _, status in node.steps(2)] == ["skipped", "skipped", "done", "skipped", "done", "skipped"]
    assert node.count("run_tool") == 0
    assert await node.state() == "running 2"
    assert (node.seeded, node.repositories.placed) == ([HOME], [1])
    path = node.logs.path(WORKSPACE)
    assert path is not None and path.stem == "2"
    assert "container: done" in path.read_text()


async def test_the_same_twice_and_older_ones_change_nothing(node: Node) -> None:
    release = node.runtime.hold("pull")
    node.runtime._images.clear()
    a = node.assign(Desired.running)
    await node.called("pull")
    node.converger.assign(a)
    release.set()
    await node.idle()
    assert node.states == [Observed.creating, Observed.running]
    assert node.count("pull") == 1
    node.assign(Desired.stopped)
    await node.idle()
    node.converger.assign(a)
    node.converger.assign(a.model_copy(update={"start": 5}))  # of an older generation all the same
    await node.idle()
    assert node.seen() is Observed.stopped
    assert await node.state() is None


async def test_an_assignment_that_is_met_costs_one_question(node: Node) -> None:
    a = await node.up()
    node.runtime.calls.clear()
    node.converger.assign(a)
    await node.idle()
    assert node.runtime.calls == [("status", BOX)]
    assert node.seen() is Observed.running
    assert await node.state() == "running 1"


@pytest.mark.parametrize("method", ["image", "pull", "run_tool", "create_volume", "status", "create", "start"])
@pytest.mark.parametrize("then", [Desired.stopped, Desired.deleted, Desired.purged, Desired.running])
async def test_a_start_is_cut_off_by_what_is_wanted_next(node: Node, method: str, then: Desired) -> None:
    node.runtime._images.clear()
    node.runtime.hold(method)
    node.assign(Desired.running)
    await node.called(method)
    node.assign(then)
    await node.idle()
    aims = {Desired.stopped: Observed.stopped, Desired.running: Observed.running}
    assert node.last.observed is aims.get(then, Observed.deleted)
    assert await node.state() == ("running 2" if then is Desired.running else None)
    volumes = {volume.name: volume.trashed_at for volume in await node.runtime.volumes()}
    if then is Desired.purged:
        assert volumes == {}
    if then is Desired.deleted:
        assert None not in volumes.values()


async def test_what_was_cancelled_has_cleaned_up_before_the_next_begins(node: Node) -> None:
    """However many assignments come meanwhile: the second must not wait alone, and the third run beside the first."""
    node.repositories.hold = asyncio.Event()
    node.repositories.cleanup = asyncio.Event()
    node.assign(Desired.running)
    await node.until(lambda: node.repositories.inside == 1)
    node.repositories.hold.set()
    deletes = node.count("delete")
    for _ in range(3):
        node.assign(Desired.running)
        await asyncio.sleep(0.01)
    assert node.count("delete") == deletes
    node.repositories.cleanup.set()
    await node.idle()
    assert node.repositories.most == 1
    assert await node.state() == "running 4"


@pytest.mark.parametrize("step", STEPS)
async def test_an_error_of_each_step_is_told_with_the_steps(node: Node, step: str) -> None:
    error: Exception = EngineFailed("no")
    match step:
        case "image":
            error = node.room = PoolFull("full")
        case "user":
            error = UnknownUser("nobody there")
            problem = json.dumps({"error": error.to_problem()}).encode()
            node.runtime.tools["roost.home"] = lambda *_: ToolResult(1, problem, b"")
        case "volume":
            node.runtime.fail_next("create_volume", error)
        case "seed":
            error = HomeFull("full")
            ours, problem = node.runtime.tools["roost.home"], json.dumps({"error": error.to_problem()}).encode()
            node.runtime.tools["roost.home"] = lambda tool, image, volume: (
                ToolResult(1, problem, b"") if tool.args[0] == "seed" else ours(tool, image, volume)
            )
        case "container":
            node.runtime.fail_next("create", error)
        case "repository":
            error = node.repositories.failure = CloneFailed("git says no")
    node.assign(Desired.running)
    await node.idle()
    assert node.seen() is Observed.error
    assert node.last.error is not None and node.last.error["code"] == error.code  # type: ignore[attr-defined]
    assert [item.step for item in node.last.steps] == STEPS[: STEPS.index(step) + 1]
    assert node.last.steps[-1].status == "failed"
    assert node.last.total_ms is not None
    path = node.logs.path(WORKSPACE)
    assert path is not None and error.code in path.read_text()  # type: ignore[attr-defined]


async def test_a_defect_of_ours_is_an_error_like_any_other(node: Node) -> None:
    node.repositories.failure = ZeroDivisionError("oops")
    node.assign(Desired.running)
    await node.idle()
    assert node.last.error is not None and node.last.error["code"] == "internal"
    assert node.last.steps[-1].status == "failed"
    assert not node.converger.busy(WORKSPACE)
    node.repositories.failure = None
    await node.up()


async def test_a_tool_that_prints_nonsense_is_named(node: Node) -> None:
    for stdout in (b"", b"[1]", b"17", b"Traceback"):
        node.runtime.tools["roost.home"] = lambda *_, stdout=stdout: ToolResult(1, stdout, b"its last words")
        node.assign(Desired.running)
        await node.idle()
        assert node.last.error is not None and "its last words" in node.last.reason


async def test_a_crash_is_told_once(node: Node) -> None:
    await node.up()
    node.runtime.crash(BOX, 139, "Error")
    node.converger.look(BOX)
    await node.idle()
    assert node.last.crashed and node.last.observed is Observed.error
    assert "139" in node.last.reason
    count = len(node.reports)
    node.converger.look(BOX)
    node.converger.again()
    for _ in range(3):
        await node.converger.relist()
    await node.idle()
    assert len(node.reports) == count, "each one counts as another crash, and puts the retry off"


async def test_the_end_of_a_container_is_not_undone_under_the_same_start(node: Node) -> None:
    """The server decides when: a server that comes back with the same assignment must not circumvent the back-off."""
    a = await node.up()
    node.runtime.crash(BOX)
    node.converger.look(BOX)
    await node.idle()
    node.converger.assign(a)
    await node.idle()
    assert node.last.crashed
    assert node.count("start") == 1


async def test_a_container_that_is_gone_or_unknown_is_a_crash(node: Node) -> None:
    await node.up()
    await node.runtime.delete(BOX)
    await node.converger.relist()
    await node.idle()
    assert node.last.crashed and "gone" in node.last.reason
    await node.up()
    node.runtime.lose(BOX)
    node.converger.look(BOX)
    await node.idle()
    assert node.last.crashed
    await node.up()
    assert await node.state() == "running 3"


async def test_a_failed_start_stays_the_failure_it_was(node: Node) -> None:
    node.repositories.failure = CloneFailed("git says no")
    a = node.assign(Desired.running)
    await node.idle()
    node.runtime.crash(BOX)
    count = len(node.reports)
    node.converger.look(BOX)
    node.converger.again()
    await node.converger.relist()
    node.converger.assign(a)
    await node.idle()
    assert len(node.reports) == count
    assert node.last.error is not None and node.last.error["code"] == "repo.clone_failed"


async def test_a_crash_while_somebody_works_is_seen_afterwards(node: Node) -> None:
    node.repositories.hold = asyncio.Event()
    node.assign(Desired.running)
    await node.until(lambda: node.repositories.inside == 1)
    node.runtime.crash(BOX)
    node.converger.look(BOX)
    node.repositories.hold.set()
    await node.idle()
    assert node.states == [Observed.creating, Observed.running, Observed.error]
    assert node.last.crashed


async def test_a_crash_during_a_look_is_seen(node: Node) -> None:
    await node.up()
    release = node.runtime.hold("status")
    node.converger.look(BOX)
    await node.called_again("status")
    release.set()
    await asyncio.sleep(0)  # it passes the hold, and answers "running" …
    node.runtime.crash(BOX)  # … or not; either way the event that follows must not be lost
    node.converger.look(BOX)
    await node.idle()
    assert node.last.crashed


async def test_a_look_that_fails_is_no_end(node: Node) -> None:
    await node.up()
    for error in (EngineUnreachable("away"), ZeroDivisionError("a defect")):
        node.runtime.fail_next("status", error)
        node.converger.look(BOX)
        await node.idle()
        assert node.seen() is Observed.running
        assert not node.converger.busy(WORKSPACE)
    node.runtime.crash(BOX)
    node.converger.look(BOX)
    await node.idle()
    assert node.last.crashed


async def test_the_engine_away_and_back(node: Node) -> None:
    await node.up()
    node.runtime.engine_down = True
    node.converger.again()
    await node.idle()
    assert node.seen() is Observed.running
    with pytest.raises(EngineUnreachable):
        await node.converger.relist()
    node.assign(Desired.stopped)
    await node.idle()
    assert node.last.error is not None and node.last.error["code"] == "engine.unreachable"
    node.runtime.engine_down = False
    node.converger.again()  # it was to be stopped, and runs
    await node.idle()
    assert node.seen() is Observed.stopped
    assert await node.state() is None


async def test_a_stop_that_failed_is_done_again_under_the_same_number(node: Node) -> None:
    await node.up()
    node.runtime.fail_next("trash_volume", EngineFailed("not now"))
    a = node.assign(Desired.deleted)
    await node.idle()
    assert node.seen() is Observed.error
    node.converger.assign(a)
    await node.idle()
    assert node.seen() is Observed.deleted


async def test_what_somebody_else_started_is_stopped_again(node: Node) -> None:
    await node.up()
    a = node.assign(Desired.stopped)
    await node.idle()
    image = await node.runtime.image(IMAGE)  # type: ignore[arg-type]
    assert image is not None
    await node.runtime.create(ContainerSpec(BOX, image, ContainerUser(1, 1, "x", "/x"), "x"))
    await node.runtime.start(BOX)
    strangers = await node.converger.relist()
    await node.idle()
    assert strangers == []
    assert await node.state() is None
    assert node.last.generation == a.generation


async def test_strangers_are_told_and_left_alone(node: Node) -> None:
    image = await node.runtime.image(IMAGE)  # type: ignore[arg-type]
    assert image is not None
    stranger = ContainerId("roost-other")
    await node.runtime.create(ContainerSpec(stranger, image, ContainerUser(1, 1, "x", "/x"), "x"))
    await node.runtime.start(stranger)
    assert [status.container for status in await node.converger.relist()] == [stranger]
    node.converger.look(stranger)
    await node.idle()
    assert [status.state for status in await node.runtime.list()] == ["running"]


async def test_a_lost_volume_is_seeded_and_filled_anew(node: Node) -> None:
    await node.up()
    await node.runtime.trash_volume(HOME)
    await node.runtime.purge_volume(HOME)
    await node.up()
    assert (node.seeded, node.repositories.placed) == ([HOME, HOME], [1, 2])


async def test_a_lost_volume_is_filled_even_if_the_next_start_cuts_the_first_off(node: Node) -> None:
    """The server's facts are older than what the node found out meanwhile."""
    facts = node.last.facts if (await node.up()) and node.reports else None
    assert facts is not None and facts.seeded_digest is not None
    await node.runtime.trash_volume(HOME)
    await node.runtime.purge_volume(HOME)
    node.runtime.hold("run_tool")
    node.assign(Desired.running, facts=facts)
    await node.until(lambda: node.runtime.calls[-1][0] == "run_tool")
    node.assign(Desired.running, facts=facts)
    await node.idle()
    assert node.seen() is Observed.running
    assert (node.seeded, node.repositories.placed) == ([HOME, HOME], [1, 3])


async def test_a_node_that_begins_in_the_middle_finishes_the_start(node: Node) -> None:
    """A container of this start runs, but the repository was never placed."""
    facts = Facts(ever_ready=True)
    node.repositories.hold = asyncio.Event()
    a = node.assign(Desired.running, facts=facts)
    await node.until(lambda: node.repositories.inside == 1)
    await node.converger.close()
    node.repositories.hold = None
    second = Converger(node.converger._tools, node.logs, node.reports.append, stop_grace_s=0.1)
    second.assign(a.model_copy(update={"facts": Facts(ever_ready=True)}))
    node.converger = second
    await node.idle()
    assert node.seen() is Observed.running
    assert node.repositories.placed == [1]
    assert node.count("start") == 1, "its container was left alone"


async def test_a_user_is_resolved_anew_when_the_image_changed(node: Node) -> None:
    await node.up()
    node.runtime.add_image(IMAGE, content="newer")
    node.runtime.fail_next("run_tool", EngineFailed("no"))
    node.assign(Desired.running)
    await node.idle()
    assert node.seen() is Observed.error
    node.runtime.calls.clear()
    await node.up()
    assert dict(node.steps(3))["user"] == "done", "the old user belongs to the old image"


async def test_undelete_restores_and_purge_destroys(node: Node) -> None:
    await node.up()
    kept = node.runtime.volume_path(HOME) / "work"
    kept.write_text("of a day")
    node.assign(Desired.deleted)
    await node.idle()
    assert node.seen() is Observed.deleted
    node.assign(Desired.stopped)
    await node.idle()
    assert node.seen() is Observed.stopped
    await node.up()
    assert kept.read_text() == "of a day"
    assert len(node.seeded) == 1
    node.assign(Desired.deleted)
    node.assign(Desired.purged)
    await node.idle()
    assert await node.runtime.volumes() == []
    assert node.logs.path(WORKSPACE) is None
    node.converger.assign(node.wanted(Desired.purged, generation=node.generation))
    await node.idle()
    assert node.seen() is Observed.deleted


async def test_a_start_that_overtakes_the_stop_of_an_undelete_brings_home_back(node: Node) -> None:
    await node.up()
    (node.runtime.volume_path(HOME) / "work").write_text("of a day")
    node.assign(Desired.deleted)
    await node.idle()
    node.assign(Desired.stopped)
    await node.up()
    assert (node.runtime.volume_path(HOME) / "work").read_text() == "of a day"
    assert len(node.seeded) == 1


async def test_a_stop_without_the_home_that_was_there_is_an_error(node: Node) -> None:
    await node.up()
    await node.runtime.trash_volume(HOME)
    await node.runtime.purge_volume(HOME)
    node.assign(Desired.stopped)
    await node.idle()
    assert node.last.error is not None and node.last.error["code"] == "volume.not_found"


async def test_closing_leaves_workspaces_as_they_are(node: Node) -> None:
    await node.up()
    node.runtime.hold("status")
    node.converger.look(BOX)
    await node.called_again("status")
    await node.converger.close()
    assert await node.state() == "running 1"


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["running", "running", "stopped", "deleted", "same", "crash", "lose", "look", "again", "relist",
             "fail", "down", "back", "pause", "idle"]
        ),
        st.integers(0, 6),
    ),
    max_size=25,
)  # fmt: skip
FAILING = ["status", "create", "start", "delete", "stop", "volumes", "create_volume", "trash_volume", "run_tool"]


@given(actions=ACTIONS, last=st.sampled_from([Desired.running, Desired.stopped, Desired.deleted]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_happens_it_ends_in_what_is_wanted(
    tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[str, int]], last: Desired
) -> None:
    async def story() -> None:
        async with working(tmp_path_factory.mktemp("story")) as node:
            current: Assignment | None = None
            for action, number in actions:
                match action:
                    case "running" | "stopped" | "deleted":
                        current = node.assign(Desired(action))
                    case "same" if current is not None:
                        node.converger.assign(current)
                    case "crash" | "lose" if BOX in node.runtime._containers:
                        (node.runtime.crash if action == "crash" else node.runtime.lose)(BOX)
                        node.converger.look(BOX)
                    case "look":
                        node.converger.look(BOX)
                    case "again":
                        node.converger.again()
                    case "relist" if not node.runtime.engine_down:
                        await node.converger.relist()
                    case "fail":
                        node.runtime.fail_next(FAILING[number % len(FAILING)], EngineFailed("no"))
                    case "down" | "back":
                        node.runtime.engine_down = action == "down"
                    case "pause":
                        for _ in range(number):
                            await asyncio.sleep(0)
                    case "idle":
                        await node.idle()
            node.runtime.engine_down = False
            node.runtime._failures.clear()
            node.assign(last)
            await node.idle()
            wanted = {"running": Observed.running, "stopped": Observed.stopped, "deleted": Observed.deleted}
            assert node.last.observed is wanted[last], node.last
            assert await node.state() == (f"running {node.start}" if last is Desired.running else None)
            assert not node.converger.busy(WORKSPACE)
            ends = [report for report in node.reports if report.crashed]
            assert len({report.start for report in ends}) == len(ends), "one crash a start"
            order = [(report.generation, report.start) for report in node.reports]
            assert order == sorted(order), "no report of an older assignment after one of a newer"

    asyncio.run(story())
