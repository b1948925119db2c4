"""What a container is made of on a real engine: limits, isolation, files; and HOME on the real pool."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from roost.errors import EngineFailed
from roost.linux import loop, mount
from roost.node.pool import Pool
from roost.runtimes.protocol import ContainerState, ExecSpec, Limits
from roost.settings import PoolSettings, Settings
from tests.conformance.conftest import cri, cri_engine
from tests.conformance.engine import TestEngine
from tests.conformance.subjects import DEV, HOME, REF, UPGRADE, CriSubject, run, until

__all__ = ["cri", "cri_engine"]

MIB = 1 << 20


def fields(text: bytes) -> dict[str, str]:
    """/proc/PID/status."""
    return {key: value.strip() for key, _, value in (line.partition(":") for line in text.decode().splitlines())}


async def test_pid_1(cri: CriSubject) -> None:
    await cri.up()
    done = await cri.run("sh", "-c", "tr '\\0' ' ' </proc/1/cmdline; echo; cat /proc/1/status; hostname; pwd")
    lines = done.out.decode().splitlines()
    assert lines[0].split() == [
        "/opt/roost/bin/tini", "--", "/opt/roost/bin/busybox", "sh", "/opt/roost/bin/keepalive",
    ]  # fmt: skip
    assert lines[-2:] == [f"host-{cri.ident}", HOME]
    assert fields(done.out)["Uid"].split()[0] == "1000"
    assert (await cri.run("touch", "/opt/roost/bin/x")).code != 0
    done = await cri.run("cat", "/etc/resolv.conf")
    assert b"nameserver 192.0.2.53" in done.out


async def test_sudo_or_not(cri: CriSubject) -> None:
    """What a process may become: seccomp always, capabilities and new privileges only where sudo is allowed."""
    await cri.up(1)
    status = fields((await cri.run("cat", "/proc/self/status")).out)
    assert status["Seccomp"] == "2" and status["NoNewPrivs"] == "0" and int(status["CapBnd"], 16)
    assert int(status["CapEff"], 16) == 0
    await cri.restart(2, allow_sudo=False)
    status = fields((await cri.run("cat", "/proc/self/status")).out)
    assert status["Seccomp"] == "2" and status["NoNewPrivs"] == "1"
    assert {status[name].strip("0") for name in ("CapBnd", "CapEff", "CapPrm", "CapInh", "CapAmb")} == {""}
    of_pid1 = fields((await cri.run("cat", "/proc/1/status")).out)
    assert of_pid1["NoNewPrivs"] == "1" and of_pid1["Seccomp"] == "2"


async def test_hidden_paths(cri: CriSubject) -> None:
    await cri.up()
    done = await cri.run("sh", "-c", "cat /proc/kcore | wc -c; echo x >/proc/sys/kernel/hostname; ls /sys/firmware")
    assert done.out.strip() == b"0" and done.err


async def test_limits(cri: CriSubject) -> None:
    await cri.up(limits=Limits(cpus=0.5, memory_bytes=64 * MIB, pids=32))
    done = await cri.run("sh", "-c", "for i in $(seq 64); do sleep 20 & done; echo started")
    assert b"can't fork" in done.err, done
    await cri.restart(2, limits=Limits(cpus=0.5, memory_bytes=64 * MIB, pids=32))
    begun, busy = time.monotonic(), await cri.runtime.stats(cri.container)
    await cri.run("timeout", "2", "sh", "-c", "while :; do :; done")
    used = (await cri.runtime.stats(cri.container)).cpu_seconds - busy.cpu_seconds
    assert used < 0.75 * (time.monotonic() - begun)
    done = await cri.run("dd", "if=/dev/zero", "of=/dev/null", f"bs={256 * MIB}", "count=1")
    assert done.code == 137, "the kernel kills what takes too much memory"
    status = await cri.runtime.status(cri.container)
    assert status is not None and status.state is ContainerState.running


async def test_no_limits(cri: CriSubject) -> None:
    await cri.up(limits=Limits())
    assert (await cri.run("sh", "-c", "for i in $(seq 40); do sleep 1 & done; wait; echo all")).out == b"all\n"


async def test_a_home_that_is_gone_is_no_container(cri: CriSubject, cri_engine: TestEngine) -> None:
    """The engine refuses at start: a typed error, and what is left can be deleted."""
    await cri.runtime.create_volume(cri.volume, 0, {})
    await cri.runtime.create(cri.spec())
    shutil.rmtree(cri_engine.volumes.path(cri.volume))
    with pytest.raises(EngineFailed) as caught:
        await cri.runtime.start(cri.container)
    assert cri.container in caught.value.message
    await cri.runtime.delete(cri.container)
    await cri.up(2)


async def test_logs_of_many_starts(cri: CriSubject, cri_engine: TestEngine) -> None:
    for start in (1, 2, 3):
        await cri.up(start)
        await cri.say(f"start {start}")
        await cri.runtime.stop(cri.container, 5)
        await cri.runtime.delete(cri.container)
    names = sorted(path.name for path in (cri_engine.state / "logs" / cri.container).iterdir())
    assert names == ["1.log", "2.log", "3.log"]


async def test_delete_kills_what_hangs(cri: CriSubject) -> None:
    """Commands that ignore every signal and whose output nobody reads: delete does not wait for them."""
    await cri.up()
    sessions = [
        await cri.runtime.exec(cri.container, ExecSpec(("sh", "-c", "trap '' TERM INT HUP; yes"), DEV, HOME))
        for _ in range(3)
    ]
    begun = time.monotonic()
    await cri.runtime.delete(cri.container)
    assert time.monotonic() - begun < 10
    for session in sessions:
        assert await asyncio.wait_for(session.wait(), 10) == 137
        await asyncio.wait_for(session.close(), 10)


# --- the real pool


@pytest.fixture
def pool() -> Iterator[Pool]:
    folder = Path(tempfile.mkdtemp(prefix="roost-test-cripool-", dir="/var/tmp"))
    sizes = PoolSettings(initial_bytes=512 * MIB, step_bytes=64 * MIB, reserve_bytes=64 * MIB)
    made = Pool(Settings(state_dir=folder, pool=sizes))
    made.open()
    try:
        yield made
    finally:
        made.close()
        for entry in reversed(mount.mounts()):
            if entry.target.startswith(str(folder)):
                mount.unmount(entry.target, detach=True)
        for image in folder.rglob("*.img"):
            while (device := loop.find(image)) is not None:
                device.close()
        shutil.rmtree(folder)


@pytest.fixture
async def pooled(cri_engine: TestEngine, pool: Pool) -> AsyncIterator[CriSubject]:
    runtime = cri_engine.runtime(volumes=pool)
    image, upgrade = await runtime.image(REF), await runtime.image(UPGRADE)  # type: ignore[arg-type]
    assert image is not None and upgrade is not None

    class Pooled(CriSubject):
        def own_volume(self) -> None:
            shutil.chown(pool.path(self.volume), DEV.uid, DEV.gid)

    made = Pooled(runtime, image, upgrade, engine=cri_engine)
    try:
        yield made
    finally:
        await made.done()


async def test_home_full(pooled: CriSubject, pool: Pool) -> None:
    """A full HOME is an error of the program that writes; the workspace lives, starts again, and can be cleaned."""
    await pooled.up()
    if not pool.usage().quotas:
        pytest.skip("this kernel has no simple quotas (Linux 6.7)")
    await pooled.runtime.create_volume(pooled.volume, 32 * MIB, {})
    done = await pooled.run("dd", "if=/dev/urandom", "of=big", "bs=1M", "count=64", "conv=fsync")
    assert done.code == 1 and b"Disk quota exceeded" in done.err, done
    await pooled.restart(2)
    assert (await pooled.run("echo", "up")).out == b"up\n"
    assert (await pooled.run("rm", "big")).code == 0

    async def room() -> bool:
        return (await pooled.run("sh", "-c", "echo kept >small && sync")).code == 0

    await until(room, "room is there again")
    await pooled.restart(3, image=pooled.upgrade)
    assert (await pooled.run("cat", "small")).out == b"kept\n"


async def test_trash_on_the_pool(pooled: CriSubject) -> None:
    await pooled.up()
    assert (await pooled.run("sh", "-c", "echo precious >kept")).code == 0
    await pooled.runtime.delete(pooled.container)
    await pooled.runtime.trash_volume(pooled.volume)
    await pooled.runtime.restore_volume(pooled.volume)
    await pooled.up(2)
    assert (await run(pooled.runtime, pooled.container, "cat", "kept")).out == b"precious\n"
