"""Bad input and a hostile host: each a typed error with its exit code, and nothing half-made left behind."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.e2e.harness import Roost, free_port, wait_until


@contextmanager
def http_answer(status: int, **headers: str) -> Iterator[int]:
    """An HTTP server that answers everything with one status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_POST = do_GET

        def log_message(self, *_: object) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def up(roost: Roost, source: Path | str, *more: str) -> tuple[int, str]:
    code, problem = roost.error("up", str(source), *more)
    return code, problem["code"]


def test_an_image_that_is_not_there(roost: Roost, repository: Path) -> None:
    image = f"127.0.0.1:{roost.registry_port}/none:1"
    assert up(roost, repository, "--name", "a", "--image", image) == (3, "image.not_found")
    shown = roost.show("a")
    assert (shown["observed"], shown["error"]["code"]) == ("error", "image.not_found")
    assert up(roost, repository, "--name", "a") == (3, "image.not_found")
    roost.run("rm", "a", "--yes")


def test_a_registry_that_is_dead(roost: Roost, repository: Path) -> None:
    image = f"127.0.0.1:{free_port()}/none:1"
    assert up(roost, repository, "--name", "a", "--image", image) == (6, "registry.unreachable")
    roost.run("rm", "a", "--yes")


def test_a_registry_that_refuses(roost: Roost, repository: Path) -> None:
    with http_answer(401, WWW_Authenticate='Basic realm="x"') as port:
        assert up(roost, repository, "--name", "a", "--image", f"127.0.0.1:{port}/x:1") == (5, "image.auth")
    roost.run("rm", "a", "--yes")


def test_an_image_reference_that_is_none(roost: Roost, repository: Path) -> None:
    assert up(roost, repository, "--name", "a", "--image", "UPPER/Case:!!") == (2, "image.invalid_reference")
    assert "a" not in {item["name"] for item in roost.json("ls")["items"]}


def test_a_repository_that_needs_credentials(fresh: Roost, tmp_path: Path) -> None:
    from tests.e2e.conftest import start_with_image

    fresh.env["ROOST_REPOS__ALLOW_PROTOCOLS"] = '["https","ssh","http"]'
    start_with_image(fresh, tmp_path)
    with http_answer(401, WWW_Authenticate='Basic realm="x"') as port:
        assert up(fresh, f"http://127.0.0.1:{port}/private.git", "--name", "a") == (5, "repo.auth")
    with http_answer(404) as port:
        assert up(fresh, f"http://127.0.0.1:{port}/none.git", "--name", "b") == (3, "repo.not_found")
    assert up(fresh, f"http://127.0.0.1:{free_port()}/x.git", "--name", "c") == (6, "repo.unreachable")


def test_a_protocol_that_is_not_allowed(roost: Roost) -> None:
    assert up(roost, "http://127.0.0.1:1/x.git", "--name", "a") == (5, "repo.protocol")


def test_a_source_that_is_none(roost: Roost, tmp_path: Path) -> None:
    assert up(roost, tmp_path, "--name", "a") == (2, "repo.invalid")
    assert up(roost, "--upload-pack=touch /tmp/x", "--name", "a")[0] == 2


def test_a_name_that_is_taken(roost: Roost, repository: Path, tmp_path: Path) -> None:
    roost.run("up", str(repository), "--name", "mine")
    other = tmp_path / "other"
    subprocess.run(["git", "init", "-q", str(other)], check=True)
    subprocess.run(
        [
            "git",
            "-C",
            str(other),
            "-c",
            "user.name=T",
            "-c",
            "user.email=t@e.x",
            "commit",
            "-q",
            "--allow-empty",
            "-m",
            "x",
        ],
        check=True,
    )
    assert up(roost, other, "--name", "mine") == (4, "workspace.exists")
    roost.run("rm", "mine", "--yes")


@pytest.mark.parametrize("name", ["Bad", "a--b", "-x", "ls", "x" * 41])
def test_a_name_that_is_none(roost: Roost, repository: Path, name: str) -> None:
    code, _ = up(roost, repository, f"--name={name}")
    assert code == 2


def test_a_workspace_that_is_not_there(roost: Roost) -> None:
    for verb in (["show", "none"], ["start", "none"], ["stop", "none"], ["rm", "none", "--yes"], ["undelete", "none"]):
        code, problem = roost.error(*verb)
        assert (code, problem["code"]) == (3, "workspace.not_found"), verb
    assert roost.run("exec", "none", "--", "true", check=False).returncode == 3


def test_a_user_that_the_image_lacks(roost: Roost, repository: Path) -> None:
    assert up(roost, repository, "--name", "a", "--user", "nobody-knows") == (2, "user.unknown")
    roost.run("rm", "a", "--yes")


def test_without_root_and_without_a_server(fresh: Roost) -> None:
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *fresh.command("node", "start")],
        env=fresh.env, capture_output=True, cwd="/", check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 5, done.stderr
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *fresh.command("ls")],
        env=fresh.env, capture_output=True, cwd="/", check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 6, done.stderr


def test_another_user_has_no_rights(roost: Roost) -> None:
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *roost.command("ls")],
        env=roost.env, capture_output=True, cwd="/", check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 5, done.stderr
    token = (roost.state / "server" / "admin-token").read_text().strip()
    assert (roost.state / "server" / "admin-token").stat().st_mode & 0o777 == 0o600
    for given, code in ((token, 0), ("wrong", 5)):
        done = subprocess.run(
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *roost.command("ls")],
            env={**roost.env, "ROOST_SERVER_URL": f"http://127.0.0.1:{roost.port}", "ROOST_TOKEN": given},
            capture_output=True, cwd="/", check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == code, done.stderr


def test_a_port_that_is_taken(fresh: Roost) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", fresh.port))
        other.listen()
        done = fresh.run("server", check=False)
        assert done.returncode == 4, done.stderr
        assert str(fresh.port).encode() in done.stderr


def test_settings_that_are_wrong(fresh: Roost) -> None:
    fresh.env["ROOST_SERVER__PORT"] = "many"
    done = fresh.run("node", check=False)
    assert done.returncode == 2
    assert b"server.port" in done.stderr


def test_a_pool_that_is_full(fresh: Roost, repository: Path, tmp_path: Path) -> None:
    from tests.e2e.conftest import start_with_image

    fresh.env |= {"ROOST_POOL__MAX_BYTES": str(512 << 20), "ROOST_POOL__QUOTAS": "false"}
    start_with_image(fresh, tmp_path)
    fresh.run("up", str(repository), "--name", "big", "--disk", "0")
    fill = fresh.run(
        "exec", "big", "--", "sh", "-c", "echo kept > ~/kept; sync; dd if=/dev/zero of=fill bs=1M", check=False
    )
    assert b"No space left" in fill.stderr
    assert up(fresh, repository, "--name", "second") == (5, "pool.full")
    assert fresh.exec("big", "cat ~/kept") == "kept\n"
    fresh.exec("big", "rm fill; sync")
    # btrfs gives freed space back with its next transactions; until then the answer is the same typed error.
    answers: list[int] = []

    def recovered() -> bool:
        answers.append(fresh.run("up", "second", check=False).returncode)
        return answers[-1] == 0

    wait_until(recovered, "room again", 90)
    assert set(answers) <= {0, 5}, answers
    assert fresh.exec("second", "cat ~/my-repo/README.md") == "hello, changed\n"


def test_a_host_disk_that_is_full(fresh: Roost, repository: Path, tmp_path: Path) -> None:
    from tests.e2e.conftest import start_with_image

    # A disk of its own for the state, and a pool that already has what the three writers will take.
    fresh.state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1400m,mode=0755", "roost-test", str(fresh.state)], check=True)
    fresh.env |= {"ROOST_POOL__RESERVE_BYTES": str(64 << 20), "ROOST_POOL__INITIAL_BYTES": str(700 << 20)}
    start_with_image(fresh, tmp_path)
    fresh.run("up", str(repository), "--name", "work")
    fresh.exec("work", "echo kept > ~/kept; sync")
    filler = fresh.state / "filler"
    with pytest.raises(OSError, match="No space left"), filler.open("wb") as file:
        while True:
            file.write(b"x" * (1 << 20))
    assert fresh.exec("work", "echo more > ~/more; sync; cat ~/kept ~/more") == "kept\nmore\n"
    assert up(fresh, repository, "--name", "second") == (5, "host.disk_full")
    assert fresh.error("restart", "work")[0] == 5
    filler.unlink()
    fresh.run("restart", "work")
    assert fresh.exec("work", "cat ~/kept ~/more") == "kept\nmore\n"
    fresh.run("up", str(repository), "--name", "second")
    assert fresh.exec("second", "cat ~/my-repo/README.md") == "hello, changed\n"


def test_a_kernel_without_btrfs(fresh: Roost, tmp_path: Path) -> None:
    # In a mount namespace of its own the node sees a kernel that knows every file system but this one.
    known = tmp_path / "filesystems"
    lines = Path("/proc/filesystems").read_text().splitlines(keepends=True)
    known.write_text("".join(line for line in lines if "btrfs" not in line))
    script = f'mount --bind {known} /proc/filesystems && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", *fresh.command("node", "--json")],
        env=fresh.env, capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 6, done.stderr
    assert json.loads(done.stdout)["error"]["code"] == "host.missing_feature"
    assert b"btrfs" in done.stderr
    assert not (fresh.state / "node" / "pool.img").exists()
    assert fresh.pid_of("containerd") is None


def test_a_program_that_is_missing(fresh: Roost) -> None:
    empty = fresh.state.with_name(fresh.state.name + "-bin")
    empty.mkdir()
    try:
        for program in ("/usr/bin/env", "/usr/bin/git"):
            (empty / Path(program).name).symlink_to(program)
        done = fresh.run("node", check=False, env={"PATH": str(empty)})
        assert done.returncode == 6, done.stderr
        assert b"make setup" in done.stderr or b"install" in done.stderr
    finally:
        for path in empty.iterdir():
            path.unlink()
        empty.rmdir()


def test_two_nodes_for_one_state(roost: Roost) -> None:
    done = roost.run("node", check=False)
    assert done.returncode == 4, done.stderr
    assert roost.pid_of("node") is not None
