"""Death of everything around a container: of ours at every step, of containerd, of the shim. Real kill -9 each time."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

from roost.errors import EngineUnreachable, RoostError
from roost.linux.cgroup import Group
from roost.runtimes.protocol import Channel, ContainerState, ExecSession, ExecSpec
from tests.conformance.conftest import cri, cri_engine
from tests.conformance.engine import TestEngine
from tests.conformance.subjects import DEV, HOME, REF, CriSubject, until

__all__ = ["cri", "cri_engine"]

ROOT = Path(__file__).parents[2]


def child_order(subject: CriSubject, engine: TestEngine, do: str, start: int) -> str:
    config = engine.config()
    return json.dumps(
        {
            "do": do,
            "socket": str(config.socket),
            "run_dir": str(config.run_dir),
            "log_dir": str(config.log_dir),
            "tools_dir": str(config.tools_dir),
            "volumes": str(engine.volumes.homes.parent),
            "cgroup_parent": config.cgroup_parent,
            "container": subject.container,
            "volume": subject.volume,
            "image": REF,
            "ident": subject.ident,
            "start": str(start),
        }
    )


async def child(
    subject: CriSubject, engine: TestEngine, do: str, start: int, at: str = ""
) -> asyncio.subprocess.Process:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}/src:{ROOT}", "ROOST_CRASH_AT": at}
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.conformance.crasher", child_order(subject, engine, do, start),
        cwd=ROOT, env=env, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await asyncio.wait_for(process.stdout.readline(), 30)).decode().strip()


async def works(subject: CriSubject, start: int) -> None:
    """After a crash: a process of ours that begins anew gets a running container, by the reconciler's steps."""
    runtime = subject.runtime
    await runtime.recover()  # type: ignore[attr-defined]
    status = await runtime.status(subject.container)
    if status is not None and (
        status.state not in (ContainerState.running, ContainerState.created)
        or status.labels != subject.spec(start).labels
    ):
        await runtime.delete(subject.container)
    await subject.up(start)
    done = await subject.run("sh", "-c", "echo $$ >>starts; cat starts | wc -l")
    assert done.code == 0, done
    found = [status for status in await runtime.list() if status.container == subject.container]
    assert [status.state for status in found] == [ContainerState.running]


@pytest.mark.parametrize("point", ["cri.create.sandbox", "cri.create.container", "cri.start.started"])
async def test_killed_while_making(cri: CriSubject, cri_engine: TestEngine, point: str) -> None:
    await cri.runtime.create_volume(cri.volume, 0, {})
    cri.own_volume()
    process = await child(cri, cri_engine, "up", 1, point)
    await process.communicate()
    assert process.returncode == -signal.SIGKILL
    status = await cri.runtime.status(cri.container)
    assert status is not None, "what is half-made is seen"
    if point == "cri.create.sandbox":
        assert status.state is ContainerState.unknown
    await works(cri, 1)


async def test_half_made_can_be_deleted(cri: CriSubject, cri_engine: TestEngine) -> None:
    await cri.runtime.create_volume(cri.volume, 0, {})
    process = await child(cri, cri_engine, "up", 1, "cri.create.sandbox")
    await process.communicate()
    assert cri.container in {status.container for status in await cri.runtime.list()}
    await cri.runtime.delete(cri.container)
    assert await cri.runtime.status(cri.container) is None


@pytest.mark.parametrize("point", ["cri.delete.stopped", "cri.delete.removed"])
async def test_killed_while_deleting(cri: CriSubject, cri_engine: TestEngine, point: str) -> None:
    await cri.up(1)
    process = await child(cri, cri_engine, "delete", 1, point)
    await process.communicate()
    assert process.returncode == -signal.SIGKILL
    await cri.runtime.delete(cri.container)
    assert await cri.runtime.status(cri.container) is None
    assert not Group(f"{cri_engine.ident}/{cri.container}").exists()
    await works(cri, 2)


async def test_killed_at_any_moment(cri: CriSubject, cri_engine: TestEngine) -> None:
    """In the middle of the engine's work, where a call of ours is cut off: names stay reserved for a while."""
    await cri.runtime.create_volume(cri.volume, 0, {})
    cri.own_volume()
    for number, delay_ms in enumerate((5, 30, 60, 90, 120, 160, 200, 260), start=1):
        process = await child(cri, cri_engine, "up", number)
        assert await line(process) == "begins"
        await asyncio.sleep(delay_ms / 1000)
        with suppress(ProcessLookupError):  # on a quick machine it may be through by then
            process.kill()
        await process.communicate()
        await works(cri, number)
        await cri.runtime.delete(cri.container)


@pytest.mark.parametrize("point", ["", "cri.exec.made"])
async def test_killed_while_a_command_runs(cri: CriSubject, cri_engine: TestEngine, point: str) -> None:
    """The command is ended by the next process: nobody can have its streams."""
    await cri.up()
    process = await child(cri, cri_engine, "exec", 1, point)
    if not point:
        assert [await line(process), await line(process)] == ["begins", "runs"]
        process.kill()
    await process.communicate()
    left = list((cri_engine.run_dir / "cri/exec").iterdir())
    assert len(left) == 1
    await cri.runtime.recover()  # type: ignore[attr-defined]
    assert not left[0].exists()

    async def ended() -> bool:
        return b"sleep 1000" not in (await cri.run("ps", "-o", "args")).out

    await until(ended, "the command is gone")


async def test_recover_leaves_what_runs_here(cri: CriSubject) -> None:
    await cri.up()
    session = await cri.runtime.exec(cri.container, ExecSpec(("cat",), DEV, HOME, stdin=True))
    await cri.runtime.recover()  # type: ignore[attr-defined]
    await session.write(b"still here")
    await session.close_stdin()
    assert [data async for _, data in session.output()] == [b"still here"]
    await session.close()


@pytest.mark.parametrize("point", ["", "cri.view.made", "cri.view.mounted"])
async def test_killed_while_a_tool_runs(cri: CriSubject, cri_engine: TestEngine, point: str) -> None:
    await cri.runtime.create_volume(cri.volume, 0, {})
    process = await child(cri, cri_engine, "tool", 1, point)
    views = cri_engine.run_dir / "cri/views"

    async def mounted() -> bool:
        return str(views) in Path("/proc/mounts").read_text()

    if not point:
        await until(mounted, "the view is mounted")
        process.kill()
    await process.communicate()
    assert await mounted() == (point != "cri.view.made")
    await cri.runtime.recover()  # type: ignore[attr-defined]
    assert not await mounted()
    assert not views.is_dir() or list(views.iterdir()) == []
    await end_orphans()


async def end_orphans() -> None:
    """The tool itself, whose parent was killed: a hanging one of the tests, ended by them."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"tests.conformance.tool" in command:
                os.killpg(int(entry.name), signal.SIGKILL)


async def read_all(session: ExecSession) -> bytes:
    return b"".join([data async for channel, data in session.output() if channel is Channel.stdout])


async def test_containerd_is_killed(cri: CriSubject, cri_engine: TestEngine) -> None:
    """Container and command go on; calls fail at once meanwhile; then all works as before."""
    await cri.up()
    pid1 = cri.pid1()
    session = await cri.runtime.exec(
        cri.container, ExecSpec(("sh", "-c", "read x; echo $x; read y; echo $y; exit 5"), DEV, HOME, stdin=True)
    )

    async def hear() -> None:
        async for _ in cri.runtime.events():
            pass

    hearing = asyncio.create_task(hear())
    await session.write(b"before\n")
    await asyncio.sleep(0.2)
    await cri_engine.kill()
    with pytest.raises(EngineUnreachable):
        await asyncio.wait_for(hearing, 5)
    begun = time.monotonic()
    with pytest.raises(EngineUnreachable):
        await cri.runtime.status(cri.container)
    with pytest.raises(EngineUnreachable):
        await cri.runtime.exec(cri.container, ExecSpec(("true",), DEV, HOME))
    assert time.monotonic() - begun < 3
    await session.write(b"while it was away\n")
    waiting = asyncio.create_task(session.wait())
    await cri_engine.start()
    assert await asyncio.wait_for(read_all(session), 20) == b"before\nwhile it was away\n"
    assert await asyncio.wait_for(waiting, 20) == 5
    await session.close()
    status = await cri.runtime.status(cri.container)
    assert status is not None and status.state is ContainerState.running
    assert cri.pid1() == pid1
    assert (await cri.run("echo", "again")).out == b"again\n"
    await cri.restart(2)
    assert (await cri.run("echo", "anew")).out == b"anew\n"


async def test_the_shim_is_killed(cri: CriSubject) -> None:
    """A command ends with an error or a code, never hangs; the container is down; a new start works."""
    await cri.up()
    session = await cri.runtime.exec(cri.container, ExecSpec(("sleep", "1000"), DEV, HOME, stdin=True))
    shim = int(Path(f"/proc/{cri.pid1()}/stat").read_text().rpartition(")")[2].split()[1])
    assert b"containerd-shim" in Path(f"/proc/{shim}/cmdline").read_bytes()
    os.kill(shim, signal.SIGKILL)
    assert await asyncio.wait_for(read_all(session), 20) == b""
    try:
        assert await asyncio.wait_for(session.wait(), 20) != 0
    except RoostError as error:
        assert error.hint
    await asyncio.wait_for(session.close(), 30)

    async def down() -> bool:
        status = await cri.runtime.status(cri.container)
        return status is not None and status.state is not ContainerState.running

    await until(down, "the container is seen to be down")
    await cri.restart(2)
    assert (await cri.run("echo", "anew")).out == b"anew\n"


@pytest.fixture
async def away(cri_engine: TestEngine) -> AsyncIterator[TestEngine]:
    await cri_engine.kill()
    try:
        yield cri_engine
    finally:
        await cri_engine.start()


async def test_containerd_is_not_there(away: TestEngine) -> None:
    runtime = away.runtime()
    try:
        for call in (runtime.check(), runtime.list(), runtime.images()):
            with pytest.raises(EngineUnreachable):
                await asyncio.wait_for(call, 5)
    finally:
        await runtime.close()
