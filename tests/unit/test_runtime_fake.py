"""The fake runtime's own verbs: what reconcilers' tests do to it. (What it shares with the others: conformance.)"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from roost.errors import EngineTimeout, EngineUnreachable, ImageNotFound
from roost.runtimes.fake import FakeRuntime
from roost.runtimes.protocol import (
    LABEL_START,
    ContainerId,
    ContainerSpec,
    ContainerState,
    ContainerUser,
    ImageRef,
    Runtime,
    Tool,
    ToolResult,
)

NAME = ContainerId("roost-a")


@pytest.fixture
def fake(tmp_path: Path) -> FakeRuntime:
    made = FakeRuntime(tmp_path)
    made.add_image("example.org/tiny:1")
    return made


async def up(fake: FakeRuntime) -> None:
    image = await fake.image(ImageRef("example.org/tiny:1"))
    assert image is not None
    user = ContainerUser(1000, 1000, "dev", "/home/dev")
    await fake.create(ContainerSpec(NAME, image, user, "a", labels={LABEL_START: "1"}))
    await fake.start(NAME)


async def test_it_is_a_runtime(fake: FakeRuntime) -> None:
    runtime: Runtime = fake
    assert runtime.name == "fake"


async def test_failures_are_used_up(fake: FakeRuntime) -> None:
    fake.fail_next("create", EngineTimeout("slow"), times=2)
    for _ in range(2):
        with pytest.raises(EngineTimeout):
            await up(fake)
    await up(fake)
    assert [name for method, name in fake.calls if method == "create"] == [NAME] * 3


async def test_hold(fake: FakeRuntime) -> None:
    release = fake.hold("start")
    starting = asyncio.create_task(up(fake))
    await asyncio.sleep(0.05)
    status = await fake.status(NAME)
    assert status is not None and status.state is ContainerState.created
    release.set()
    await starting


async def test_the_engine_goes_away(fake: FakeRuntime) -> None:
    await up(fake)
    events = fake.events()
    waiting = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    fake.engine_down = True
    with pytest.raises(EngineUnreachable):
        await waiting
    with pytest.raises(EngineUnreachable):
        await fake.status(NAME)
    fake.engine_down = False
    status = await fake.status(NAME)
    assert status is not None and status.state is ContainerState.running


async def test_out_of_memory_and_lost(fake: FakeRuntime) -> None:
    await up(fake)
    fake.oom(NAME)
    status = await fake.status(NAME)
    assert status is not None and (status.reason, status.exit_code) == ("OOMKilled", 137)
    fake.lose(NAME)
    status = await fake.status(NAME)
    assert status is not None and status.state is ContainerState.unknown


async def test_pull_only_what_the_registry_has(fake: FakeRuntime) -> None:
    info = fake.add_image("example.org/far:1", present=False)
    assert await fake.image(info.ref) is None
    assert await fake.pull(info.ref) == info == await fake.image(info.ref)
    with pytest.raises(ImageNotFound):
        await fake.pull(ImageRef("example.org/none:1"))


async def test_tools_can_be_answered_for(fake: FakeRuntime) -> None:
    image = await fake.image(ImageRef("example.org/tiny:1"))
    assert image is not None
    fake.tools["roost.home"] = lambda tool, image, volume: ToolResult(0, tool.args[0].encode(), b"")
    assert (await fake.run_tool(Tool("roost.home", ("resolve",)), image)).stdout == b"resolve"
