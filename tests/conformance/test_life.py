"""Create, start, stop, restart, delete: each may be said twice; crashes are seen; a new process of ours takes over."""

from __future__ import annotations

import asyncio
import time

import pytest

from roost.errors import ContainerNotFound, EngineFailed, ImageNotFound, VolumeNotFound, WorkspaceNotRunning
from roost.runtimes.protocol import LABEL_START, ContainerState, ExecSpec, ImageDigest
from tests.conformance.subjects import DEV, HOME, REF, Subject, until

pytestmark = pytest.mark.usefixtures("subject")


async def state(subject: Subject) -> ContainerState | None:
    status = await subject.runtime.status(subject.container)
    return status.state if status else None


async def test_a_life(subject: Subject) -> None:
    runtime, name = subject.runtime, subject.container
    await runtime.check()
    assert await state(subject) is None
    await runtime.create_volume(subject.volume, 0, {})
    await runtime.create(subject.spec())
    assert await state(subject) is ContainerState.created
    before = time.time()
    await runtime.start(name)
    status = await runtime.status(name)
    assert status is not None and status.state is ContainerState.running
    assert status.labels == subject.spec().labels
    assert status.exit_code is None and status.reason == ""
    assert status.started_at is not None and before - 2 < status.started_at < time.time() + 2
    assert [found for found in await runtime.list() if found.container == name] == [status]
    await runtime.stop(name, 5)
    status = await runtime.status(name)
    assert status is not None and status.state is ContainerState.exited and status.exit_code == 0
    await runtime.delete(name)
    assert await state(subject) is None
    assert name not in {found.container for found in await runtime.list()}


async def test_everything_may_be_said_twice(subject: Subject) -> None:
    runtime, name = subject.runtime, subject.container
    assert await runtime.create_volume(subject.volume, 0, {}) is True
    assert await runtime.create_volume(subject.volume, 0, {}) is False
    await runtime.stop(name, 1)  # absent
    await runtime.delete(name)
    await runtime.create(subject.spec())
    await runtime.create(subject.spec())
    await runtime.stop(name, 1)  # never started
    await runtime.start(name)
    await runtime.start(name)
    await runtime.create(subject.spec())
    assert await state(subject) is ContainerState.running
    await runtime.stop(name, 1)
    await runtime.stop(name, 1)
    await runtime.delete(name)
    await runtime.delete(name)


async def test_at_the_same_time(subject: Subject) -> None:
    """The same call from several sides is one call."""
    runtime, name = subject.runtime, subject.container
    await runtime.create_volume(subject.volume, 0, {})
    await asyncio.gather(*(runtime.create(subject.spec()) for _ in range(3)))
    assert [found.container for found in await runtime.list()].count(name) == 1
    await asyncio.gather(*(runtime.start(name) for _ in range(2)))
    assert await state(subject) is ContainerState.running
    await asyncio.gather(*(runtime.delete(name) for _ in range(3)))
    assert await state(subject) is None


async def test_another_spec_needs_a_delete(subject: Subject) -> None:
    await subject.up(1)
    with pytest.raises(EngineFailed):
        await subject.runtime.create(subject.spec(2))
    assert await state(subject) is ContainerState.running
    await subject.restart(2)
    status = await subject.runtime.status(subject.container)
    assert status is not None and status.labels[LABEL_START] == "2"


async def test_an_ended_container_is_not_started_again(subject: Subject) -> None:
    await subject.up()
    await subject.runtime.stop(subject.container, 5)
    with pytest.raises(EngineFailed):
        await subject.runtime.start(subject.container)


async def test_what_is_not_there(subject: Subject) -> None:
    runtime, name = subject.runtime, subject.container
    with pytest.raises(ContainerNotFound):
        await runtime.start(name)
    with pytest.raises(ContainerNotFound):
        await runtime.stats(name)
    with pytest.raises(ContainerNotFound):
        await runtime.exec(name, ExecSpec(("true",), DEV, HOME))
    with pytest.raises(ContainerNotFound):
        async for _ in runtime.logs(name):
            pass
    with pytest.raises(VolumeNotFound):
        await runtime.create(subject.spec())
    await runtime.create_volume(subject.volume, 0, {})
    gone = type(subject.image)(subject.image.ref, ImageDigest("sha256:" + "0" * 64), 0)
    with pytest.raises(ImageNotFound):
        await runtime.create(subject.spec(image=gone))
    assert await state(subject) is None, "a failed create left something"


async def test_not_running(subject: Subject) -> None:
    runtime, name = subject.runtime, subject.container
    await runtime.create_volume(subject.volume, 0, {})
    await runtime.create(subject.spec())
    for _ in ("created", "exited"):
        with pytest.raises(WorkspaceNotRunning):
            await runtime.exec(name, ExecSpec(("true",), DEV, HOME))
        with pytest.raises(WorkspaceNotRunning):
            await runtime.stats(name)
        if await state(subject) is ContainerState.created:
            await runtime.start(name)
            await runtime.stop(name, 5)


async def test_home_survives(subject: Subject) -> None:
    await subject.up()
    assert (await subject.run("sh", "-c", "echo mine >kept; echo x >/tmp/lost-$0", subject.ident)).code == 0
    await subject.restart(2)
    assert (await subject.run("cat", "kept")).out == b"mine\n"
    if subject.real:
        assert (await subject.run("ls", f"/tmp/lost-{subject.ident}")).code != 0


async def test_home_survives_an_image_upgrade(subject: Subject) -> None:
    await subject.up()
    assert (await subject.run("sh", "-c", "echo mine >kept")).code == 0
    await subject.restart(2, image=subject.upgrade)
    assert (await subject.run("cat", "kept")).out == b"mine\n"
    if subject.real:
        assert (await subject.run("cat", "/etc/release")).out == b"second\n"


async def test_crash_of_the_container(subject: Subject) -> None:
    """An event, a status that says so, commands ended, and a new start works."""
    heard = asyncio.Event()

    async def listen() -> None:
        async for event in subject.runtime.events():
            if event.container == subject.container and await state(subject) is ContainerState.exited:
                heard.set()

    listening = asyncio.create_task(listen())
    try:
        await subject.up()
        session = await subject.runtime.exec(subject.container, ExecSpec(("sleep", "100"), DEV, HOME))
        await subject.crash()
        await asyncio.wait_for(heard.wait(), 10)
        status = await subject.runtime.status(subject.container)
        assert status is not None and status.state is ContainerState.exited and status.exit_code == 137
        assert status.reason
        assert await asyncio.wait_for(session.wait(), 10) == 137
        await asyncio.wait_for(session.close(), 10)
        await subject.restart(2)
        assert (await subject.run("echo", "up")).out == b"up\n"
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)


async def test_a_new_process_takes_over(subject: Subject) -> None:
    await subject.up()
    other = subject.takeover()
    try:
        status = await other.status(subject.container)
        assert status is not None and status.state is ContainerState.running
        session = await other.exec(subject.container, ExecSpec(("echo", "still"), DEV, HOME))
        assert [data async for _, data in session.output()] == [b"still\n"]
        assert await session.wait() == 0
        await session.close()
        await other.create(subject.spec())
        await other.stop(subject.container, 5)
        await other.delete(subject.container)
    finally:
        await other.close()
    assert await state(subject) is None


async def test_stop_is_quick_and_complete(subject: Subject) -> None:
    await subject.up()
    session = await subject.runtime.exec(subject.container, ExecSpec(("sh", "-c", "sleep 100; true"), DEV, HOME))
    begun = time.monotonic()
    await subject.runtime.stop(subject.container, 10)
    assert time.monotonic() - begun < 5
    assert await asyncio.wait_for(session.wait(), 5) != 0
    await session.close()


async def test_stats(subject: Subject) -> None:
    await subject.up()
    stats = await subject.runtime.stats(subject.container)
    assert stats.memory_bytes > 0 and stats.pids >= 2

    async def used() -> bool:
        return (await subject.runtime.stats(subject.container)).cpu_seconds > 0

    await until(used, "CPU time is counted")


async def test_images(subject: Subject) -> None:
    info = await subject.runtime.image(subject.image.ref)
    assert info == subject.image
    assert info.digest.startswith("sha256:") and info.size_bytes > 0
    assert info.user == "dev" and "FROM_IMAGE=yes" in info.env and info.labels["made-by"] == "roost-test"
    assert {REF} <= {found.ref for found in await subject.runtime.images()}
    assert await subject.runtime.image(type(info.ref)("roost.test/none:1")) is None
