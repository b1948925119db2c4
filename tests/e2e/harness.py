"""A roost of its own for a test: own state, run directory, ports, names; everything ended and removed afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from roost.linux.process import ProcessId, read_pidfile

ROOST = Path(sys.executable).with_name("roost")
CLEAN = Path(__file__).parents[2] / "scripts" / "clean"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(true: Callable[[], object], what: str, timeout_s: float = 30.0) -> None:
    """Poll until something holds; fails with its name when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.05)


class Roost:
    """One installation under test, driven through its command line as a user would."""

    def __init__(self, **settings: str) -> None:
        self.ident = f"t{secrets.token_hex(3)}"
        self.state = Path(f"/var/tmp/roost-{self.ident}")
        self.run_dir = Path(f"/run/roost-{self.ident}")
        self.port, self.registry_port = free_port(), free_port()
        second = 100 + secrets.randbelow(100)
        self.env = {
            **{key: value for key, value in os.environ.items() if not key.startswith("ROOST_")},
            "ROOST_STATE_DIR": str(self.state),
            "ROOST_RUN_DIR": str(self.run_dir),
            "ROOST_CONFIG": "/dev/null",
            "ROOST_NODE__INSTANCE": f"roost-{self.ident}",
            "ROOST_SERVER__PORT": str(self.port),
            "ROOST_REGISTRY__PORT": str(self.registry_port),
            "ROOST_NETWORK__SUBNET": f"10.{second}.0.0/16",
            "ROOST_POOL__INITIAL_BYTES": str(512 << 20),
            "ROOST_POOL__STEP_BYTES": str(256 << 20),
            "ROOST_WORKSPACES__DEFAULT_IMAGE": f"127.0.0.1:{self.registry_port}/tiny:1",
            "ROOST_WORKSPACES__STOP_GRACE_S": "3",
            **settings,
        }

    # the command line

    def command(self, *args: str) -> list[str]:
        return [str(ROOST), *args]

    def run(
        self, *args: str, check: bool = True, timeout_s: float = 120.0, env: dict[str, str] | None = None, **more: Any
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a verb to its end."""
        more.setdefault("stdin", subprocess.DEVNULL) if "input" not in more else None
        done = subprocess.run(
            self.command(*args),
            env={**self.env, **(env or {})},
            capture_output=True,
            timeout=timeout_s,
            check=False,
            **more,
        )
        if check and done.returncode != 0:
            raise AssertionError(
                f"roost {' '.join(args)} ended with {done.returncode}\n{done.stdout.decode()}\n{done.stderr.decode()}\n"
                f"{self.tails()}"
            )
        return done

    def json(self, *args: str, **more: Any) -> Any:
        """Run a verb with --json; what it printed must be one document."""
        return json.loads(self.run(*args, "--json", **more).stdout)

    def exec(self, name: str, script: str, **more: Any) -> str:
        """Run a shell line inside; its output."""
        return self.run("exec", name, "--", "sh", "-c", script, **more).stdout.decode()

    def error(self, *args: str, **more: Any) -> tuple[int, dict[str, Any]]:
        """Run a verb that must fail: its exit code and the problem it printed."""
        done = self.run(args[0], "--json", *args[1:], check=False, **more)
        assert done.returncode != 0, f"roost {' '.join(args)} succeeded: {done.stdout.decode()}"
        return done.returncode, json.loads(done.stdout)["error"]

    @contextlib.contextmanager
    def started(self, *args: str, stdin: int = subprocess.DEVNULL) -> Iterator[subprocess.Popen[bytes]]:
        """A verb while it runs, its output in a pipe; ended at the end."""
        with subprocess.Popen(self.command(*args), env=self.env, stdin=stdin, stdout=subprocess.PIPE) as process:
            try:
                yield process
            finally:
                process.kill()

    # the processes

    def pid_of(self, part: str) -> ProcessId | None:
        """The process of `node`, `server`, `containerd` or `registry`, if it lives."""
        path = {
            "node": self.run_dir / "node" / "node.pid",
            "server": self.run_dir / "server" / "server.pid",
            "containerd": self.run_dir / "node" / "containerd.pid",
            "registry": self.run_dir / "node" / "registry.pid",
        }[part]
        entry = read_pidfile(path)
        return entry.process if entry is not None and entry.process.alive() else None

    def kill(self, part: str) -> None:
        """kill -9, and wait until it is gone."""
        process = self.pid_of(part)
        if process is not None:
            process.signal(signal.SIGKILL)
            assert process.wait_gone(10.0), f"{part} does not die"

    def shims(self) -> list[int]:
        socket_path = str(self.run_dir / "node" / "containerd.sock")
        return [pid for pid, line in _commands() if "containerd-shim" in line[0] and socket_path in line]

    def kill_everything(self) -> None:
        """kill -9 of server, node, containerd, registry, shims and all that runs in the containers."""
        for part in ("server", "node", "containerd", "registry"):
            self.kill(part)
        for pid in self.shims():
            children = _children(pid)
            for victim in (pid, *children):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
        wait_until(lambda: not self.shims(), "shims gone")

    def init_pid(self, name: str) -> int:
        """PID of a workspace's PID 1 as the host sees it."""
        marker = f"ROOST_WORKSPACE={name}".encode()
        for pid, line in _commands():
            if line[0].endswith("/bin/tini") and marker in _environment(pid):
                return pid
        raise AssertionError(f"{name} has no PID 1")

    def show(self, name: str) -> Any:
        return self.json("show", name)

    def wait_for(self, name: str, timeout_s: float = 60.0, **wanted: object) -> Any:
        """Wait until `show` has these values."""
        seen: dict[str, Any] = {}

        def there() -> bool:
            seen.update(self.show(name))
            return all(seen[key] == value for key, value in wanted.items())

        try:
            wait_until(there, f"{name} has {wanted}", timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; last seen {seen}\n{self.tails()}") from None
        return seen

    def tails(self) -> str:
        """The ends of the logs, for a failed test's message."""
        words = []
        for path in sorted(self.state.glob("logs/*.log")):
            words.append(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}")
        return "\n".join(words)

    def remove(self) -> None:
        """End and remove all of it."""
        command = [str(CLEAN), "--only", f"roost-{self.ident}"]
        done = subprocess.run(command, env=self.env, check=False, timeout=120, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        assert not self.state.exists()
        assert not self.run_dir.exists()


def _commands() -> Iterator[tuple[int, list[str]]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                line = (folder / "cmdline").read_bytes().split(b"\0")
                if line[0]:
                    yield int(folder.name), [part.decode(errors="replace") for part in line]


def _environment(pid: int) -> list[bytes]:
    with contextlib.suppress(OSError):
        return (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0")
    return []


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in (Path("/proc") / str(pid) / "task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *_children(int(child))]
    return found


def tiny_image(folder: Path) -> Path:
    """A root file system with a shell from busybox and the user `dev` whose HOME holds a few files."""
    root = folder / "root"
    for name in ("bin", "etc", "home/dev/.config/tool", "root", "tmp", "proc", "sys", "dev"):
        (root / name).mkdir(parents=True, exist_ok=True)
    shutil.copy("/bin/busybox", root / "bin" / "busybox")
    for applet in ("sh", "cat", "ls", "sleep", "id", "env", "sha256sum", "dd", "head", "wc", "touch", "mkdir", "pwd",
                   "echo", "test", "stat", "true", "false", "kill", "ps", "tr", "rm", "sync", "tty", "stty", "readlink",
                   "find", "sort", "yes", "mount", "hostname", "nc", "nslookup", "ip"):  # fmt: skip
        link = root / "bin" / applet
        if not link.is_symlink():
            link.symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\ndev:x:1000:1000::/home/dev:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\ndev:x:1000:\nextra:x:1001:dev\n")
    (root / "home/dev/.profile").write_text("export FROM_IMAGE=1\n")
    (root / "home/dev/.config/tool/settings").write_text("from the image\n")
    key = root / "home/dev/.secret"
    key.write_text("key\n")
    key.chmod(0o600)
    for path in [root / "home/dev", *(root / "home/dev").rglob("*")]:
        os.chown(path, 1000, 1000, follow_symlinks=False)
    (root / "tmp").chmod(0o1777)
    return root
