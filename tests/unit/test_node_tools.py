"""The tools tree, the keep-alive and the pause image."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import stat
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from roost.errors import MissingProgram
from roost.node import tools
from roost.node.tools import ensure_tools, pause_image


def test_tree_is_addressed_by_content_and_read_only(tmp_path: Path) -> None:
    tree = ensure_tools(tmp_path)
    assert sorted(path.name for path in (tree / "bin").iterdir()) == ["busybox", "keepalive", "tini"]
    for path in (tree, tree / "bin", *(tree / "bin").iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o555
    before = (tree / "bin/tini").stat()
    assert ensure_tools(tmp_path) == tree
    assert (tree / "bin/tini").stat().st_ctime_ns == before.st_ctime_ns
    assert [entry.name for entry in tmp_path.iterdir()] == [tree.name]


def test_another_program_makes_another_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = ensure_tools(tmp_path)
    monkeypatch.setattr(tools, "KEEPALIVE", tools.KEEPALIVE + "# newer\n")
    other = ensure_tools(tmp_path)
    assert other != tree and tree.is_dir() and other.is_dir()


def test_dynamic_programs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "BUSYBOX", (Path("/bin/sleep"), tmp_path / "absent", Path("/etc/passwd")))
    with pytest.raises(MissingProgram, match="busybox-static"):
        ensure_tools(tmp_path)
    monkeypatch.setattr(tools, "TINI", tmp_path / "absent")
    with pytest.raises(MissingProgram, match="tini"):
        ensure_tools(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_pause_image_is_reproducible_and_sound(tmp_path: Path) -> None:
    tree = ensure_tools(tmp_path)
    image = pause_image(tree)
    assert image == pause_image(tree)
    with tarfile.open(fileobj=io.BytesIO(image.archive)) as tar:
        blobs = {}
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            blobs[member.name] = file.read()
    for name, data in blobs.items():
        if name.startswith("blobs/"):
            assert hashlib.sha256(data).hexdigest() == name.rpartition("/")[2]
    (top,) = json.loads(blobs["index.json"])["manifests"]
    assert top["annotations"]["io.containerd.image.name"] == image.ref
    assert image.ref == f"roost.local/pause:{top['digest'][7:19]}"


# the keep-alive, as PID 1's only child in a pid namespace


class Namespace:
    def __init__(self, tree: Path) -> None:
        self.tree = tree
        command = [str(tree / "bin/tini"), "--", str(tree / "bin/busybox"), "sh", str(tree / "bin/keepalive")]
        self.outer = subprocess.Popen(
            ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *command],
            stderr=subprocess.PIPE, env={"PATH": "/nonexistent"}, executable="/usr/bin/unshare",
        )  # fmt: skip
        self.init = self._wait_for(["sleep", "2147483647"])

    def _wait_for(self, last: list[str]) -> int:
        """Pid of PID 1 once the keep-alive sleeps."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            init = _children(self.outer.pid)
            shell = _children(init[0]) if init else []
            sleeper = _children(shell[0]) if shell else []
            if sleeper and _cmdline(sleeper[0])[-2:] == last:
                return init[0]
            time.sleep(0.005)
        raise AssertionError("the keep-alive did not come up")

    def inside(self, *argv: str, **kwargs: object) -> subprocess.Popen[bytes]:
        command = ["nsenter", "-t", str(self.init), "-p", "-m", *argv]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, **kwargs)  # type: ignore[call-overload]
        assert process.stdout.readline() == b"ready\n"
        process.stdout.close()
        return process  # type: ignore[no-any-return]

    def stop(self) -> float:
        """TERM to PID 1; milliseconds until all is gone."""
        started = time.monotonic()
        os.kill(self.init, signal.SIGTERM)
        assert self.outer.wait(15) == 0
        return (time.monotonic() - started) * 1000

    def close(self) -> bytes:
        if self.outer.poll() is None:
            os.kill(self.init, signal.SIGKILL)
        _, err = self.outer.communicate(timeout=10)
        return err


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _cmdline(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().removesuffix("\0").split("\0")


@pytest.fixture
def namespace(tmp_path: Path):
    if os.geteuid() != 0:
        pytest.skip("a pid namespace needs root")
    namespace = Namespace(ensure_tools(tmp_path))
    yield namespace
    namespace.close()


def test_alone_it_ends_at_once_and_without_a_word(namespace: Namespace) -> None:
    assert namespace.stop() < 200, "about 2 ms on an idle machine"
    assert namespace.close() == b""


def test_everybody_is_told_and_waited_for(namespace: Namespace) -> None:
    child = namespace.inside("sh", "-c", "trap 'sleep 0.3; exit 7' TERM; echo ready; sleep 60 & wait")
    assert 300 <= namespace.stop() < 3000
    assert child.wait(5) == 7, "its orderly end was not cut short"


def test_interactive_shells_are_hung_up(namespace: Namespace) -> None:
    """A shell with a terminal ignores TERM; HUP is its word to go."""
    ignores = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);print('ready', flush=True); time.sleep(60)"
    )
    child = namespace.inside("/usr/bin/python3", "-c", ignores)
    assert namespace.stop() < 3000
    assert child.wait(5) == -signal.SIGHUP


def test_who_will_not_go_is_waited_for_no_longer_than_the_grace(namespace: Namespace) -> None:
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    )
    child = namespace.inside("/usr/bin/python3", "-c", stubborn)
    assert namespace.stop() < 9900, "below the ten seconds after which the engine kills"
    assert child.wait(5) == -signal.SIGKILL
