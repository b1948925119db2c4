"""kill -9 of each process, of all of them at every step of `up` and of `rm`: the next run completes what was begun."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import start_with_image
from tests.e2e.harness import Roost, wait_until


@pytest.fixture
def work(roost: Roost, repository: Path) -> Iterator[str]:
    """A running workspace with a file in HOME."""
    name = "w-" + os.urandom(3).hex()
    roost.run("node", "start")
    roost.run("server", "start")
    roost.run("up", str(repository), "--name", name)
    roost.exec(name, "echo kept > ~/kept; sync")
    yield name
    roost.run("rm", name, "--yes")


def alive(roost: Roost, name: str) -> bool:
    return roost.run("exec", name, "--", "cat", "/home/dev/kept", check=False).stdout == b"kept\n"


def test_server_dies(roost: Roost, work: str) -> None:
    pid = roost.init_pid(work)
    roost.kill("server")
    assert roost.run("exec", work, "--", "true", check=False).returncode == 6
    assert roost.init_pid(work) == pid, "the workspace runs on"
    roost.run("server", "start")
    roost.wait_for(work, observed="running", start=1)
    assert alive(roost, work)
    assert roost.init_pid(work) == pid


def test_node_dies_and_the_next_takes_over(roost: Roost, work: str) -> None:
    pid, containerd = roost.init_pid(work), roost.pid_of("containerd")
    roost.kill("node")
    assert roost.init_pid(work) == pid
    roost.run("node", "start")
    assert alive(roost, work)
    assert roost.init_pid(work) == pid
    assert roost.pid_of("containerd") == containerd, "containerd was adopted"
    assert roost.show(work)["start"] == 1
    roost.run("restart", work)
    assert alive(roost, work)


def test_a_stopped_node_leaves_workspaces_running(roost: Roost, work: str) -> None:
    pid = roost.init_pid(work)
    roost.run("node", "stop")
    assert roost.pid_of("node") is None
    assert roost.pid_of("containerd") is None
    assert roost.init_pid(work) == pid
    roost.run("node", "start")
    assert alive(roost, work)
    assert roost.init_pid(work) == pid


def test_node_dies_while_the_container_crashes(roost: Roost, work: str) -> None:
    pid = roost.init_pid(work)
    roost.kill("node")
    os.kill(pid, signal.SIGKILL)
    roost.run("node", "start")
    wait_until(lambda: alive(roost, work), "the next node started it again")
    assert roost.init_pid(work) != pid


def test_containerd_dies(roost: Roost, work: str) -> None:
    pid, before = roost.init_pid(work), roost.pid_of("containerd")
    roost.kill("containerd")
    wait_until(lambda: roost.pid_of("containerd") not in (None, before), "containerd was started again")
    wait_until(lambda: alive(roost, work), "exec works again")
    assert roost.init_pid(work) == pid


def test_the_shim_dies(roost: Roost, work: str) -> None:
    start = roost.show(work)["start"]
    for pid in roost.shims():
        os.kill(pid, signal.SIGKILL)
    roost.wait_for(work, observed="running", start=start + 1)
    assert alive(roost, work)


def test_registry_dies(roost: Roost, work: str) -> None:
    before = roost.pid_of("registry")
    assert before is not None
    roost.kill("registry")
    wait_until(lambda: roost.pid_of("registry") not in (None, before), "the registry was started again")


def test_everything_dies(roost: Roost, work: str) -> None:
    roost.kill_everything()
    roost.run("node", "start")
    roost.run("server", "start")
    wait_until(lambda: alive(roost, work), "it was started again")


def test_the_server_dies_while_a_start_is_waited_for(roost: Roost, work: str) -> None:
    done: list[int] = []
    waiting = threading.Thread(target=lambda: done.append(roost.run("restart", work, check=False).returncode))
    waiting.start()
    roost.kill("server")
    waiting.join(60)
    assert done and done[0] in (0, 6), done
    roost.run("server", "start")
    wait_until(lambda: alive(roost, work), "the restart was completed")


# Every step of `up` and of `rm`.  The node kills itself at the point; then all the rest is killed too.

UP_POINTS = [
    "start.image.before", "start.image.after", "start.user.after", "start.volume.before", "start.volume.after",
    "start.seed.before", "start.seed.after", "start.container.before", "start.container.created",
    "start.container.after", "start.repository.before", "repository.cloned", "repository.placed",
    "start.repository.after",
]  # fmt: skip
RM_POINTS = ["stop.container.down", "stop.container.deleted", "rm.volume.trashed"]


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Roost]:
    """A roost that is killed again and again."""
    roost = Roost()
    try:
        start_with_image(roost, tmp_path_factory.mktemp("image"))
        yield roost
    finally:
        roost.remove()


def begin_and_die(roost: Roost, point: str, *verb: str) -> None:
    """Run a verb with a node that kills itself at a point; then kill everything else."""
    roost.run("node", "stop")
    roost.run("node", "start", env={"ROOST_NODE_CRASH_AT": point})
    roost.run("server", "start")
    node = roost.pid_of("node")
    assert node is not None
    process = subprocess.Popen(
        roost.command(*verb), env=roost.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    assert node.wait_gone(60), f"the node never came to {point}"
    roost.kill_everything()
    process.kill()  # it would wait for the server to come back
    process.wait(10)


@pytest.mark.parametrize("point", UP_POINTS)
def test_everything_dies_at_a_step_of_up(victim: Roost, repository: Path, point: str) -> None:
    begin_and_die(victim, point, "up", str(repository), "--name", "w")
    done = victim.json("up", str(repository), "--name", "w", timeout_s=60)
    assert done["observed"] == "running"
    assert victim.exec("w", "cat ~/my-repo/README.md ~/.config/tool/settings") == "hello, changed\nfrom the image\n"
    assert victim.exec("w", "ls -d ~/.roost-incoming-* 2>/dev/null || true") == ""
    victim.run("rm", "w", "--yes")
    assert victim.json("ls")["items"] == []


@pytest.mark.parametrize("point", RM_POINTS)
def test_everything_dies_at_a_step_of_rm(victim: Roost, repository: Path, point: str) -> None:
    victim.run("up", str(repository), "--name", "w")
    victim.exec("w", "echo kept > ~/kept; sync")
    begin_and_die(victim, point, "rm", "w", "--yes")
    victim.run("node", "start")
    victim.run("server", "start")
    wait_until(
        lambda: [i["observed"] for i in victim.json("ls", "--all")["items"] if i["name"] == "w"][:1] == ["deleted"],
        "the delete was completed",
    )
    victim.run("undelete", "w")
    victim.run("start", "w")
    assert victim.exec("w", "cat ~/kept") == "kept\n"
    victim.run("rm", "w", "--yes")
    again = victim.json("up", str(repository), "--name", "w")
    assert again["observed"] == "running"
    victim.run("rm", "w", "--yes")


@pytest.mark.parametrize("point", ["stop.container.down", "stop.container.deleted"])
def test_everything_dies_at_a_step_of_stop(victim: Roost, repository: Path, point: str) -> None:
    victim.run("up", str(repository), "--name", "w")
    begin_and_die(victim, point, "stop", "w")
    victim.run("node", "start")
    victim.run("server", "start")
    victim.wait_for("w", observed="stopped")
    victim.run("start", "w")
    victim.run("rm", "w", "--yes")
