"""Control groups by name, whatever the host mounts: v2, v1, or both at once.

On v2 a group is one directory and its parents must hand the controllers down (`cgroup.subtree_control`); on v1 it is a
directory of the same name in each hierarchy; on a hybrid host runc 1.1 joins the v1 hierarchies *and* the unified one.
So a group here is a name and the set of directories it has.  Names are relative to the root of each mounted hierarchy,
as runc takes a `cgroup_parent`, not to the group we sit in ourselves: that one may be a session or a service that ends
before the workspaces do, and v2 lets no group hold processes and hand controllers down (cgroups(7), "no internal
processes").  In a container of its own cgroup namespace the root *is* a group with processes in it: they are moved into
a leaf `init` beside ours, as container engines inside containers do.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from roost.errors import MissingFeature

MOUNTINFO = Path("/proc/self/mountinfo")
_NEEDED_V1 = frozenset({"pids", "memory", "cpu", "freezer"})
_WANTED_V2 = ("pids", "memory", "cpu", "io")
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*(/[a-z0-9][a-z0-9_.-]*)*")
_LEAF = "init"


@dataclass(frozen=True)
class Hierarchy:
    """One mounted tree of groups."""

    path: Path
    version: int
    """1 or 2."""
    controllers: frozenset[str]
    """v1: those bound to it (none: a named one, as systemd's); v2: those its root may hand down."""


def find_hierarchies(mountinfo: Path = MOUNTINFO) -> tuple[Hierarchy, ...]:
    """Every mounted hierarchy, v2 first (proc_pid_mountinfo(5)). Raises MissingFeature when there is none."""
    found: dict[Path, Hierarchy] = {}
    for line in mountinfo.read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _source, options = after.split(" ", 2)
        if kind not in ("cgroup", "cgroup2"):
            continue
        path = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), before.split(" ")[4]))
        if kind == "cgroup2":
            controllers = _read(path / "cgroup.controllers").split()
            found[path] = Hierarchy(path, 2, frozenset(controllers))
        else:
            bound = {option for option in options.split(",") if not option.startswith("name=")} - {"rw", "ro", "xattr"}
            found[path] = Hierarchy(path, 1, frozenset(bound))
    if not found:
        raise MissingFeature(
            "no cgroup file system is mounted", next_step="Mount one: `mount -t cgroup2 none /sys/fs/cgroup`."
        )
    return tuple(sorted(found.values(), key=lambda hierarchy: (-hierarchy.version, str(hierarchy.path))))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _tree(folder: Path) -> Iterator[Path]:
    """A group's directory and all below it, the deepest first."""
    with suppress(OSError):
        for entry in list(folder.iterdir()):
            if entry.is_dir():
                yield from _tree(entry)
    yield folder


class Group:
    """A group of processes, such as `roost-demo/roost-abc`; every method may be called again."""

    def __init__(self, name: str, hierarchies: tuple[Hierarchy, ...] | None = None) -> None:
        if not _NAME.fullmatch(name):
            raise ValueError(f"not a cgroup name: {name!r}")
        self.name = name
        self._hierarchies = find_hierarchies() if hierarchies is None else hierarchies

    def _folders(self) -> list[tuple[Hierarchy, Path]]:
        return [(h, h.path / self.name) for h in self._hierarchies if (h.path / self.name).is_dir()]

    def folder(self, controller: str) -> Path:
        """Where this group's files of a controller are. Raises MissingFeature when no hierarchy has the controller."""
        for hierarchy in self._hierarchies:
            if controller in hierarchy.controllers:
                return hierarchy.path / self.name
        raise MissingFeature(f"no cgroup hierarchy has the controller {controller}")

    def exists(self) -> bool:
        return bool(self._folders())

    def create(self) -> None:
        """Make it, with its parents, in every hierarchy that limits or freezes. Raises OSError."""
        for hierarchy in self._hierarchies:
            if hierarchy.version == 2:
                self._create_v2(hierarchy)
            elif hierarchy.controllers & _NEEDED_V1:
                (hierarchy.path / self.name).mkdir(parents=True, exist_ok=True)

    def _create_v2(self, hierarchy: Hierarchy) -> None:
        folder = hierarchy.path
        wanted = [name for name in _WANTED_V2 if name in hierarchy.controllers]
        for part in self.name.split("/"):
            if wanted:
                _hand_down(folder, wanted)
            folder = folder / part
            folder.mkdir(exist_ok=True)

    def set_pids(self, most: int | None) -> None:
        """Limit the number of processes and threads; None: no limit. Raises OSError, MissingFeature."""
        (self.folder("pids") / "pids.max").write_text("max" if most is None else str(most))

    def processes(self) -> set[int]:
        """Pids in it and below, as our pid namespace numbers them; those it cannot see are left out."""
        pids: set[int] = set()
        for _, folder in self._folders():
            for each in _tree(folder):
                pids.update(int(line) for line in _read(each / "cgroup.procs").split())
        return pids - {0}

    def kill(self, timeout_s: float = 10.0) -> bool:
        """SIGKILL everything in it, until nothing is left; False when the time ran out first. Blocks."""
        deadline = time.monotonic() + timeout_s
        pause = 0.001
        while pids := self.processes():
            for hierarchy, folder in self._folders():
                if hierarchy.version == 2:
                    with suppress(OSError):  # Linux 5.14; kills what is frozen, and what forks, too
                        (folder / "cgroup.kill").write_text("1")
            for pid in pids:
                self._kill_one(pid)
            self._thaw_v1()
            if time.monotonic() > deadline:
                return False
            time.sleep(pause)
            pause = min(0.05, pause * 2)
        return True

    def _kill_one(self, pid: int) -> None:
        """Through a pidfd, once the process it holds is seen to be in the group: a reused pid is not hit."""
        try:
            fd = os.pidfd_open(pid)
        except OSError:
            return
        try:
            inside = _read(Path(f"/proc/{pid}/cgroup")).splitlines()
            # `id:controllers:path`; the path is relative to the namespace's root, as our names are to the mount's.
            paths = [line.split(":", 2)[2].strip("/") for line in inside]
            if any(f"/{path}/".find(f"/{self.name}/") >= 0 for path in paths):
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
        finally:
            os.close(fd)

    def _thaw_v1(self) -> None:
        """SIGKILL acts on a v1-frozen task only once it is thawed."""
        for hierarchy, folder in self._folders():
            if "freezer" in hierarchy.controllers and hierarchy.version == 1:
                for each in _tree(folder):
                    with suppress(OSError):
                        if (each / "freezer.state").read_text().strip() != "THAWED":
                            (each / "freezer.state").write_text("THAWED")

    def remove(self, timeout_s: float = 2.0) -> None:
        """Remove it with everything below, in every hierarchy; absent: no error.

        A group whose last process has just died is busy for a moment: tried again until the time is over, then
        OSError (EBUSY). Groups with processes are not emptied: `kill` first. Blocks.
        """
        deadline = time.monotonic() + timeout_s
        for _, folder in self._folders():
            for each in _tree(folder):
                self._rmdir(each, deadline)

    def _rmdir(self, folder: Path, deadline: float) -> None:
        while True:
            try:
                folder.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
            time.sleep(0.005)


def _hand_down(folder: Path, controllers: list[str]) -> None:
    """Let the children of a v2 group have these controllers, as many as it has itself."""
    control = folder / "cgroup.subtree_control"
    have = set(_read(folder / "cgroup.controllers").split())
    on = set(_read(control).split())
    for controller in controllers:
        if controller not in have or controller in on:
            continue
        try:
            control.write_text(f"+{controller}")
        except OSError as error:
            # Only a group that is not the kernel's root (it alone has no cgroup.type) refuses for its processes.
            if error.errno != errno.EBUSY or not (folder / "cgroup.type").exists():
                raise
            _evacuate(folder)
            control.write_text(f"+{controller}")


def _evacuate(folder: Path) -> None:
    leaf = folder / _LEAF
    leaf.mkdir(exist_ok=True)
    for pid in _read(folder / "cgroup.procs").split():
        with suppress(ProcessLookupError):
            (leaf / "cgroup.procs").write_text(pid)
