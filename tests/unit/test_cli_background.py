"""Server and node in the background: what they get, how their death is told, and that a pid file is not believed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from roost.cli import background
from roost.client import AsyncClient, parse_server_url
from roost.client.address import LocalPaths, local_paths
from roost.errors import NeedsRoot, NodeUnreachable, ServerUnreachable, TimedOut
from roost.linux.process import PidFile, ProcessId, write_pidfile
from tests.unit.cli_server import Served, serve


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="roost-t") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_the_environment_of_a_part() -> None:
    given = {
        **{"PATH": "/bin", "HOME": "/root", "SSH_AUTH_SOCK": "/x", "AWS_SECRET": "x", "HTTPS_PROXY": "p"},
        **{"ROOST_RUN_DIR": "/r", "ROOST_POOL__STEP_BYTES": "1", "ROOST_TOKEN": "t", "ROOST_SERVER_URL": "u"},
        **{"ROOST_CRASH_AT": "a", "ROOST_NODE_CRASH_AT": "b", "ROOST_SERVER_CRASH_AT": "c:2"},
    }
    common = {
        "PATH": "/bin",
        "HOME": "/root",
        "HTTPS_PROXY": "p",
        "ROOST_RUN_DIR": "/r",
        "ROOST_POOL__STEP_BYTES": "1",
    }
    assert background.environment("node", given) == {**common, "ROOST_CRASH_AT": "b"}
    assert background.environment("server", given) == {**common, "ROOST_CRASH_AT": "c:2"}
    del given["ROOST_NODE_CRASH_AT"]
    assert background.environment("node", given) == common


def test_a_pid_file_alone_is_not_believed(root: Path) -> None:
    paths = LocalPaths(root, root, 1)
    (root / "server").mkdir()
    assert background.running("server", paths) is None
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    named = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "roost", "server"])
    try:
        for process, believed in ((stranger, False), (named, True)):
            found = ProcessId.of(process.pid)
            assert found is not None
            write_pidfile(root / "server" / "server.pid", PidFile(found))
            assert (background.running("server", paths) is not None) == believed
    finally:
        for process in (stranger, named):
            process.kill()
            process.wait()
    assert background.running("server", paths) is None, "it is dead"


def environment(served_root: Path, port: int) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ROOST_")}
    source = os.pathsep.join([str(Path(__file__).parents[2] / "src"), kept.get("PYTHONPATH", "")])
    own = {"ROOST_RUN_DIR": str(served_root / "run"), "ROOST_STATE_DIR": str(served_root / "state")}
    own |= {"ROOST_CACHE_DIR": str(served_root / "cache"), "ROOST_SERVER__PORT": str(port), "PYTHONPATH": source}
    return {**kept, **own}


def roost(env: dict[str, str], *args: str) -> subprocess.CompletedProcess[bytes]:
    argv = [sys.executable, "-P", "-m", "roost.cli.main", *args]
    return subprocess.run(argv, env=env, capture_output=True, timeout=90)


def test_start_status_stop_of_the_server(root: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = environment(root, port)
    assert json.loads(roost(env, "server", "status", "--json").stdout)["running"] is False
    started = roost(env, "server", "start", "--json")
    pid = json.loads(started.stdout).get("pid")
    try:
        assert started.returncode == 0, started.stderr
        again = json.loads(roost(env, "server", "start", "--json").stdout)
        assert again == {"process": "server", "running": True, "pid": pid}
        status = json.loads(roost(env, "server", "status", "--json").stdout)
        assert (status["running"], status["pid"], status["server"]["reachable"]) == (True, pid, True)
        assert json.loads(roost(env, "ls", "--json").stdout) == {"items": []}
    finally:
        stopped = roost(env, "server", "stop", "--json")
    assert json.loads(stopped.stdout) == {"process": "server", "running": False, "pid": pid}
    assert json.loads(roost(env, "server", "stop", "--json").stdout)["pid"] is None, "not running is no error"
    assert roost(env, "ls").returncode == 6


def test_a_port_in_use_is_told_as_such(root: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = roost(environment(root, taken.getsockname()[1]), "server", "start", "--json")
    assert done.returncode == 4
    problem = json.loads(done.stdout)["error"]
    assert problem["code"] == "host.port_in_use" and "ROOST_SERVER__PORT" in problem["next_step"]


def test_an_unusable_configuration_is_told_as_such(root: Path) -> None:
    env = environment(root, 1) | {"ROOST_POOL__STEP_BYTES": "many"}
    done = roost(env, "server", "start", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["code"] == "config.invalid"


def test_a_crash_while_starting_shows_the_log(root: Path) -> None:
    log = root / "log"
    log.write_text("earlier\nfirst\nlast words\n")
    died = background._died("node", -signal.SIGKILL, log, len("earlier\n"))
    assert died.code == "process.failed" and died.exit_code == 6
    assert "signal 9" in died.message and "last words" in died.message and "earlier" not in died.message
    log.write_text('{"error": {"code": "host.missing_feature", "detail": "no btrfs", "next_step": "load it"}}\nnoise\n')
    typed = background._died("node", 6, log, 0)
    assert (typed.code, typed.hint) == ("host.missing_feature", "load it")


# --- ensure -------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    with serve(root / "r") as running:
        for name, value in running.env().items():
            if name.startswith("ROOST_"):
                monkeypatch.setenv(name, value)
        monkeypatch.delenv("ROOST_SERVER_URL", raising=False)
        monkeypatch.setattr(background, "start", lambda parts: pytest.fail("nothing is to be started"))
        yield running


def test_ensure_leaves_alone_what_runs(served: Served) -> None:
    client = AsyncClient()
    assert client.address.is_default
    assert asyncio.run(background.ensure(client)) is client


def test_ensure_starts_a_missing_node(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    served.fake.node_connected = False
    monkeypatch.setattr(background, "start", started.append)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    asyncio.run(background.ensure(AsyncClient()))
    assert started == [("node", "server")]


def test_ensure_needs_root(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.fake.node_connected = False
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NeedsRoot):
        asyncio.run(background.ensure(AsyncClient()))


def test_ensure_starts_nothing_for_a_server_that_was_named(served: Served) -> None:
    served.fake.node_connected = False
    with pytest.raises(NodeUnreachable):
        asyncio.run(background.ensure(AsyncClient(parse_server_url(f"unix://{served.socket}"))))
    with pytest.raises(ServerUnreachable):
        asyncio.run(background.ensure(AsyncClient(parse_server_url("http://127.0.0.1:1"))))


def test_two_starts_at_once_take_turns(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOST_RUN_DIR", str(root / "run"))
    monkeypatch.setenv("ROOST_STATE_DIR", str(root / "state"))
    monkeypatch.setattr(background, "READY_S", 0.1)
    with background._starting(local_paths()):
        with pytest.raises(TimedOut):
            with background._starting(local_paths()):
                pytest.fail("the lock was not held")
    with background._starting(local_paths()):
        pass
