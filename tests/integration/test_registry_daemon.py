"""The private registry: the real docker-registry on a loopback port of its own."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from roost.errors import MissingProgram, PortInUse
from roost.linux.process import listener
from roost.node.registry import Registry
from roost.settings import RegistrySettings, Settings

pytestmark = pytest.mark.skipif(shutil.which("docker-registry") is None, reason="needs docker-registry")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
async def settings(tmp_path: Path) -> AsyncIterator[Settings]:
    settings = Settings(
        state_dir=tmp_path / "state", run_dir=tmp_path / "run", registry=RegistrySettings(port=free_port())
    )
    yield settings
    await Registry(settings).stop()


def upload(registry: Registry) -> int:
    """Status of beginning an upload: the storage is writable."""
    request = urllib.request.Request(f"http://{registry.host}/v2/x/y/blobs/uploads/", method="POST")
    with urllib.request.urlopen(request, timeout=5) as answer:
        return int(answer.status)


async def test_outlives_its_owner_and_is_adopted(settings: Settings) -> None:
    first = Registry(settings)
    await first.start()
    assert not first.adopted
    assert await asyncio.to_thread(upload, first) == 202
    assert any((settings.node_state / "registry").iterdir()), "under our own state"
    second = Registry(settings)
    await second.start()
    assert second.adopted and second.pid == first.pid
    await second.stop()
    for _ in range(200):  # the kernel closes the socket of a dead process a moment later
        if listener(settings.registry.port) is None:
            break
        await asyncio.sleep(0.01)
    assert listener(settings.registry.port) is None
    await second.stop()


async def test_death_is_seen_and_mended(settings: Settings) -> None:
    registry = Registry(settings)
    await registry.start()
    assert registry.pid is not None
    os.kill(registry.pid, signal.SIGKILL)
    await asyncio.wait_for(registry.watch(), 5)
    dead = registry.pid
    await registry.start()
    assert registry.pid != dead and not registry.adopted


async def test_port_taken_by_another(settings: Settings) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", settings.registry.port))
        other.listen()
        with pytest.raises(PortInUse, match=f"pid {os.getpid()}.*127.0.0.1:{settings.registry.port}"):
            await Registry(settings).start()
    await Registry(settings).start()


async def test_not_installed(settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        with pytest.raises(MissingProgram, match="docker-registry"):
            await Registry(settings).start()
        await Registry(settings).stop()
