"""The paths of control groups, on trees of plain files."""

from __future__ import annotations

from pathlib import Path

import pytest

from roost.errors import MissingFeature
from roost.linux.cgroup import Group, find_hierarchies


def mountinfo(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "mountinfo"
    path.write_text("".join(line + "\n" for line in lines))
    return path


def v1(path: Path, options: str) -> str:
    path.mkdir(parents=True, exist_ok=True)
    return f"31 23 0:27 / {path} rw,relatime shared:9 - cgroup cgroup {options}"


def v2(path: Path, controllers: str) -> str:
    path.mkdir(parents=True, exist_ok=True)
    (path / "cgroup.controllers").write_text(controllers)
    (path / "cgroup.subtree_control").write_text("")
    return f"30 23 0:26 / {path} rw - cgroup2 cgroup2 rw"


def test_hybrid_host(tmp_path: Path) -> None:
    root = tmp_path / "cg"
    info = mountinfo(
        tmp_path,
        f"23 1 0:22 / {root} rw - tmpfs tmpfs rw,mode=755",
        v1(root / "pids", "rw,pids"),
        v1(root / "cpu", "rw,cpu,cpuacct"),
        v1(root / "systemd", "rw,xattr,name=systemd"),
        v1(root / "devices", "rw,devices"),
        v2(root / "unified", "hugetlb\n"),
    )
    hierarchies = find_hierarchies(info)
    assert [(h.path.name, h.version) for h in hierarchies] == [
        ("unified", 2), ("cpu", 1), ("devices", 1), ("pids", 1), ("systemd", 1),
    ]  # fmt: skip
    group = Group("roost-t/one", hierarchies)
    assert not group.exists()
    group.create()
    made = sorted(str(p.parent.parent.relative_to(root)) for p in root.glob("*/roost-t/one"))
    assert made == ["cpu", "pids", "unified"], "limits and freezing need these; systemd's and devices are left alone"
    group.set_pids(7)
    assert (root / "pids/roost-t/one/pids.max").read_text() == "7"
    (root / "pids/roost-t/one/pids.max").unlink()
    (root / "devices/roost-t/one/deeper").mkdir(parents=True)
    group.remove()
    assert not group.exists()
    assert (root / "pids/roost-t").is_dir(), "a parent is another group"
    with pytest.raises(MissingFeature):
        group.folder("memory")


def test_v2_hands_controllers_down(tmp_path: Path) -> None:
    root = tmp_path / "cg"
    hierarchies = find_hierarchies(mountinfo(tmp_path, v2(root, "cpuset cpu io memory pids")))
    (root / "roost-t").mkdir()
    (root / "roost-t/cgroup.controllers").write_text("pids")
    (root / "roost-t/cgroup.subtree_control").write_text("")
    group = Group("roost-t/one", hierarchies)
    group.create()
    assert (root / "cgroup.subtree_control").read_text() == "+io", "the last of one write each"
    assert (root / "roost-t/cgroup.subtree_control").read_text() == "+pids"
    assert group.folder("pids") == root / "roost-t/one"


def test_processes_of_the_whole_tree(tmp_path: Path) -> None:
    root = tmp_path / "cg"
    group = Group("roost-t", find_hierarchies(mountinfo(tmp_path, v1(root / "pids", "rw,pids"), v2(root / "u", ""))))
    group.create()
    (root / "pids/roost-t/cgroup.procs").write_text("11\n0\n")
    (root / "u/roost-t/a").mkdir()
    (root / "u/roost-t/a/cgroup.procs").write_text("11\n12\n")
    assert group.processes() == {11, 12}


def test_mount_points_with_spaces(tmp_path: Path) -> None:
    root = tmp_path / "a b"
    line = v1(root, "rw,pids").replace("a b", "a\\040b")
    assert find_hierarchies(mountinfo(tmp_path, line))[0].path == root


def test_no_cgroups(tmp_path: Path) -> None:
    with pytest.raises(MissingFeature):
        find_hierarchies(mountinfo(tmp_path, "23 1 0:22 / / rw - ext4 /dev/vda rw"))


@pytest.mark.parametrize("name", ["", "/", "../x", "a/../b", "a//b", "A"])
def test_names_that_leave_the_tree(name: str) -> None:
    with pytest.raises(ValueError, match="not a cgroup name"):
        Group(name, ())
