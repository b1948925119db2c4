"""stop -> start -> first exec answered, beside bare CRI calls and beside ctr, alternating, on one containerd.

    scripts/bench restart            ROUNDS=10 by default

roost: through the API (server, node, database, events), as `roost stop`, `start`, `exec` do, in one process so that the
command line's own start (python) is not in the figure; it is printed beside it.
bare CRI: the calls any CRI client makes for the same pod: StopContainer, StopPodSandbox, RemovePodSandbox,
RunPodSandbox (CNI), CreateContainer, StartContainer, then an exec over containerd's Tasks API.
ctr: task kill, delete, start, exec of one container with the same image and HOME; no pod, no network.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

from roost.client import AsyncClient
from roost.client.sockets import ExecRequest, execute
from roost.linux.cgroup import Group
from roost.runtimes.cri import CriConfig, CriRuntime, methods
from roost.runtimes.cri.podspec import container_config, hosts_file, sandbox_config
from roost.runtimes.cri.proto import cri_pb2
from roost.runtimes.protocol import (
    ContainerId,
    ContainerSpec,
    ContainerUser,
    ExecSpec,
    ImageRef,
    Limits,
    VolumeInfo,
    VolumeMount,
    VolumeName,
)
from tests.e2e.harness import Roost, tiny_image
from tests.e2e.push import push_root

ROUNDS = int(os.environ.get("ROUNDS", "10"))
USER = ContainerUser(1000, 1000, "dev", "/home/dev")


@dataclass
class Figures:
    """Milliseconds of each phase, a list over the rounds."""

    name: str
    phases: dict[str, list[float]] = field(default_factory=dict)

    def add(self, phase: str, seconds: float) -> None:
        self.phases.setdefault(phase, []).append(seconds * 1000)

    def totals(self) -> list[float]:
        return [sum(values) for values in zip(*self.phases.values(), strict=True)]

    def line(self) -> str:
        totals = self.totals()
        parts = "  ".join(f"{phase} {statistics.median(values):.0f}" for phase, values in self.phases.items())
        spread = f"min {min(totals):5.0f}  max {max(totals):5.0f}"
        return f"{self.name:9} p50 {statistics.median(totals):6.0f} ms  {spread}   ({parts})"


class OneVolume:
    """A store with one volume: the HOME of the floor's container."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def path(self, name: VolumeName) -> Path:
        return self._path

    def create(self, name: VolumeName, limit_bytes: int, labels: Mapping[str, str]) -> bool:
        return False

    def list(self) -> list[VolumeInfo]:
        return []

    def trash(self, name: VolumeName) -> None: ...

    restore = purge = trash


class Timer:
    def __init__(self, figures: Figures) -> None:
        self._figures, self._last = figures, time.monotonic()

    def lap(self, phase: str) -> None:
        now = time.monotonic()
        self._figures.add(phase, now - self._last)
        self._last = now


async def ours(client: AsyncClient, figures: Figures, steps: dict[str, list[float]]) -> None:
    timer = Timer(figures)
    row = await client.request("w", "stop")
    await client.settled("w", row.generation, 60)
    timer.lap("stop")
    row = await client.request("w", "start")
    row = await client.settled("w", row.generation, 60)
    timer.lap("start")
    async with execute(client, "w", ExecRequest(("true",), None, None, {}, None, stdin=False)) as running:
        async for _ in running.output():
            pass
        assert running.exit_code == 0
    timer.lap("exec")
    assert row.last_start is not None
    for step in row.last_start.steps:
        steps.setdefault(step.step, []).append(step.ms)


class Floor:
    """The same pod by bare CRI calls."""

    def __init__(self, runtime: CriRuntime, config: CriConfig, spec: ContainerSpec, home: Path) -> None:
        self.runtime, self.config, self.spec = runtime, config, spec
        self.pod = sandbox_config(config, spec)
        self.container_config = container_config(config, spec, {spec.mounts[0].volume: home})
        self.call = runtime._engine.call
        self.sandbox = self.container = ""

    async def up(self) -> None:
        request = cri_pb2.RunPodSandboxRequest(config=self.pod)
        self.sandbox = (await self.call(methods.RUN_POD_SANDBOX, request, timeout_s=30)).pod_sandbox_id
        create = cri_pb2.CreateContainerRequest(
            pod_sandbox_id=self.sandbox, config=self.container_config, sandbox_config=self.pod
        )
        self.container = (await self.call(methods.CREATE_CONTAINER, create, timeout_s=30)).container_id
        await self.call(
            methods.START_CONTAINER, cri_pb2.StartContainerRequest(container_id=self.container), timeout_s=30
        )

    async def down(self) -> None:
        stop = cri_pb2.StopContainerRequest(container_id=self.container, timeout=3)
        await self.call(methods.STOP_CONTAINER, stop, timeout_s=30)
        await self.call(
            methods.STOP_POD_SANDBOX, cri_pb2.StopPodSandboxRequest(pod_sandbox_id=self.sandbox), timeout_s=30
        )
        await self.call(
            methods.REMOVE_POD_SANDBOX, cri_pb2.RemovePodSandboxRequest(pod_sandbox_id=self.sandbox), timeout_s=30
        )

    async def round(self, figures: Figures) -> None:
        timer = Timer(figures)
        await self.down()
        timer.lap("stop")
        await self.up()
        timer.lap("start")
        session = await self.runtime.exec(self.spec.container, ExecSpec(("true",), USER, "/home/dev"))
        assert await session.wait() == 0
        await session.close()
        timer.lap("exec")


def ctr_up(ctr: list[str], image: str, home: Path, tools: Path) -> None:
    create = [*ctr, "container", "create"]
    for source, target, mode in ((home, "/home/dev", "rw"), (tools, "/opt/roost", "ro")):
        create += ["--mount", f"type=bind,src={source},dst={target},options=rbind:{mode}"]
    create += [image, "bench-ctr"]
    init = ["/opt/roost/bin/tini", "--", "/opt/roost/bin/busybox", "sleep", "100000"]
    subprocess.run([*create, *init], check=True, capture_output=True, timeout=60)
    subprocess.run([*ctr, "task", "start", "-d", "bench-ctr"], check=True, capture_output=True, timeout=60)


def ctr_down(ctr: list[str]) -> None:
    subprocess.run([*ctr, "task", "delete", "--force", "bench-ctr"], check=True, capture_output=True, timeout=60)
    subprocess.run([*ctr, "container", "delete", "bench-ctr"], check=True, capture_output=True, timeout=60)


def ctr_round(ctr: list[str], figures: Figures) -> None:
    def run(*args: str) -> None:
        subprocess.run([*ctr, *args], check=True, capture_output=True, timeout=60)

    timer = Timer(figures)
    run("task", "kill", "-s", "SIGKILL", "bench-ctr")
    run("task", "delete", "--force", "bench-ctr")
    timer.lap("stop")
    run("task", "start", "-d", "bench-ctr")
    timer.lap("start")
    run("task", "exec", "--exec-id", f"x{time.monotonic_ns()}", "bench-ctr", "/opt/roost/bin/busybox", "true")
    timer.lap("exec")


async def measure(roost: Roost) -> None:
    os.environ.update({key: value for key, value in roost.env.items() if key.startswith("ROOST_")})
    node_run, node_state = roost.run_dir / "node", roost.state / "node"
    socket = node_run / "containerd.sock"
    ident = roost.show("w")["id"]
    home = node_state / "pool" / "homes" / f"roost-{ident}-home"
    tools = next((node_state / "tools").iterdir())
    parent = f"/{roost.env['ROOST_NODE__INSTANCE']}"

    def prepare(name: str, limits: Limits) -> None:
        Group(name.lstrip("/")).create()

    with tempfile.TemporaryDirectory(prefix="rb", dir="/run") as scratch:
        config = CriConfig(
            socket=socket, run_dir=Path(scratch), log_dir=Path(scratch) / "logs", tools_dir=tools,
            volumes=OneVolume(home), cgroup_parent=parent, prepare_cgroup=prepare,
        )  # fmt: skip
        runtime = CriRuntime(config)
        image = await runtime.image(ImageRef(f"127.0.0.1:{roost.registry_port}/tiny:1"))
        assert image is not None
        name = ContainerId("roost-benchfloor")
        spec = ContainerSpec(
            container=name, image=image, user=USER, hostname="floor", working_dir="/home/dev",
            mounts=(VolumeMount(VolumeName("home"), "/home/dev"),), labels={"roost.dev/start": "1"},
        )  # fmt: skip
        (Path(scratch) / "logs" / name).mkdir(parents=True)
        config.hosts(name).parent.mkdir(parents=True)
        config.hosts(name).write_text(hosts_file(spec))
        prepare(config.cgroup(name), Limits())
        floor = Floor(runtime, config, spec, home)
        await floor.up()
        ctr = ["ctr", "--address", str(socket), "-n", "k8s.io"]
        await asyncio.to_thread(ctr_up, ctr, image.ref, home, tools)
        client = AsyncClient()
        figures = SimpleNamespace(ours=Figures("roost"), cri=Figures("bare CRI"), ctr=Figures("ctr"))
        steps: dict[str, list[float]] = {}
        await ours(client, Figures("warm-up"), {})
        await floor.round(Figures("warm-up"))
        for _ in range(ROUNDS):
            await ours(client, figures.ours, steps)
            await floor.round(figures.cri)
            await asyncio.to_thread(ctr_round, ctr, figures.ctr)
        await floor.down()
        await asyncio.to_thread(ctr_down, ctr)
        Group(config.cgroup(name).lstrip("/")).remove()
        await runtime.close()
    report(figures, steps, cli(roost))


def cli(roost: Roost) -> list[float]:
    """The same by three whole commands, each a new process."""
    found = []
    for _ in range(min(ROUNDS, 5)):
        begun = time.monotonic()
        roost.run("stop", "w")
        roost.run("start", "w")
        roost.run("exec", "w", "--", "true")
        found.append((time.monotonic() - begun) * 1000)
    return found


def report(figures: SimpleNamespace, steps: dict[str, list[float]], commands: list[float]) -> None:
    for item in (figures.ours, figures.cri, figures.ctr):
        print(item.line())
    print("steps of the start, p50 ms: " + "  ".join(f"{k} {statistics.median(v):.1f}" for k, v in steps.items()))
    print(f"three commands of the command line: p50 {statistics.median(commands):.0f} ms")
    pairs = [a / b for a, b in zip(figures.ours.totals(), figures.cri.totals(), strict=True)]
    print(f"ratio roost / bare CRI: {statistics.median(pairs):.2f}  (goal <= 1.5; roost p50 goal <= 700 ms)")
    pairs = [a / b for a, b in zip(figures.ours.totals(), figures.ctr.totals(), strict=True)]
    print(f"ratio roost / ctr (no pod, no network): {statistics.median(pairs):.2f}")


def main() -> None:
    roost = Roost()
    try:
        roost.run("node", "start")
        roost.run("server", "start")
        with tempfile.TemporaryDirectory() as folder:
            push_root(tiny_image(Path(folder)), f"127.0.0.1:{roost.registry_port}/tiny:1", user="dev")
            repository = Path(folder) / "repo"
            subprocess.run(["git", "init", "-q", str(repository)], check=True)
            identity = ["-c", "user.name=B", "-c", "user.email=b@example.com"]
            subprocess.run(
                ["git", "-C", str(repository), *identity, "commit", "-q", "--allow-empty", "-m", "x"], check=True
            )
            roost.run("up", str(repository), "--name", "w")
        asyncio.run(measure(roost))
    finally:
        roost.remove()


if __name__ == "__main__":
    main()
