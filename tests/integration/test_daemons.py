"""Daemons that outlive us: a real process, killed and found again in every state."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from roost.errors import MissingProgram, ProcessFailed, RoostError
from roost.linux.process import PidFile, ProcessId, all_processes, read_pidfile, write_pidfile
from roost.node import daemons
from roost.node.daemons import Daemon, DaemonSpec, supervise


@pytest.fixture
async def spec(tmp_path: Path) -> AsyncIterator[DaemonSpec]:
    """A daemon that says it is ready by a file, and has a child with its own environment, as containerd has shims."""
    script = 'echo starting; echo "$0" >"$0.ready"; sleep 300 & wait'
    spec = DaemonSpec(
        name="test",
        argv=("/bin/sh", "-c", script, str(tmp_path / "daemon")),
        pidfile=tmp_path / "run/test.pid",
        logfile=tmp_path / "log/test.log",
        fingerprint="one",
    )
    yield spec
    for process in all_processes():
        if process.environ().get("ROOST_DAEMON") == str(spec.pidfile):
            process.signal(signal.SIGKILL)
            assert await asyncio.to_thread(process.wait_gone, 5)
    assert await asyncio.to_thread(Daemon(spec).find) is None


def ready(spec: DaemonSpec):
    async def check() -> bool:
        return Path(spec.argv[3] + ".ready").exists()

    return check


async def start(spec: DaemonSpec) -> Daemon:
    daemon = Daemon(spec)
    await daemon.start(ready(spec), 10)
    return daemon


def instances(spec: DaemonSpec) -> list[int]:
    """Session leaders only: a child between fork and exec looks like its parent otherwise."""
    alike = [process.pid for process in all_processes() if process.cmdline() == spec.argv]
    return [pid for pid in alike if Path(f"/proc/{pid}").exists() and os.getsid(pid) == pid]


async def test_started_once_adopted_ever_after(spec: DaemonSpec) -> None:
    first = await start(spec)
    assert first.process is not None and not first.adopted
    second = await start(spec)
    assert second.adopted and second.process == first.process
    assert instances(spec) == [first.process.pid]
    await second.stop(5)
    assert not first.process.alive() and not spec.pidfile.exists()
    await second.stop(5)


async def test_stands_apart_from_us(spec: DaemonSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOST_CRASH_AT", "elsewhere")
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    daemon = await start(spec)
    assert daemon.process is not None
    pid = daemon.process.pid
    assert os.getsid(pid) == pid
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"
    assert os.readlink(f"/proc/{pid}/fd/1") == os.readlink(f"/proc/{pid}/fd/2") == str(spec.logfile)
    assert not [fd for fd in os.listdir(f"/proc/{pid}/fd") if int(fd) > 9 and int(fd) != 255], "none of our descriptors"
    environment = daemon.process.environ()
    assert "ROOST_CRASH_AT" not in environment and environment["https_proxy"] == "http://proxy.example:3128"


@pytest.mark.parametrize("point", ["daemon.before-spawn", "daemon.spawned", "daemon.written"])
async def test_killed_while_starting_it(spec: DaemonSpec, point: str, tmp_path: Path) -> None:
    """kill -9 of the starter at each step: the next one ends with exactly one daemon."""
    program = f"""
import asyncio
from pathlib import Path
from roost.node.daemons import Daemon, DaemonSpec
async def ready(): return True
spec = DaemonSpec("test", {spec.argv!r}, Path({str(spec.pidfile)!r}), Path({str(spec.logfile)!r}), "one")
asyncio.run(Daemon(spec).start(ready, 10))
"""
    environment = {**os.environ, "ROOST_CRASH_AT": point, "PYTHONPATH": os.pathsep.join(sys.path)}
    dead = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", program], env=environment, timeout=30)
    assert dead.returncode == -signal.SIGKILL
    assert (read_pidfile(spec.pidfile) is not None) is (point == "daemon.written")
    daemon = await start(spec)
    assert daemon.adopted is (point != "daemon.before-spawn")
    assert daemon.process is not None and instances(spec) == [daemon.process.pid]
    entry = read_pidfile(spec.pidfile)
    assert entry is not None and entry.process == daemon.process


async def test_another_configuration_replaces_it(spec: DaemonSpec) -> None:
    first = await start(spec)
    second = await start(replace(spec, fingerprint="two"))
    assert not second.adopted and first.process is not None and second.process is not None
    assert not first.process.alive() and second.process.alive()
    spec.pidfile.unlink()
    third = await start(replace(spec, fingerprint="three"))
    assert not third.adopted, "its fingerprint is known without the pid file too"
    await third.stop()


async def test_a_stale_pidfile_names_nobody(spec: DaemonSpec) -> None:
    first = await start(spec)
    await first.stop()
    me = ProcessId.of(os.getpid())
    assert me is not None
    write_pidfile(spec.pidfile, PidFile(replace(me, start_time=1), "one"))
    assert await asyncio.to_thread(first.find) is None, "our pid, but another process"
    assert not (await start(spec)).adopted


async def test_death_at_start_tells_its_last_words(spec: DaemonSpec) -> None:
    bad = replace(spec, argv=("/bin/sh", "-c", "echo one; echo the reason >&2; exit 3"))

    async def never() -> bool:
        return False

    with pytest.raises(ProcessFailed, match=r"(?s)test ended.*the reason") as caught:
        await Daemon(bad).start(never, 10)
    assert str(spec.logfile) in caught.value.hint
    assert not spec.pidfile.exists()


async def test_never_ready_is_stopped(spec: DaemonSpec) -> None:
    async def never() -> bool:
        return False

    with pytest.raises(ProcessFailed, match=r"not ready after 0\.2 s"):
        await Daemon(spec).start(never, 0.2)
    assert instances(spec) == []


async def test_no_such_program(spec: DaemonSpec) -> None:
    with pytest.raises(MissingProgram, match="/nonexistent/x"):
        await Daemon(replace(spec, argv=("/nonexistent/x",))).start(ready(spec), 1)


async def test_who_ignores_term_is_killed(spec: DaemonSpec) -> None:
    script = "trap '' TERM; echo >\"$0.ready\"; while :; do sleep 0.1; done"
    stubborn = replace(spec, argv=("/bin/sh", "-c", script, spec.argv[3]))
    daemon = await start(stubborn)
    await daemon.stop(0.2)
    assert instances(stubborn) == []


async def test_big_log_is_rotated(spec: DaemonSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemons, "LOG_ROTATE_BYTES", 100)
    spec.logfile.parent.mkdir(parents=True)
    spec.logfile.write_text("old\n" * 50)
    await start(spec)
    assert spec.logfile.read_text() == "starting\n"
    assert spec.logfile.with_name("test.log.1").stat().st_size == 200


async def test_supervision_restarts_and_reports(spec: DaemonSpec) -> None:
    daemon = await start(spec)
    reports: asyncio.Queue[tuple[str, RoostError | None]] = asyncio.Queue()
    failures = 1

    class Subject:
        async def start(self) -> None:
            nonlocal failures
            if failures:
                failures -= 1
                raise ProcessFailed("not yet")
            await daemon.start(ready(spec), 10)

        async def watch(self) -> None:
            await daemon.watch()

    task = asyncio.create_task(supervise(Subject(), lambda *report: reports.put_nowait(report), first_pause_s=0.01))
    for _ in range(2):
        before = daemon.process
        assert before is not None
        before.signal(signal.SIGKILL)
        seen: list[str] = []
        while not seen or seen[-1] != "restarted":
            what, why = await asyncio.wait_for(reports.get(), 10)
            assert (why is not None) is (what == "failed")
            seen.append(what)
        assert seen[0] == "died"
        assert daemon.process is not None and daemon.process != before and daemon.process.alive()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert daemon.process is not None and daemon.process.alive(), "it goes on when its supervisor ends"
