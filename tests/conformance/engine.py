"""A containerd of the tests' own, and runtimes on it."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import subprocess
from pathlib import Path

from roost.linux.cgroup import Group
from roost.node.containerd import Containerd
from roost.node.network import conflist, parse_subnet
from roost.node.tools import ctr
from roost.runtimes.cri import CriConfig, CriRuntime, VolumeStore
from roost.runtimes.protocol import Limits
from roost.settings import NodeSettings, RegistrySettings, Settings
from tests.conformance.images import BuiltImage
from tests.conformance.volumes import DirectoryVolumes


class TestEngine:
    """Started by `start`, everything of it gone after `stop`; paths are short for the sake of unix sockets."""

    __test__ = False

    def __init__(self, **registry: object) -> None:
        self.ident = f"roost-t{secrets.token_hex(3)}"
        self.state = Path(f"/var/tmp/roost-test-{self.ident}")
        self.run_dir = Path(f"/run/{self.ident}")
        self.settings = Settings(
            state_dir=self.state,
            run_dir=self.run_dir,
            node=NodeSettings(instance=self.ident),
            registry=RegistrySettings.model_validate(registry),
        )
        self.containerd = Containerd(self.settings, self.state / "snapshots")
        self.volumes = DirectoryVolumes(self.state / "volumes")
        self.subnet = parse_subnet(f"10.{100 + secrets.randbelow(100)}.{secrets.randbelow(255)}.0/24")

    async def start(self) -> None:
        folder = self.containerd.cni_conf_dir
        folder.mkdir(parents=True, exist_ok=True)
        text = conflist(self.ident, self.subnet, self.state / "cni", 0)
        (folder / "10-roost.conflist").write_text(text)
        await self.containerd.start()

    async def kill(self) -> None:
        """kill -9 of containerd; returns when it is gone."""
        pid = self.containerd.pid
        assert pid is not None
        os.kill(pid, 9)
        await self.containerd.watch()

    async def stop(self) -> None:
        """Remove every container, then the engine and all that is ours."""
        runtime = self.runtime()
        try:
            await self.containerd.start()
            for status in await runtime.list():
                await runtime.delete(status.container)
        finally:
            await runtime.close()
            await self.containerd.stop()
        leftover = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if self.ident in line]
        for target in reversed(leftover):
            subprocess.run(["umount", "-l", target], check=False, capture_output=True)
        shutil.rmtree(self.state, ignore_errors=True)
        shutil.rmtree(self.run_dir, ignore_errors=True)
        Group(self.ident).remove()
        for path in Path("/var/lib/cni/results").glob(f"{self.ident}-*"):
            path.unlink(missing_ok=True)

    def runtime(self, **changes: object) -> CriRuntime:
        return CriRuntime(self.config(**changes))  # type: ignore[arg-type]

    def config(self, *, volumes: VolumeStore | None = None, **changes: object) -> CriConfig:
        def prepare(name: str, limits: Limits) -> None:
            group = Group(name.lstrip("/"))
            group.create()
            group.set_pids(limits.pids or None)

        values: dict[str, object] = {
            "socket": self.containerd.socket,
            "run_dir": self.run_dir / "cri",
            "log_dir": self.state / "logs",
            "tools_dir": self.containerd.tools_dir,
            "volumes": volumes or self.volumes,
            "cgroup_parent": f"/{self.ident}",
            "dns_servers": ("192.0.2.53",),
            "prepare_cgroup": prepare,
            "remove_cgroup": lambda name: Group(name.lstrip("/")).remove(),
            **changes,
        }
        return CriConfig(**values)  # type: ignore[arg-type]

    async def add_image(self, ref: str, image: BuiltImage) -> None:
        await ctr(self.containerd.socket, "images", "import", "-", stdin=image.archive(ref))
        runtime = self.runtime()
        try:
            for _ in range(200):
                if await runtime.images() and any(info.ref == ref for info in await runtime.images()):
                    return
                await asyncio.sleep(0.02)
            raise AssertionError(f"{ref} was imported and is not seen")
        finally:
            await runtime.close()
