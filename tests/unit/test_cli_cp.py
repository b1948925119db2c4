"""cp: trees both ways, and streams made by an enemy."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roost.cli.copy import Place
from roost.cli.untar import unpack
from roost.errors import CopyFailed
from tests.unit.cli_server import Served, serve


@pytest.fixture
def served() -> Iterator[Served]:
    with tempfile.TemporaryDirectory(prefix="roost-t") as root, serve(Path(root)) as running:
        running.fake.add("web")
        yield running


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    (top / "sub" / "empty").mkdir(parents=True)
    (top / "file").write_bytes(os.urandom(300_000))
    (top / "sub" / ("long" * 40)).write_text("long name")
    (top / "sub" / "-dash").write_text("dash")
    (top / "run").write_text("#!/bin/sh")
    (top / "run").chmod(0o755)
    (top / "link").symlink_to("sub/-dash")
    return top


def same(one: Path, two: Path) -> None:
    subprocess.run(["diff", "-r", "--no-dereference", str(one), str(two)], check=True, capture_output=True)
    assert (two / "run").stat().st_mode & 0o777 == 0o755
    assert os.readlink(two / "link") == "sub/-dash"


def test_a_directory_there_and_back(served: Served, tree: Path, tmp_path: Path) -> None:
    home = served.fake.home
    done = served.run("cp", str(tree), "web:made", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"] == 5
    same(tree, home / "made")
    assert served.run("cp", str(tree), "web:made").returncode == 0, "into a directory that is there"
    same(tree, home / "made" / "tree")
    assert served.run("cp", f"{tree}/.", "web:.").returncode == 0, "its content"
    subprocess.run(["diff", "-r", tree / "sub", home / "sub"], check=True)
    back = tmp_path / "back"
    assert served.run("cp", "web:made/tree", str(back)).returncode == 0
    same(tree, back)
    assert served.run("cp", "web:made/tree", str(back)).returncode == 0
    same(tree, back / "tree")


def test_files(served: Served, tmp_path: Path) -> None:
    home = served.fake.home
    (tmp_path / "a").write_text("one")
    assert served.run("cp", str(tmp_path / "a"), "web:b").returncode == 0
    assert (home / "b").read_text() == "one"
    (tmp_path / "a").write_text("two")
    assert served.run("cp", str(tmp_path / "a"), "web:b").returncode == 0, "replaced"
    assert (home / "b").read_text() == "two"
    assert served.run("cp", str(tmp_path / "a"), f"web:{home}").returncode == 0
    assert (home / "a").read_text() == "two"
    assert served.run("cp", "web:b", str(tmp_path / "c")).returncode == 0
    assert (tmp_path / "c").read_text() == "two"
    assert served.run("cp", "web:b", ".", cwd=tmp_path).returncode == 0
    assert (tmp_path / "b").read_text() == "two"


def test_a_symlink_that_is_named_is_followed(served: Served, tmp_path: Path) -> None:
    (served.fake.home / "real").write_text("content")
    (served.fake.home / "link").symlink_to("real")
    assert served.run("cp", "web:link", str(tmp_path)).returncode == 0
    assert (tmp_path / "link").read_text() == "content" and not (tmp_path / "link").is_symlink()


def test_what_is_left_out_is_said(served: Served, tmp_path: Path) -> None:
    (served.fake.home / "d").mkdir()
    (served.fake.home / "d" / "out").symlink_to("/etc/passwd")
    (served.fake.home / "d" / "file").write_text("content")
    done = served.run("cp", "web:d", str(tmp_path), "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["code"] == "cp.failed"
    assert b"/etc/passwd" in done.stderr
    assert (tmp_path / "d" / "file").read_text() == "content"


def test_tar_streams(served: Served, tree: Path) -> None:
    packed = subprocess.run(["tar", "-C", str(tree), "-cf", "-", "."], check=True, capture_output=True).stdout
    (served.fake.home / "into").mkdir()
    assert served.run("cp", "-", "web:into", stdin=packed).returncode == 0
    same(tree, served.fake.home / "into")
    done = served.run("cp", "web:into", "-")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        assert "into/sub/-dash" in archive.getnames()


@pytest.mark.parametrize(
    ("source", "target", "code"),
    [
        ("nosuch", "web:x", 1),
        ("web:nosuch", "x", 1),
        ("web:x", "other:y", 2),
        ("a", "b", 2),
        ("/etc/hostname", "web:no/such/dir/", 1),
        ("/etc/hostname", "web:no/such/dir", 1),
        ("/etc/hostname", "nosuch:x", 3),
        ("web:.", "/no/such/dir/x", 1),
    ],
)
def test_what_cannot_be_copied(served: Served, tmp_path: Path, source: str, target: str, code: int) -> None:
    done = served.run("cp", source, target, "--json", cwd=tmp_path)
    assert done.returncode == code
    assert json.loads(done.stdout)["error"]["exit_code"] == code
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("web:/a:b", Place("web", "/a:b")),
        ("web:", Place("web", ".")),
        ("./web:x", Place(None, "./web:x")),
        ("/a:b", Place(None, "/a:b")),
        ("A:b", Place(None, "A:b")),
        ("-", Place(None, "-")),
    ],
)
def test_places(text: str, place: Place) -> None:
    assert Place.of(text) == place


# --- hostile streams ----------------------------------------------------------------------------------------------


def stream(*entries: tuple[str, bytes | dict[str, object]]) -> io.BytesIO:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, what in entries:
            member = tarfile.TarInfo(name)
            data = b""
            if isinstance(what, bytes):
                data, member.size = what, len(what)
            else:
                for key, value in what.items():
                    setattr(member, key, value)
            archive.addfile(member, io.BytesIO(data))
    out.seek(0)
    return out


DIR = {"type": tarfile.DIRTYPE, "mode": 0o755}


def symlink(target: str) -> dict[str, object]:
    return {"type": tarfile.SYMTYPE, "linkname": target}


def hardlink(target: str) -> dict[str, object]:
    return {"type": tarfile.LNKTYPE, "linkname": target}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("mine")
    (tmp_path / "into").mkdir()
    return tmp_path


HOSTILE: dict[str, tuple[tuple[str, bytes | dict[str, object]], ...]] = {
    "absolute": (("/tmp/roost-t-evil", b"x"),),
    "dots": (("r/../../outside/secret", b"x"),),
    "dots-first": (("../outside/secret", b"x"),),
    "not asked for": (("other", b"x"),),
    "symlink out": (("r", DIR), ("r/l", symlink("../../outside"))),
    "symlink absolute": (("r", DIR), ("r/l", symlink("/etc"))),
    "symlink out of a symlink": (("r", DIR), ("r/l", symlink("d/../x"))),
    "symlink as the root": (("r", symlink("../outside")),),
    "device": (("r", DIR), ("r/d", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3})),
    "fifo": (("r", {"type": tarfile.FIFOTYPE}),),
    "hard link out": (("r", DIR), ("r/h", hardlink("../outside/secret"))),
    "hard link absolute": (("r", DIR), ("r/h", hardlink("/etc/passwd"))),
    "hard link to what was there": (("r", DIR), ("r/h", hardlink("r/before"))),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_entries_are_left_out(place: Path, name: str) -> None:
    (place / "into" / "r").mkdir()
    (place / "into" / "r" / "before").write_text("before")
    result = unpack(stream(*HOSTILE[name]), str(place / "into"), "r", "r")
    assert result.left_out_count == 1 and result.left_out
    assert (place / "outside" / "secret").read_text() == "mine"
    assert sorted(p.name for p in place.rglob("*")) == ["before", "into", "outside", "r", "secret"]


def test_writing_through_a_symlink_of_the_stream(place: Path) -> None:
    # The classic: a link first, then a file below it. The file wins its own directory, the link is not made.
    entries = stream(("r", DIR), ("r/l", symlink("sub")), ("r/l/x", b"x"), ("r/sub", DIR))
    result = unpack(entries, str(place / "into"), "r", "r")
    assert (place / "into" / "r" / "l").is_dir() and not (place / "into" / "r" / "l").is_symlink()
    assert result.left_out_count == 1


def test_writing_through_a_symlink_that_was_there(place: Path) -> None:
    (place / "into" / "r").mkdir()
    (place / "into" / "r" / "l").symlink_to(place / "outside")
    (place / "into" / "r" / "f").symlink_to(place / "outside" / "secret")
    entries = stream(("r", DIR), ("r/l/secret", b"x"), ("r/f", b"new"), ("r/l", DIR))
    result = unpack(entries, str(place / "into"), "r", "r")
    assert (place / "outside" / "secret").read_text() == "mine"
    assert result.left_out_count == 2
    assert (place / "into" / "r" / "f").read_text() == "new" and not (place / "into" / "r" / "f").is_symlink()


def test_a_hard_link_that_was_there_is_not_written_to(place: Path) -> None:
    os.link(place / "outside" / "secret", place / "into" / "f")
    unpack(stream(("r", b"new")), str(place / "into"), "r", "f")
    assert (place / "outside" / "secret").read_text() == "mine"
    assert (place / "into" / "f").read_text() == "new"


def test_modes_and_links_inside(place: Path) -> None:
    entries = stream(
        ("r", {"type": tarfile.DIRTYPE, "mode": 0o7777}),
        ("r/suid", {"mode": 0o6777}),
        ("r/bin", {"type": tarfile.DIRTYPE, "mode": 0o500}),
        ("r/bin/tool", b"tool"),
        ("r/tool", symlink("bin/tool")),
        ("r/same", hardlink("r/bin/tool")),
        ("r/bin/up", symlink("../tool")),
    )
    result = unpack(entries, str(place / "into"), "r", "")
    top = place / "into"
    assert (result.left_out_count, result.files) == (0, 5)
    assert (top / "suid").stat().st_mode & 0o7777 == 0o755
    assert (top / "tool").read_text() == (top / "same").read_text() == (top / "bin" / "up").read_text() == "tool"
    assert (top / "bin").stat().st_mode & 0o7777 == 0o700


@pytest.mark.parametrize("cut", [100, 1500])
def test_a_stream_that_is_cut_off(place: Path, cut: int) -> None:
    whole = stream(("r", DIR), ("r/f", b"x" * 5000)).getvalue()
    with pytest.raises(CopyFailed):
        unpack(io.BytesIO(whole[:cut]), str(place / "into"), "r", "r")


@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from(["r", "a", "b", "..", ".", ""]), min_size=1, max_size=5).map("/".join),
            st.one_of(
                st.just(DIR),
                st.binary(max_size=5),
                st.lists(st.sampled_from(["r", "a", "b", "..", ".", ""]), max_size=5).map("/".join).map(symlink),
                st.lists(st.sampled_from(["r", "a", "b", ".."]), max_size=4).map("/".join).map(hardlink),
            ),
        ),
        max_size=8,
    )
)
@settings(max_examples=150, deadline=None)
def test_nothing_gets_out(entries: list[tuple[str, bytes | dict[str, object]]]) -> None:
    with tempfile.TemporaryDirectory(prefix="roost-t") as root:
        into = Path(root) / "into"
        into.mkdir()
        (Path(root) / "a").write_text("mine")
        try:
            unpack(stream(*entries), str(into), "r", "r")
        except CopyFailed:
            pass
        assert sorted(os.listdir(root)) == ["a", "into"]
        assert (Path(root) / "a").read_text() == "mine"
        assert set(os.listdir(into)) <= {"r"}
        for path in into.rglob("*"):
            if path.is_symlink():
                target = os.path.realpath(path)
                top = os.path.realpath(into / "r")
                assert target == top or target.startswith(f"{top}/")
