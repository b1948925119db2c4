"""Do one thing to a runtime in a process that may be killed: `python -m tests.conformance.crasher JSON`."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from roost.linux.cgroup import Group
from roost.runtimes.cri import CriConfig, CriRuntime
from roost.runtimes.protocol import (
    LABEL_START,
    LABEL_WORKSPACE,
    ContainerId,
    ContainerSpec,
    ContainerUser,
    ExecSpec,
    ImageRef,
    Limits,
    Tool,
    VolumeMount,
    VolumeName,
)
from tests.conformance.volumes import DirectoryVolumes

DEV = ContainerUser(1000, 1000, "dev", "/home/dev", groups=(2000,))


async def main(order: dict[str, str]) -> None:
    def prepare(name: str, limits: Limits) -> None:
        Group(name.lstrip("/")).create()

    config = CriConfig(
        socket=Path(order["socket"]),
        run_dir=Path(order["run_dir"]),
        log_dir=Path(order["log_dir"]),
        tools_dir=Path(order["tools_dir"]),
        volumes=DirectoryVolumes(Path(order["volumes"])),
        cgroup_parent=order["cgroup_parent"],
        prepare_cgroup=prepare,
        remove_cgroup=lambda name: Group(name.lstrip("/")).remove(),
    )
    runtime = CriRuntime(config)
    name, volume = ContainerId(order["container"]), VolumeName(order["volume"])
    image = await runtime.image(ImageRef(order["image"]))
    assert image is not None
    spec = ContainerSpec(
        name, image, DEV, "host", {"HOME": "/home/dev"}, "/home/dev", (VolumeMount(volume, "/home/dev"),),
        labels={LABEL_WORKSPACE: order["ident"], LABEL_START: order["start"]},
    )  # fmt: skip
    print("begins", flush=True)
    match order["do"]:
        case "up":
            await runtime.create(spec)
            await runtime.start(name)
        case "delete":
            await runtime.stop(name, 5)
            await runtime.delete(name)
        case "exec":
            session = await runtime.exec(
                name, ExecSpec(("sh", "-c", "echo runs; sleep 1000"), DEV, "/", {}, None, True)
            )
            async for _, data in session.output():
                print(data.decode(), flush=True)
        case "tool":
            await runtime.run_tool(Tool("tests.conformance.tool", ("--hang",)), image, volume)
    print("done", flush=True)
    await runtime.close()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
