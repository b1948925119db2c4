"""The main job as a user has it: up, work, stop, start, and everything is still there."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import select
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import Roost, wait_until

MARKS = (
    "cd; mkdir -p .vscode-server/extensions/x; echo e >.vscode-server/extensions/x/p; echo d >.dotfile; echo n >note"
)


def marks(roost: Roost, name: str) -> str:
    return roost.exec(name, "cd; cat .vscode-server/extensions/x/p .dotfile note")


@pytest.fixture(scope="module")
def work(roost: Roost, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A workspace from a local repository, with files in its HOME."""
    path = tmp_path_factory.mktemp("src") / "my-repo"
    path.mkdir()
    for args in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        (path / "README.md").write_text("hello\n")
        subprocess.run(["git", "-c", "user.name=T", "-c", "user.email=t@e.x", *args], cwd=path, check=True)
    roost.run("up", str(path), "--name", "work")
    roost.run("exec", "work", "--", "sh", "-c", MARKS)
    return "work"


def test_up_sends_the_repository_with_its_changes(roost: Roost, repository: Path) -> None:
    done = roost.json("up", str(repository))
    assert (done["name"], done["observed"]) == ("my-repo", "running")
    assert [step["step"] for step in done["last_start"]["steps"]] == [
        "image", "user", "volume", "seed", "container", "repository",
    ]  # fmt: skip
    inside = roost.exec("my-repo", "cd my-repo; cat README.md 'new file.txt'; ./run.sh; readlink link; stat -c %u .git")
    assert inside == "hello, changed\nnew\nrun\nREADME.md\n1000\n"
    again = roost.json("up", str(repository))
    assert (again["id"], again["start"]) == (done["id"], 1)
    roost.run("rm", "my-repo", "--yes")


def test_inside_it_is_the_users_home(roost: Roost, work: str) -> None:
    out = roost.exec(work, "id -u; id -g; pwd; echo $HOME $USER $WORKSPACE_DIR; . ~/.profile; echo $FROM_IMAGE; id -G")
    assert out == "1000\n1000\n/home/dev\n/home/dev dev /home/dev\n1\n1000 1001\n"
    assert roost.exec(work, "stat -c %a ~/.secret; cat ~/.config/tool/settings") == "600\nfrom the image\n"
    assert roost.exec(work, "cat /proc/1/cmdline | tr '\\0' ' '").startswith("/opt/roost/bin/tini ")
    assert roost.run("exec", "-u", "root", work, "--", "id", "-u").stdout == b"0\n"


def test_home_survives_stop_and_start(roost: Roost, work: str) -> None:
    assert roost.json("stop", work)["observed"] == "stopped"
    code, problem = roost.error("exec", work, "--", "true")
    assert (code, problem["code"]) == (4, "workspace.not_running")
    started = roost.json("start", work)
    assert started["observed"] == "running"
    steps = {step["step"]: step["status"] for step in started["last_start"]["steps"]}
    assert steps == {"image": "skipped", "user": "skipped", "volume": "done", "seed": "skipped", "container": "done",
                     "repository": "skipped"}  # fmt: skip
    assert marks(roost, work) == "e\nd\nn\n"


def test_home_survives_restart(roost: Roost, work: str) -> None:
    before = roost.show(work)
    after = roost.json("restart", work)
    assert after["start"] == before["start"] + 1
    assert marks(roost, work) == "e\nd\nn\n"


def test_a_crashed_container_comes_back_with_its_home(roost: Roost, work: str) -> None:
    start = roost.show(work)["start"]
    os.kill(roost.init_pid(work), 9)
    roost.wait_for(work, start=start + 1, observed="running")
    assert marks(roost, work) == "e\nd\nn\n"
    notes = [event["detail"] for event in map_json(roost.run("events", work, "--json").stdout)]
    assert any("ended by itself with exit code 137" in note for note in notes)


def map_json(output: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


@pytest.mark.parametrize("code", [0, 1, 7, 126, 255])
def test_exec_passes_the_exit_code_on(roost: Roost, work: str, code: int) -> None:
    assert roost.run("exec", work, "--", "sh", "-c", f"exit {code}", check=False).returncode == code


def test_exec_of_nothing_there(roost: Roost, work: str) -> None:
    done = roost.run("exec", work, "--", "no-such-command", check=False)
    assert done.returncode == 127
    assert b"no-such-command" in done.stderr


def test_exec_keeps_the_streams_apart_and_binary(roost: Roost, work: str) -> None:
    data = bytes(range(256)) * 1000
    done = roost.run("exec", work, "--", "sh", "-c", "cat; echo err >&2", input=data)
    assert (done.stdout, done.stderr) == (data, b"err\n")


def test_exec_ends_when_stdin_ends(roost: Roost, work: str) -> None:
    assert roost.run("exec", work, "--", "wc", "-c", input=b"x" * 100_000).stdout.strip() == b"100000"
    assert roost.run("exec", work, "--", "cat").stdout == b""


def test_exec_half_a_gigabyte_both_ways(roost: Roost, work: str) -> None:
    size, block = 500 << 20, os.urandom(1 << 20)
    sent, got, count = hashlib.blake2b(), hashlib.blake2b(), 0
    with roost.started("exec", work, "--", "cat", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        into = process.stdin

        def feed() -> None:
            for _ in range(size // len(block)):
                into.write(block)
                sent.update(block)
            into.close()

        feeder = threading.Thread(target=feed)
        feeder.start()
        while piece := process.stdout.read(1 << 20):
            got.update(piece)
            count += len(piece)
        feeder.join()
        assert process.wait(30) == 0
    assert (count, got.hexdigest()) == (size, sent.hexdigest())


def test_exec_passes_a_signal_on(roost: Roost, work: str) -> None:
    script = "trap 'echo got; exit 9' TERM; echo ready; while :; do sleep 0.1; done"
    with roost.started("exec", work, "--", "sh", "-c", script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
        assert process.stdout.read() == b"got\n"
        assert process.wait(10) == 9


def test_exec_on_a_terminal(roost: Roost, work: str) -> None:
    parent, child = pty.openpty()
    script = "stty size; read x; echo got:$x; exit 3"
    process = subprocess.Popen(
        roost.command("exec", "-t", work, "--", "sh", "-c", script),
        env={**roost.env, "TERM": "xterm"}, stdin=child, stdout=child, stderr=child, start_new_session=True,
    )  # fmt: skip
    os.close(child)
    os.write(parent, b"word\r")
    seen, deadline = b"", time.monotonic() + 30
    while time.monotonic() < deadline and select.select([parent], [], [], 30)[0]:
        try:
            seen += os.read(parent, 4096)
        except OSError:  # EIO: the other end is closed
            break
    os.close(parent)
    assert process.wait(10) == 3, seen
    assert b"got:word" in seen


def test_a_caller_who_leaves_ends_the_command(roost: Roost, work: str) -> None:
    with roost.started("exec", work, "--", "sh", "-c", "echo ready; exec sleep 12345") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.kill()
    wait_until(lambda: "sleep 12345" not in roost.exec(work, "ps"), "the command ended")


def test_cp_both_ways(roost: Roost, work: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "data.bin").write_bytes(os.urandom(3 << 20))
    (tree / "script").write_text("#!/bin/sh\n")
    (tree / "script").chmod(0o755)
    roost.run("cp", str(tree), f"{work}:copied")
    assert roost.exec(work, "stat -c '%u %a' copied/script") == "1000 755\n"
    back = tmp_path / "back"
    roost.run("cp", f"{work}:copied", str(back))
    assert (back / "sub" / "data.bin").read_bytes() == (tree / "sub" / "data.bin").read_bytes()
    roost.run("cp", f"{work}:/home/dev/copied/script", str(tmp_path / "one"))
    assert (tmp_path / "one").read_text() == "#!/bin/sh\n"


def test_logs_have_the_start(roost: Roost, work: str) -> None:
    assert b"container: done" in roost.run("logs", work).stdout
    assert roost.run("logs", work, "--previous").returncode == 0


def test_limits_hold(roost: Roost, repository: Path) -> None:
    roost.run(
        "up", str(repository), "--name", "limited", "--pids", "40", "--disk", "32M", "--memory", "256M", "--cpus", "1"
    )
    full = roost.run("exec", "limited", "--", "sh", "-c", "dd if=/dev/zero of=big bs=1M count=64", check=False)
    assert full.returncode != 0
    assert b"quota" in full.stderr.lower() or b"space" in full.stderr.lower()
    roost.exec("limited", "rm -f big; sync")
    many = roost.run("exec", "limited", "--", "sh", "-c", "for i in $(busybox seq 60); do sleep 5 & done", check=False)
    assert b"fork" in many.stderr.lower()
    roost.run("rm", "limited", "--yes")


def test_rm_and_undelete(roost: Roost, repository: Path) -> None:
    roost.run("up", str(repository), "--name", "gone")
    roost.exec("gone", "echo precious > ~/file")
    roost.run("rm", "gone", "--yes")
    assert roost.error("exec", "gone", "--", "true")[0] == 3
    assert "gone" not in {item["name"] for item in roost.json("ls")["items"]}
    assert roost.json("undelete", "gone")["observed"] == "stopped"
    roost.run("start", "gone")
    assert roost.exec("gone", "cat ~/file") == "precious\n"
    roost.run("rm", "gone", "--yes")


def test_workspaces_cannot_reach_each_other_or_the_host(roost: Roost, work: str, repository: Path) -> None:
    roost.run("up", str(repository), "--name", "other")
    roost.exec("other", "(nc -l -p 5555 >/dev/null 2>&1 &) ; true")
    address = re.findall(r"inet ([0-9.]+)", roost.exec("other", "ip -4 addr show eth0"))[0]
    assert roost.run("exec", "other", "--", "nc", "-w", "2", address, "5555", check=False).returncode == 0
    roost.exec("other", "(nc -l -p 5555 >/dev/null 2>&1 &) ; true")
    assert roost.run("exec", work, "--", "nc", "-w", "2", address, "5555", check=False).returncode != 0
    gateway = roost.exec(work, "ip route | sed -n 's/default via \\([0-9.]*\\).*/\\1/p' 2>/dev/null || true").strip()
    if gateway:
        port = str(roost.port)
        assert roost.run("exec", work, "--", "nc", "-w", "2", gateway, port, check=False).returncode != 0
    roost.run("rm", "other", "--yes")
