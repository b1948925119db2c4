"""Seeding: without clobbering, whole or not at all, and never outside the volume."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from roost import faults
from roost.errors import SeedFailed, UnusableHome
from roost.home import seed as module
from roost.home import tree
from roost.home.seed import seed

UID, GID = os.geteuid(), os.getegid()
ONE, TWO = "sha256:" + "1" * 64, "sha256:" + "2" * 64


class Place:
    """An image with /home/dev, and a volume."""

    def __init__(self, folder: Path) -> None:
        self.image, self.volume = folder / "image", folder / "volume"
        self.home = self.image / "home/dev"
        self.home.mkdir(parents=True)
        self.volume.mkdir()

    def seed(self, digest: str = ONE, **more: Any) -> dict[str, Any]:
        arguments = {"home": "/home/dev", "uid": UID, "gid": GID, **more}
        return seed(image=str(self.image), volume=str(self.volume), image_digest=digest, **arguments)

    def marker(self) -> dict[str, Any]:
        found = json.loads((self.volume / ".roost/seed.json").read_text())
        assert isinstance(found, dict)
        return found

    def manifest(self) -> list[dict[str, Any]]:
        found = json.loads((self.volume / ".roost/manifest.json").read_text())["entries"]
        assert isinstance(found, list)
        return found


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def furnish(home: Path) -> None:
    (home / ".bashrc").write_text("alias ll='ls -l'\n")
    (home / ".ssh").mkdir(mode=0o700)
    (home / ".ssh/id").write_text("key")
    (home / ".ssh/id").chmod(0o600)
    (home / "shared").mkdir()
    (home / "shared").chmod(0o2775)
    (home / "shared/tool").write_text("#!/bin/sh\n")
    (home / "shared/tool").chmod(0o755)
    os.link(home / "shared/tool", home / "tool")
    (home / "link").symlink_to("/etc/passwd")
    os.mkfifo(home / "pipe", 0o640)
    with open(home / "sparse", "wb") as file:
        file.truncate(8 << 20)
        file.seek(4 << 20)
        file.write(b"middle")
    (home / os.fsdecode(b"latin-\xe9")).write_text("not UTF-8")
    (home / "empty").mkdir()
    os.utime(home / ".bashrc", (1_000_000_000, 1_000_000_000))
    os.utime(home / "shared", (1_100_000_000, 1_100_000_000))
    home.chmod(0o750)


def snapshot(folder: Path, *, mtimes: bool = True) -> dict[str, tuple[Any, ...]]:
    """Everything about a tree, `.roost` less its times."""
    found: dict[str, tuple[Any, ...]] = {}
    groups: dict[int, str] = {}
    for where, folders, files in os.walk(folder):
        for name in sorted([*folders, *files]):
            path = Path(where) / name
            state = path.lstat()
            relative = str(path.relative_to(folder))
            content: Any = None
            if stat.S_ISREG(state.st_mode):
                content = path.read_bytes()
                if relative == ".roost/seed.json":
                    content = json.loads(content)
                    content["seeded_at"] = 0
            elif stat.S_ISLNK(state.st_mode):
                content = os.readlink(path)
            first = groups.setdefault(state.st_ino, relative) if stat.S_ISREG(state.st_mode) else ""
            when = state.st_mtime_ns if mtimes and not stat.S_ISDIR(state.st_mode) else 0
            found[relative] = (state.st_mode, state.st_uid, state.st_gid, content, first, when)
            if relative.startswith(".roost"):
                found[relative] = (*found[relative][:4], "", 0)
    root = folder.stat()
    found["."] = (root.st_mode, root.st_uid, root.st_gid)
    return found


def test_everything_arrives_as_it_was(place: Place) -> None:
    furnish(place.home)
    (place.volume / "lost+found").mkdir()
    result = place.seed()
    assert result == {
        "state": "seeded",
        "files": 8,
        "directories": 3,
        "bytes": result["bytes"],
        "skipped": [],
        "kept": 0,
        "image_digest": ONE,
    }
    v = place.volume
    assert stat.S_IMODE(v.stat().st_mode) == 0o750
    assert stat.S_IMODE((v / ".ssh/id").stat().st_mode) == 0o600
    assert stat.S_IMODE((v / "shared").stat().st_mode) == 0o2775
    assert (v / "shared").stat().st_mtime == 1_100_000_000
    assert (v / ".bashrc").stat().st_mtime == 1_000_000_000
    assert (v / "tool").samefile(v / "shared/tool") and (v / "tool").stat().st_nlink == 2
    assert os.readlink(v / "link") == "/etc/passwd"
    assert stat.S_ISFIFO((v / "pipe").stat().st_mode) and stat.S_IMODE((v / "pipe").stat().st_mode) == 0o640
    assert (v / "sparse").read_bytes() == (place.home / "sparse").read_bytes()
    assert (v / "sparse").stat().st_blocks * 512 < 1 << 20
    assert (v / "lost+found").is_dir()
    assert not (v / ".roost/staged").exists() and not (v / ".roost/incoming").exists()
    listed = {entry["path"]: entry for entry in place.manifest()}
    assert set(listed) == {p for p in snapshot(v) if p not in (".", "lost+found") and not p.startswith(".roost")}
    for path, entry in listed.items():
        if entry["type"] == "file":
            assert entry["digest"] == tree.digest_of((v / path).read_bytes())
            assert entry["size"] == (v / path).stat().st_size


def test_again_is_quick_and_changes_nothing(place: Place) -> None:
    furnish(place.home)
    first = place.seed()
    (place.volume / ".bashrc").unlink()
    (place.volume / "mine").write_text("x")
    before = snapshot(place.volume)
    assert place.seed() == {**first, "state": "already"}
    assert snapshot(place.volume) == before


def test_what_is_there_stays(place: Place, tmp_path: Path) -> None:
    furnish(place.home)
    outside = tmp_path / "outside"
    outside.mkdir()
    (place.volume / ".bashrc").write_text("mine")
    (place.volume / ".ssh").symlink_to(outside)  # a directory in the image
    (place.volume / "link").mkdir()
    (place.volume / "shared").mkdir(mode=0o701)
    (place.volume / "shared/tool").symlink_to("nowhere")
    (place.volume / "shared/tool2").write_text("mine too")
    before = snapshot(place.volume)
    result = place.seed()
    assert result["state"] == "seeded" and result["kept"] == 4
    after = snapshot(place.volume)
    assert {path: after[path] for path in before if path != "."} == {p: v for p, v in before.items() if p != "."}
    assert list(outside.iterdir()) == []
    paths = {entry["path"] for entry in place.manifest()}
    assert paths == {"tool", "pipe", "sparse", os.fsdecode(b"latin-\xe9"), "empty"}
    assert result["files"] == 4


def test_another_image_is_noted_and_nothing_else(place: Place) -> None:
    furnish(place.home)
    place.seed(ONE)
    (place.home / "new").write_text("from the second image")
    before = {p: v for p, v in snapshot(place.volume).items() if p != ".roost/seed.json"}
    result = place.seed(TWO)
    assert (result["state"], result["image_digest"]) == ("other_image", TWO)
    place.seed(TWO)
    assert {p: v for p, v in snapshot(place.volume).items() if p != ".roost/seed.json"} == before
    assert [one["image_digest"] for one in place.marker()["history"]] == [TWO]
    assert place.marker()["image_digest"] == ONE
    assert place.seed(ONE)["state"] == "already"


def test_an_image_without_home(place: Place) -> None:
    result = place.seed(home="/home/ghost")
    assert (result["state"], result["files"]) == ("seeded", 0)
    assert stat.S_IMODE(place.volume.stat().st_mode) == 0o755
    with pytest.raises(UnusableHome):
        place.seed(TWO, home="/etc")


def test_deep_trees_end_somewhere_and_can_be_removed(place: Place) -> None:
    deep = os.open(place.home, os.O_RDONLY)
    for _ in range(tree.MAX_DEPTH + 50):
        os.mkdir("d", dir_fd=deep)
        inner = os.open("d", os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = inner
    os.close(deep)
    result = place.seed()
    assert result["state"] == "seeded" and "nested" in result["skipped"][0]["reason"]
    for parent, name in ((place.volume, "d"), (place.image, "home")):
        fd = os.open(parent, os.O_RDONLY)
        tree.remove(fd, name)
        assert name not in os.listdir(fd) and not [n for n in os.listdir(fd) if n.startswith(".remove")]
        os.close(fd)


# --- hostile


@pytest.mark.parametrize("planted", ["symlink", "file", "dangling"])
def test_a_planted_roost_is_moved_aside(place: Place, tmp_path: Path, planted: str) -> None:
    furnish(place.home)
    outside = tmp_path / "outside"
    outside.mkdir()
    if planted == "file":
        (place.volume / ".roost").write_text("mine")
    else:
        (place.volume / ".roost").symlink_to(outside if planted == "symlink" else tmp_path / "nowhere")
    result = place.seed()
    assert result["state"] == "seeded"
    assert [one["path"] for one in result["skipped"]] == [".roost"]
    assert list(outside.iterdir()) == [] and not (tmp_path / "nowhere").exists()
    assert (place.volume / ".roost.aside-0").lstat()
    assert (place.volume / ".roost").is_dir() and not (place.volume / ".roost").is_symlink()


@pytest.mark.parametrize("name", ["incoming", "staged", "seed.json", "manifest.json", "seed.json.new"])
@pytest.mark.parametrize("kind", ["symlink", "directory", "fifo", "garbage"])
def test_planted_names_inside_roost_lead_nowhere(place: Place, tmp_path: Path, name: str, kind: str) -> None:
    furnish(place.home)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    (place.volume / ".roost").mkdir()
    victim = place.volume / ".roost" / name
    if kind == "symlink":
        victim.symlink_to(outside / "precious" if "json" in name else outside)
    elif kind == "directory":
        (victim / "tree").mkdir(parents=True)
        (victim / "tree/x").symlink_to(outside)
        (victim / "about.json").write_text("{}")
    elif kind == "fifo":
        os.mkfifo(victim)
    else:
        victim.write_text('{"image_digest": 7}')
    assert place.seed()["state"] == "seeded"
    assert {p.name: p.read_text() for p in outside.iterdir()} == {"precious": "precious"}
    assert (place.volume / ".ssh/id").read_text() == "key"
    assert place.seed()["state"] == "already"


def test_an_image_cannot_bring_its_own_marker(place: Place) -> None:
    (place.home / ".roost").mkdir()
    (place.home / ".roost/seed.json").write_text("{}")
    result = place.seed()
    assert result["files"] == 0 and result["skipped"][0]["path"] == ".roost"
    assert place.marker()["image_digest"] == ONE


def test_two_at_once_are_kept_apart(place: Place) -> None:
    furnish(place.home)
    held = os.open(place.volume, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(SeedFailed, match="another process"):
        place.seed(lock_timeout_s=0.1)
    os.close(held)
    assert place.seed()["state"] == "seeded"


# --- killed


def killed_at(place: Place, nth: int, digest: str = ONE) -> bool:
    """Seed in a child that SIGKILLs itself at the nth point it reaches; whether it got there."""
    child = os.fork()
    if child == 0:
        left = nth

        def point(name: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        faults.point = point
        try:
            place.seed(digest)
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_killed_at_every_point(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = Place(tmp_path / "whole")
    furnish(whole.home)
    (whole.volume / "shared").mkdir()
    (whole.volume / ".bashrc").write_text("mine")
    shutil.copytree(whole.volume, tmp_path / "empty")
    result = whole.seed()
    expected = snapshot(whole.volume, mtimes=False)
    nth = 1
    while True:
        shutil.rmtree(whole.volume)
        shutil.copytree(tmp_path / "empty", whole.volume)
        reached = killed_at(whole, nth)
        again = whole.seed()
        assert {**again, "state": "seeded"} == result, f"at point {nth}"
        assert snapshot(whole.volume, mtimes=False) == expected, f"at point {nth}"
        if not reached:
            break
        nth += 1
    assert nth > 30


def test_an_image_that_changed_after_the_kill_completes_the_first(place: Place) -> None:
    furnish(place.home)
    text = Path(module.__file__).read_text()
    assert "home.seed.staged" in text
    nth = 1
    while True:
        assert killed_at(place, nth)
        if (place.volume / ".roost/staged").exists():
            break
        nth += 1
    (place.home / ".bashrc").write_text("of the second image")
    result = place.seed(TWO)
    assert result["state"] == "other_image"
    assert place.marker()["image_digest"] == ONE and (place.volume / ".bashrc").read_text().startswith("alias")


def test_every_point_has_a_name_of_its_own() -> None:
    text = Path(module.__file__).read_text() + Path(tree.__file__).read_text()
    found = re.findall(r'faults\.point\("([^"]+)"\)', text)
    assert len(found) == len(set(found)) >= 12
    assert all(name.startswith("home.seed.") for name in found)


names = st.sampled_from(["a", "b", "c", ".config", "lost+found"])
nodes = st.recursive(
    st.one_of(
        st.tuples(st.just("file"), st.binary(max_size=64), st.sampled_from([0o600, 0o644, 0o4755])),
        st.tuples(st.just("link"), st.sampled_from(["/nowhere", "a", "../b", "nowhere"])),
        st.tuples(st.just("fifo")),
    ),
    lambda inner: st.tuples(
        st.just("dir"), st.dictionaries(names, inner, max_size=4), st.sampled_from([0o700, 0o755, 0o2775])
    ),
    max_leaves=12,
)
trees = st.dictionaries(names, nodes, max_size=5)


def grow(folder: Path, what: dict[str, Any]) -> None:
    for name, node in what.items():
        path = folder / name
        if node[0] == "file":
            path.write_bytes(node[1])
            path.chmod(node[2])
        elif node[0] == "link":
            path.symlink_to(node[1])
        elif node[0] == "fifo":
            os.mkfifo(path, 0o600)
        else:
            path.mkdir()
            grow(path, node[1])
            path.chmod(node[2])


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    # Not under tmp_path: hypothesis runs many examples in one test.
    made = Path(tempfile.mkdtemp(prefix="roost-test-seed-"))
    yield made
    shutil.rmtree(made)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(image=trees, there=trees, kills=st.lists(st.integers(1, 60), max_size=3))
def test_interrupted_anywhere_it_ends_the_same(
    folder: Path, image: dict[str, Any], there: dict[str, Any], kills: list[int]
) -> None:
    here = Path(tempfile.mkdtemp(dir=folder))
    place = Place(here)
    grow(place.home, image)
    grow(place.volume, there)
    before = snapshot(place.volume)
    expected = place.seed()
    whole = snapshot(place.volume, mtimes=False)

    shutil.rmtree(place.volume)
    place.volume.mkdir()
    grow(place.volume, there)
    for nth in kills:
        killed_at(place, nth)
    result = place.seed()
    assert {**result, "state": "seeded"} == expected
    after = snapshot(place.volume, mtimes=False)
    assert after == whole
    for path, was in before.items():
        if path != ".":
            assert after[path][:4] == was[:4], f"{path} was there before"
    shutil.rmtree(here)
