"""Control groups of the real kernel."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from roost.linux.cgroup import Group

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def group() -> Iterator[Group]:
    parent = Group(f"roost-t{os.getpid()}")
    group = Group(f"{parent.name}/one")
    group.create()
    yield group
    assert parent.kill()
    parent.remove()
    assert not parent.exists()


def join(group: Group, *argv: str) -> subprocess.Popen[bytes]:
    """A process that is in the group before it runs the command."""
    script = 'while [ "$1" != -- ]; do echo $$ >"$1/cgroup.procs" || exit 9; shift; done; shift; exec "$@"'
    folders = {str(group.folder("freezer" if _freezer_v1() else "pids")), str(group.folder("pids"))}
    return subprocess.Popen(["sh", "-c", script, "sh", *sorted(folders), "--", *argv])


def _freezer_v1() -> bool:
    return any("freezer" in line.split(" - ")[-1] for line in Path("/proc/self/mountinfo").read_text().splitlines())


def wait_member(group: Group, pid: int) -> None:
    for _ in range(1000):
        if pid in group.processes():
            return
        os.sched_yield()
        subprocess.run(["sleep", "0.005"], check=True)
    raise AssertionError(f"{pid} never joined")


def test_limit_of_processes(group: Group) -> None:
    group.set_pids(1)
    child = join(group, "sh", "-c", "sleep 0; echo forked; true")
    assert child.wait(10) != 0, "with one process allowed, no fork succeeds"
    group.set_pids(None)
    child = join(group, "sh", "-c", "sleep 0; true")
    assert child.wait(10) == 0


def test_kill_leaves_nobody(group: Group) -> None:
    child = join(group, "sh", "-c", "trap '' TERM HUP; while :; do sleep 60 & sleep 60; done")
    wait_member(group, child.pid)
    assert group.kill()
    assert child.wait(5) == -9
    assert group.processes() == set()


@pytest.mark.skipif(not _freezer_v1(), reason="no v1 freezer on this host")
def test_kill_of_what_is_frozen(group: Group) -> None:
    child = join(group, "sleep", "60")
    wait_member(group, child.pid)
    (group.folder("freezer") / "freezer.state").write_text("FROZEN")
    assert group.kill(5)
    assert child.wait(5) == -9


def test_remove_of_a_group_with_processes_is_refused(group: Group) -> None:
    child = join(group, "sleep", "60")
    wait_member(group, child.pid)
    with pytest.raises(OSError, match="busy"):
        group.remove(timeout_s=0.05)
    assert child.poll() is None
    assert group.kill()
    child.wait(5)
