"""Every verb against a real HTTP server: output, JSON, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from roost import errors
from roost.errors import PoolFull, SeedFailed
from tests.unit.cli_server import Served, serve


@pytest.fixture
def served() -> Iterator[Served]:
    with tempfile.TemporaryDirectory(prefix="roost-t") as root, serve(Path(root)) as running:
        running.fake.add("web")
        yield running


def document(stdout: bytes) -> Any:
    """The one JSON document that stdout must be."""
    text = stdout.decode()
    value, end = json.JSONDecoder().raw_decode(text)
    assert text[end:] == "\n"
    return value


def wait_for(condition: Callable[[], Any], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


JSON_VERBS = [
    ("ls",),
    ("ls", "--all"),
    ("show", "web"),
    ("start", "web"),
    ("stop", "web"),
    ("restart", "web"),
    ("rm", "web"),
    ("undelete", "web"),
    ("up", "web"),
    ("up", "https://example.com/a/b.git"),
    ("image", "ls"),
    ("image", "pull", "debian:12"),
    ("config",),
    ("config", "server.port"),
    ("version",),
    ("server", "status"),
    ("node", "status"),
    ("server", "stop"),
    ("exec", "web", "--json", "--", "sh", "-c", "echo out; echo err >&2"),
]


@pytest.mark.parametrize("verb", JSON_VERBS, ids=" ".join)
def test_json_is_exactly_one_document(served: Served, verb: tuple[str, ...]) -> None:
    done = served.run(*verb, *(() if "--json" in verb else ("--json",)))
    assert done.returncode == 0, done.stderr
    assert isinstance(document(done.stdout), dict)


@pytest.mark.parametrize("verb", [("logs", "web"), ("events",), ("events", "web")], ids=" ".join)
def test_streams_are_json_lines(served: Served, verb: tuple[str, ...]) -> None:
    served.fake.event("web", **{"from": "starting", "to": "running"})
    done = served.run(*verb, "--json")
    assert done.returncode == 0
    lines = done.stdout.decode().splitlines()
    assert lines and all(isinstance(json.loads(line), dict) for line in lines)


@pytest.mark.parametrize(
    "verb",
    [("show",), ("start",), ("stop",), ("restart",), ("rm",), ("undelete",), ("logs",), ("events",)],
    ids=" ".join,
)
def test_what_is_not_there_is_3_with_the_problem_on_stdout(served: Served, verb: tuple[str, ...]) -> None:
    done = served.run(*verb, "nosuch", "--json")
    assert done.returncode == 3
    problem = document(done.stdout)["error"]
    assert (problem["code"], problem["exit_code"]) == ("workspace.not_found", 3)
    told = done.stderr.decode()
    assert "nosuch" in told and "roost ls" in told and told.count("\n") == 1


@pytest.mark.parametrize(
    "args",
    [
        ("nosuch",),
        ("ls", "--nosuch"),
        ("show",),
        ("up", "--memory", "much"),
        ("up", "--cpus", "-1"),
        ("up", "--name", "A_B"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(served: Served, args: tuple[str, ...]) -> None:
    done = served.run(*args)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr
    with_json = served.run(*args, "--json")
    assert with_json.returncode == 2
    assert document(with_json.stdout)["error"]["exit_code"] == 2


@pytest.mark.parametrize(
    "error", [SeedFailed("no"), PoolFull("full"), errors.ImageNotFound("x"), errors.RepoTimeout("t")]
)
def test_a_failed_start_has_its_error_and_exit_code(served: Served, error: errors.RoostError) -> None:
    served.fake.fail_start = error
    done = served.run("restart", "web", "--json")
    assert done.returncode == error.exit_code
    assert document(done.stdout)["error"]["code"] == error.code
    assert error.message in done.stderr.decode()


def test_no_server_is_6(tmp_path: Path, served: Served) -> None:
    done = served.run("ls", "--json", ROOST_RUN_DIR=str(tmp_path), ROOST_SERVER__PORT="1")
    assert done.returncode == 6
    assert document(done.stdout)["error"]["code"] == "server.unreachable"


def test_another_server_by_url_and_token(served: Served, tmp_path: Path) -> None:
    served.fake.token = "secret"
    url = f"http://127.0.0.1:{served.port}"
    refused = served.run("ls", ROOST_SERVER_URL=url, ROOST_RUN_DIR=str(tmp_path))
    assert refused.returncode == 5
    assert served.run("ls", ROOST_SERVER_URL=url, ROOST_TOKEN="secret").returncode == 0
    done = served.run("exec", "web", "--", "echo", "hello", ROOST_SERVER_URL=url, ROOST_TOKEN="wrong")
    assert done.returncode == 5, "a refused websocket has its typed error too"
    assert served.run("exec", "web", "--", "echo", "a", ROOST_SERVER_URL=url, ROOST_TOKEN="secret").stdout == b"a\n"


def test_a_bad_address_is_2(served: Served) -> None:
    assert served.run("ls", ROOST_SERVER_URL="ftp://example.com").returncode == 2


def test_something_else_at_the_address(served: Served) -> None:
    done = served.run("ls", ROOST_SERVER_URL=f"http://127.0.0.1:{served.port}/elsewhere")
    assert done.returncode == 3 and b"404" in done.stderr


def test_verbs_return_when_it_is_so(served: Served) -> None:
    served.fake.settle_s = 0.3
    for verb, state in (("stop", "stopped"), ("start", "running"), ("rm", "deleted"), ("undelete", "stopped")):
        assert served.run(verb, "web").returncode == 0
        assert served.fake.workspaces["web"]["observed"] == state


def test_rm_of_many_goes_on_after_a_failure(served: Served) -> None:
    served.fake.add("two")
    done = served.run("rm", "web", "nosuch", "two", "--json")
    assert done.returncode == 3
    told = document(done.stdout)
    assert [item["name"] for item in told["items"]] == ["web", "two"]
    assert told["error"]["code"] == "workspace.not_found"


def test_ls_in_a_pipe_is_not_cut(served: Served) -> None:
    url = "https://example.com/" + "x" * 120
    served.fake.add("other", repo={"url": url, "branch": None, "name": "x", "path": None})
    done = served.run("ls", COLUMNS="40")
    assert url in done.stdout.decode() and b"\x1b" not in done.stdout


def test_hostile_details_do_not_reach_the_terminal(served: Served) -> None:
    served.fake.add("evil", reason="\x1b]0;pwned\x07")
    assert b"\x1b" not in served.run("show", "evil").stdout


def test_a_closed_pipe_is_quiet(served: Served) -> None:
    for _ in range(3000):
        served.fake.event("web", detail="x" * 100)
    process = served.popen("events", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    told = process.stderr.read()
    process.stderr.close()
    assert process.wait(20) == 141
    assert told == b""


def test_debug_prints_the_trace(served: Served) -> None:
    assert b"Traceback" not in served.run("show", "nosuch").stderr
    assert b"Traceback" in served.run("--debug", "show", "nosuch").stderr


def test_events_follow_until_interrupted(served: Served) -> None:
    process = served.popen("events", "-f", "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    served.fake.event("web", detail="now")
    assert json.loads(process.stdout.readline())["detail"] == "now"
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    process.stdout.close()
    process.stderr.close()


def test_a_node_that_is_away_ends_the_wait(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from roost.client import AsyncClient, api, parse_server_url

    monkeypatch.setattr(api, "_POLL_S", 0.2)
    served.fake.never_settles, served.fake.node_connected = True, False

    async def wait() -> None:
        await AsyncClient(parse_server_url(f"unix://{served.socket}")).settled("web", 1, 10.0)

    served.fake.workspaces["web"]["settled"] = False
    import asyncio

    with pytest.raises(errors.NodeUnreachable):
        asyncio.run(wait())


# --- up -----------------------------------------------------------------------------------------------------------


def git(*args: str, cwd: Path) -> None:
    env = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", *identity, *args], cwd=cwd, env=env, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    path = tmp_path / "My.Project"
    path.mkdir()
    git("init", cwd=path)
    (path / "file").write_text("one")
    git("add", ".", cwd=path)
    git("commit", "-m", "one", cwd=path)
    (path / "file").write_text("changed")
    return path


def test_up_of_a_url_sends_what_was_asked(served: Served) -> None:
    limits = ("--cpus", "1.5", "--memory", "4G", "--disk", "512M", "--pids", "99")
    done = served.run("up", "https://example.com/a/b.git", "--image", "debian:12", "--branch", "dev", *limits)
    assert done.returncode == 0, done.stderr
    assert served.fake.workspaces["b"]["asked"] == {
        "name": "b",
        "image": "debian:12",
        "user": None,
        "repo": {"name": "b", "url": "https://example.com/a/b.git", "upload": None, "branch": "dev"},
        "limits": {"cpus": 1.5, "memory_bytes": 4 << 30, "disk_bytes": 512 << 20, "pids": 99},
    }
    told = done.stdout.decode()
    assert "image" in told and "1.23 s" in told and "roost exec b" in told
    assert "image" in done.stderr.decode(), "the steps as they come"


def test_up_of_a_directory_sends_a_bundle_once(served: Served, repository: Path) -> None:
    first = served.run("up", cwd=repository)
    assert first.returncode == 0, first.stderr
    asked = served.fake.workspaces["my-project"]["asked"]
    assert asked["repo"] == {"name": "My.Project", "url": None, "upload": "u0", "branch": None}
    assert served.fake.uploads["u0"].startswith(b"# v")
    again = served.run("up", str(repository))
    assert again.returncode == 0 and len(served.fake.uploads) == 1


def test_up_of_another_source_with_a_taken_name_is_4(served: Served, repository: Path) -> None:
    assert served.run("up", "https://example.com/a/my-project").returncode == 0
    done = served.run("up", str(repository), "--json")
    assert done.returncode == 4
    assert document(done.stdout)["error"]["code"] == "workspace.exists"
    assert b"--name" in done.stderr
    assert served.run("up", str(repository), "--name", "mine").returncode == 0
    assert served.run("up", "https://example.com/other/my-project").returncode == 4


def test_up_of_a_file_url_is_read_here_by_root_only(served: Served, repository: Path) -> None:
    done = served.run("up", f"file://{repository}", "--name", "f")
    assert done.returncode == 0, done.stderr
    repo = served.fake.workspaces["f"]["asked"]["repo"]
    assert repo["url"] == f"file://{repository}"
    assert bool(repo["upload"]) == (os.geteuid() == 0)
    elsewhere = served.run(
        "up", f"file://{repository}", "--name", "g", ROOST_SERVER_URL=f"http://127.0.0.1:{served.port}"
    )
    assert elsewhere.returncode == 0
    assert served.fake.workspaces["g"]["asked"]["repo"]["upload"] is None


@pytest.mark.parametrize("source", ["nosuch", "./nosuch", "/nosuch/at/all", "", "-x", "ext::sh -c true"])
def test_up_of_nonsense_is_2_and_starts_nothing(served: Served, source: str, tmp_path: Path) -> None:
    done = served.run("up", "--json", "--", source, cwd=tmp_path)
    assert done.returncode == 2
    assert document(done.stdout)["error"]["code"] == "repo.invalid"
    assert list(served.fake.workspaces) == ["web"]


def test_up_of_a_directory_that_is_no_repository(served: Served, tmp_path: Path) -> None:
    done = served.run("up", str(tmp_path), "--json")
    assert done.returncode == 2
    assert document(done.stdout)["error"]["code"] == "repo.invalid"


def test_ctrl_c_during_up_leaves_it_wanted(served: Served) -> None:
    served.fake.never_settles = True
    process = served.popen("up", "https://example.com/a/b", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: "b" in served.fake.workspaces)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out) == (130, b"")
    assert b"roost up b" in err and b"Traceback" not in err
    assert served.fake.workspaces["b"]["desired"] == "running"


def test_up_lends_the_ssh_agent(served: Served, tmp_path: Path) -> None:
    import socket
    import threading

    path = f"/tmp/roost-t-agent-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def agent() -> None:
            connection, _ = listener.accept()
            with connection:
                assert connection.recv(100) == b"\0\0\0\1\x0b"  # which keys are there?
                connection.sendall(b"\0\0\0\5\x0c\0\0\0\0")

        thread = threading.Thread(target=agent)
        thread.start()
        served.fake.ask_agent, served.fake.settle_s = b"\x0b", 1.0
        done = served.run("up", "git@example.com:a/b.git", SSH_AUTH_SOCK=path)
        thread.join(5)
    Path(path).unlink()
    assert done.returncode == 0, done.stderr
    assert served.fake.agent_answer == b"\x0c\0\0\0\0"
