"""Our containerd: the real one, in directories of its own, with a real container that outlives it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from roost.errors import MissingProgram
from roost.linux.cgroup import Group
from roost.linux.process import ProcessId
from roost.node.containerd import SHIM_PARENT, Containerd
from roost.node.daemons import supervise
from roost.node.registry import Registry
from roost.node.tools import ctr, pause_image
from roost.settings import RegistrySettings, Settings

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("containerd") is None or shutil.which("runc") is None,
    reason="needs root, containerd and runc",
)
CGROUP = f"roost-t{os.getpid()}"
SYSTEMS = (Path("/etc/containerd"), Path("/var/lib/containerd"), SHIM_PARENT / "containerd.sock")


def make(tmp_path: Path, **settings: object) -> Containerd:
    return Containerd(
        Settings.model_validate({"state_dir": tmp_path / "state", "run_dir": tmp_path / "run", **settings}),
        tmp_path / "snapshots",
    )


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Containerd]:
    engine = make(tmp_path)
    yield engine
    if engine.socket.exists():
        await engine.start()
        for name in (await ctr(engine.socket, "tasks", "ls", "-q")).split():
            await ctr(engine.socket, "tasks", "rm", "-f", name)
        for name in (await ctr(engine.socket, "containers", "ls", "-q")).split():
            await ctr(engine.socket, "containers", "rm", name)
    await engine.stop()
    await asyncio.to_thread(Group(CGROUP).remove)
    mounts = Path("/proc/self/mountinfo").read_text()
    assert str(tmp_path) not in mounts, "no mount is left"


async def run_pause(engine: Containerd) -> ProcessId:
    """A container from the pause image; its process."""
    image = pause_image(engine.tools_dir).ref
    own = engine.socket.parent  # ctr, unlike CRI, has defaults of its own under /run/containerd
    await ctr(
        engine.socket, "run", "--detach", "--cgroup", f"{CGROUP}/pause", "--runc-root", str(own / "runc"),
        "--fifo-dir", str(own / "fifo"), image, "roost-tpause",
    )  # fmt: skip
    tasks = await ctr(engine.socket, "tasks", "ls")
    (line,) = [row for row in tasks.splitlines() if row.startswith("roost-tpause")]
    process = ProcessId.of(int(line.split()[1]))
    assert process is not None
    return process


async def test_start_adopt_stop(engine: Containerd, tmp_path: Path) -> None:
    systems = [path.stat().st_mtime_ns if path.exists() else None for path in SYSTEMS]
    await engine.start()
    assert not engine.adopted and engine.version >= (1, 6)
    assert (engine.tools_dir / "bin/tini").exists()
    other = make(tmp_path)
    await other.start()
    assert other.adopted and other.pid == engine.pid
    assert stat.S_IMODE(SHIM_PARENT.stat().st_mode) & 0o711 == 0o711, "as a system containerd needs it"
    assert (tmp_path / "snapshots/metadata.db").exists(), "the snapshotter works in the pool"
    assert systems == [path.stat().st_mtime_ns if path.exists() else None for path in SYSTEMS]
    await other.stop()
    await other.stop()
    assert ProcessId.of(engine.pid or 0) is None


async def test_pause_image_is_seen_pinned_and_restored(engine: Containerd) -> None:
    await engine.start()
    ref = pause_image(engine.tools_dir).ref
    row = await ctr(engine.socket, "images", "ls", f"name=={ref}")
    assert "io.cri-containerd.pinned=pinned" in row
    await ctr(engine.socket, "images", "rm", "--sync", ref)
    for _ in range(500):
        if not await engine._has_image(ref):
            break
        await asyncio.sleep(0.01)
    assert not await engine._has_image(ref)
    await engine.start()
    assert await engine._has_image(ref)


async def test_containers_outlive_a_killed_containerd(engine: Containerd) -> None:
    await engine.start()
    pause = await run_pause(engine)
    reports: asyncio.Queue[str] = asyncio.Queue()
    task = asyncio.create_task(supervise(engine, lambda what, _why: reports.put_nowait(what), first_pause_s=0.01))
    before = engine.pid
    assert before is not None
    os.kill(before, signal.SIGKILL)
    assert await asyncio.wait_for(reports.get(), 10) == "died"
    assert await asyncio.wait_for(reports.get(), 20) == "restarted"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert engine.pid != before and pause.alive()
    assert "RUNNING" in await ctr(engine.socket, "tasks", "ls")
    started = time.monotonic()
    await ctr(engine.socket, "tasks", "kill", "roost-tpause")
    assert await asyncio.to_thread(pause.wait_gone, 5)
    assert time.monotonic() - started < 3, "the sandbox's process ends at TERM"


async def test_a_changed_setting_restarts_it_and_containers_go_on(engine: Containerd, tmp_path: Path) -> None:
    await engine.start()
    pause = await run_pause(engine)
    changed = make(tmp_path, registry=RegistrySettings(plain_http=["10.1.2.3:5000"]))
    await changed.start()
    assert changed.adopted, "registries are read at each pull: no restart for them"
    assert "http://10.1.2.3:5000" in (tmp_path / "state/node/containerd/certs.d/10.1.2.3:5000/hosts.toml").read_text()
    moved = Containerd(changed._settings, tmp_path / "snapshots2")
    await moved.start()
    assert not moved.adopted and moved.pid != engine.pid
    assert pause.alive()


@pytest.mark.parametrize("point", ["tools.staged", "containerd.configured", "daemon.spawned", "pause.imported"])
async def test_killed_while_starting_it(engine: Containerd, tmp_path: Path, point: str) -> None:
    program = f"""
import asyncio
from pathlib import Path
from roost.node.containerd import Containerd
from roost.settings import Settings
base = Path({str(tmp_path)!r})
asyncio.run(Containerd(Settings(state_dir=base / "state", run_dir=base / "run"), base / "snapshots").start())
"""
    environment = {**os.environ, "ROOST_CRASH_AT": point, "PYTHONPATH": os.pathsep.join(sys.path)}
    dead = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", program], env=environment, timeout=60)
    assert dead.returncode == -signal.SIGKILL
    await engine.start()
    assert engine.adopted is (point in ("daemon.spawned", "pause.imported"))
    assert len(list((tmp_path / "state/node/tools").iterdir())) == 1
    row = await ctr(engine.socket, "images", "ls", f"name=={pause_image(engine.tools_dir).ref}")
    assert "pinned" in row


async def test_missing_program(engine: Containerd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        with pytest.raises(MissingProgram, match="containerd"):
            await engine.start()
        await engine.stop()


@pytest.mark.skipif(
    shutil.which("docker-registry") is None or shutil.which("skopeo") is None, reason="needs docker-registry and skopeo"
)
async def test_loopback_registries_need_no_tls(engine: Containerd, tmp_path: Path) -> None:
    """On a port that no setting names."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    registry = Registry(
        Settings(state_dir=tmp_path / "r", run_dir=tmp_path / "rr", registry=RegistrySettings(port=port))
    )
    await registry.start()
    try:
        await engine.start()
        archive = tmp_path / "pause.tar"
        archive.write_bytes(pause_image(engine.tools_dir).archive)
        target = f"{registry.host}/x/pause:1"
        copy = ["skopeo", "copy", "--insecure-policy", "--dest-tls-verify=false"]
        copy += [f"oci-archive:{archive}", f"docker://{target}"]
        await asyncio.to_thread(subprocess.run, copy, check=True, capture_output=True, timeout=60)
        name = target.encode()
        spec = b"\x0a" + bytes([len(name)]) + name
        request = b"\x0a" + bytes([len(spec)]) + spec  # PullImageRequest{1: ImageSpec{1: name}}
        assert b"sha256:" in await engine._call("/runtime.v1.ImageService/PullImage", request)
    finally:
        await registry.stop()
