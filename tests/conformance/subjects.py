"""The runtimes under test, with what a test must be able to do to them from outside."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from roost.linux.cgroup import Group
from roost.runtimes.cri import CriRuntime
from roost.runtimes.fake import FakeRuntime
from roost.runtimes.protocol import (
    LABEL_START,
    LABEL_WORKSPACE,
    Channel,
    ContainerId,
    ContainerSpec,
    ContainerUser,
    ExecSpec,
    ImageInfo,
    Limits,
    Runtime,
    TerminalSize,
    VolumeMount,
    VolumeName,
)
from tests.conformance.engine import TestEngine

HOME = "/home/dev"
DEV = ContainerUser(1000, 1000, "dev", HOME, "/bin/sh", groups=(2000,))
ROOT = ContainerUser(0, 0, "root", "/root", "/bin/sh")
REF, UPGRADE = "roost.test/tiny:1", "roost.test/tiny:2"


async def until(true: Callable[[], Awaitable[object]], what: str, timeout_s: float = 15.0) -> None:
    """Poll until something holds; fails with its name when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not await true():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(0.02)


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: bytes
    err: bytes


async def run(
    runtime: Runtime,
    container: ContainerId,
    *argv: str,
    stdin: bytes | None = None,
    user: ContainerUser = DEV,
    cwd: str = HOME,
    env: dict[str, str] | None = None,
    tty: TerminalSize | None = None,
) -> Done:
    """Run a command to its end, feeding and reading at the same time."""
    session = await runtime.exec(container, ExecSpec(argv, user, cwd, env or {}, tty, stdin is not None))
    try:

        async def feed() -> None:
            if stdin is not None:
                await session.write(stdin)
                await session.close_stdin()

        feeding = asyncio.create_task(feed())
        got = {Channel.stdout: bytearray(), Channel.stderr: bytearray()}
        async for channel, data in session.output():
            got[channel] += data
        await feeding
        return Done(await session.wait(), bytes(got[Channel.stdout]), bytes(got[Channel.stderr]))
    finally:
        await session.close()


@dataclass
class Subject:
    """One runtime; containers and volumes of a test have names of its own."""

    runtime: Runtime
    image: ImageInfo
    upgrade: ImageInfo
    ident: str = field(default_factory=lambda: secrets.token_hex(4))

    @property
    def container(self) -> ContainerId:
        return ContainerId(f"roost-{self.ident}")

    @property
    def volume(self) -> VolumeName:
        return VolumeName(f"roost-{self.ident}-home")

    real = False
    """Whether commands run in a container (other files, other users) and not beside us."""

    def spec(self, start: int = 1, **changes: object) -> ContainerSpec:
        values: dict[str, object] = {
            "container": self.container,
            "image": self.image,
            "user": DEV,
            "hostname": f"host-{self.ident}",
            "env": {"HOME": HOME, "OF_CONTAINER": "1"},
            "working_dir": HOME,
            "mounts": (VolumeMount(self.volume, HOME),),
            "limits": Limits(1.0, 512 << 20, 200),
            "labels": {LABEL_WORKSPACE: self.ident, LABEL_START: str(start)},
            **changes,
        }
        return ContainerSpec(**values)  # type: ignore[arg-type]

    async def up(self, start: int = 1, **changes: object) -> ContainerId:
        await self.runtime.create_volume(self.volume, 0, {})
        self.own_volume()
        await self.runtime.create(self.spec(start, **changes))
        await self.runtime.start(self.container)
        return self.container

    async def restart(self, start: int, **changes: object) -> ContainerId:
        await self.runtime.stop(self.container, 5)
        await self.runtime.delete(self.container)
        return await self.up(start, **changes)

    def run(self, *argv: str, **more: object) -> Awaitable[Done]:
        return run(self.runtime, self.container, *argv, **more)  # type: ignore[arg-type]

    def own_volume(self) -> None:
        """Give the volume to the user, as the seeder would."""

    async def say(self, text: str) -> None:
        """A line of PID 1's output."""
        raise NotImplementedError

    async def crash(self) -> None:
        """Kill PID 1."""
        raise NotImplementedError

    def takeover(self) -> Runtime:
        """What a new process of ours would see."""
        raise NotImplementedError

    async def done(self) -> None:
        """Remove what the test made, and see that nothing is left."""
        await self.runtime.delete(self.container)
        await self.runtime.trash_volume(self.volume)
        await self.runtime.purge_volume(self.volume)
        await self.runtime.close()


@dataclass
class FakeSubject(Subject):
    fake: FakeRuntime | None = None

    def _fake(self) -> FakeRuntime:
        assert self.fake is not None
        return self.fake

    async def say(self, text: str) -> None:
        self._fake().say(self.container, text)

    async def crash(self) -> None:
        self._fake().crash(self.container)

    def takeover(self) -> Runtime:
        return self._fake()


@dataclass
class CriSubject(Subject):
    engine: TestEngine | None = None
    real = True

    def _engine(self) -> TestEngine:
        assert self.engine is not None
        return self.engine

    def own_volume(self) -> None:
        os.chown(self._engine().volumes.path(self.volume), DEV.uid, DEV.gid)

    async def say(self, text: str) -> None:
        done = await self.run("/bin/sh", "-c", 'printf "%s\\n" "$0" >/proc/1/fd/1', text)
        assert done.code == 0, done.err

    def pid1(self) -> int:
        """tini, as this host numbers it."""
        for pid in Group(f"{self._engine().ident}/{self.container}").processes():
            if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:3] == [
                b"/opt/roost/bin/tini", b"--", b"/opt/roost/bin/busybox",
            ]:  # fmt: skip
                return pid
        raise AssertionError(f"no PID 1 of {self.container}")

    async def crash(self) -> None:
        os.kill(self.pid1(), signal.SIGKILL)

    def takeover(self) -> CriRuntime:
        return self._engine().runtime()

    async def done(self) -> None:
        await super().done()
        engine = self._engine()
        assert list((engine.run_dir / "cri").glob("*/*")) == [], "FIFOs or mounts are left"
        assert str(engine.run_dir / "cri") not in Path("/proc/mounts").read_text()
        assert not Group(f"{engine.ident}/{self.container}").exists()
