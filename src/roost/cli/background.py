"""Server and node as background processes of this host: start what is missing, wait until they serve, stop them.

Each process writes its own pid file and holds its own lock, whoever started it; so nothing here is the truth about what
runs, and two starts at once end with one process and one AlreadyRunning.  A flock around "look, start, wait" keeps two
`roost up` from getting that far.  A started process is a session of its own with a log file for its output: the
terminal and we may go.  It is started with --json, so the end of its log holds the typed error it died of.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from roost.client import AsyncClient, local_paths
from roost.client.address import LocalPaths
from roost.errors import (
    NeedsRoot,
    NodeUnreachable,
    ProcessFailed,
    RoostError,
    ServerTimeout,
    ServerUnreachable,
    from_problem,
)
from roost.linux.process import ProcessId, read_pidfile

Part = Literal["server", "node"]
PARTS: tuple[Part, ...] = ("node", "server")

READY_S = 60.0
STOP_S = 60.0
STOP_ALL_S = 180.0
"""With `--all`: every container gets its grace first."""
LOG_ROTATE_BYTES = 10 << 20
_TAIL_LINES = 8
_TAIL_BYTES = 16 << 10
_KEPT = (
    *("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "PYTHONPATH", "LOG_LEVEL"),
    *("GIT_COMMAND_TIMEOUT", "GIT_ALLOW_PROTOCOL", "SSL_CERT_FILE", "SSL_CERT_DIR", "DOCKER_CONFIG"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "no_proxy", "all_proxy"),
)
_NOT_PASSED = frozenset(
    {"ROOST_TOKEN", "ROOST_SERVER_URL", "ROOST_CRASH_AT", "ROOST_NODE_CRASH_AT", "ROOST_SERVER_CRASH_AT"}
)


def environment(part: Part, environ: Mapping[str, str]) -> dict[str, str]:
    """What a background process gets of our environment.

    The settings go along; a client's address and token do not, nor a crash point (those of tests are named per part).
    """
    env = {name: environ[name] for name in _KEPT if name in environ}
    env |= {name: value for name, value in environ.items() if name.startswith("ROOST_") and name not in _NOT_PASSED}
    if crash := environ.get(f"ROOST_{part.upper()}_CRASH_AT"):
        env["ROOST_CRASH_AT"] = crash
    return env


def running(part: Part, paths: LocalPaths) -> ProcessId | None:
    """The process of that part, if it runs; its pid file is not believed blindly: the server's user may write it."""
    entry = read_pidfile(paths.pidfile(part))
    if entry is None or not entry.process.alive():
        return None
    words = entry.process.cmdline()
    return entry.process if part in words and any("roost" in word for word in words) else None


async def ensure(client: AsyncClient, say: str = "") -> AsyncClient:
    """A client whose server answers and has a node; on this host root starts what is missing.

    Raises ServerUnreachable, NodeUnreachable, NeedsRoot, and what a process that was started died of.
    """
    health = None
    try:
        health = await client.health()
    except ServerUnreachable:
        if not client.address.is_default:
            raise
    if health is not None and health.node_connected:
        return client
    if not client.address.is_default:
        raise NodeUnreachable(f"the server at {client.address} has no node")
    if os.geteuid() != 0:
        what = "no server runs on this host" if health is None else "no node runs on this host"
        raise NeedsRoot(f"{what}, and starting one needs root")
    await asyncio.to_thread(start, PARTS)
    return AsyncClient()


def start(parts: tuple[Part, ...]) -> dict[Part, int]:
    """Start those that do not run and wait until they are ready; the pids of all. Blocks.

    Raises ProcessFailed or what a process died of, ServerTimeout, NeedsRoot.
    """
    paths = local_paths()
    with _starting(paths):
        logs = {part: paths.logs / f"{part}.log" for part in parts}
        started: dict[Part, tuple[subprocess.Popen[bytes], int]] = {}
        for part in parts:
            if running(part, paths) is None:
                started[part] = _spawn(part, logs[part])
        deadline = time.monotonic() + READY_S
        while True:
            for part, (child, offset) in started.items():
                if child.poll() is not None and running(part, paths) is None:
                    raise _died(part, child.returncode, logs[part], offset)
            if _ready(parts, paths):
                return {part: process.pid for part in parts if (process := running(part, paths)) is not None}
            if time.monotonic() > deadline:
                raise _late(parts, paths, logs, {part: offset for part, (_, offset) in started.items()})
            time.sleep(0.05)


def _ready(parts: tuple[Part, ...], paths: LocalPaths) -> bool:
    try:
        health = asyncio.run(AsyncClient().health(timeout_s=2.0))
    except RoostError:
        # A node alone has nobody to be connected to; that it runs is all that can be said of it.
        return "server" not in parts and running("server", paths) is None and running("node", paths) is not None
    return health.node_connected or "node" not in parts


@contextmanager
def _starting(paths: LocalPaths) -> Iterator[None]:
    """One start at a time on this host; the lock ends with us, however we end."""
    try:
        for directory in (paths.run_dir, paths.state_dir):
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        paths.logs.mkdir(mode=0o750, exist_ok=True)
        descriptor = os.open(paths.run_dir / "start.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except PermissionError as error:
        raise NeedsRoot(f"{error.filename}: {error.strerror}") from error
    try:
        deadline = time.monotonic() + 2 * READY_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ServerTimeout("another command starts roost here and does not come to an end") from None
                time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def _spawn(part: Part, log: Path) -> tuple[subprocess.Popen[bytes], int]:
    if log.exists() and log.stat().st_size > LOG_ROTATE_BYTES:
        log.replace(log.with_name(log.name + ".1"))
    with log.open("ab") as out:
        offset = out.tell()
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "roost.cli.main", part, "--json"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd="/",
            env=environment(part, os.environ),
            start_new_session=True,
        )
    return child, offset


def _died(part: Part, code: int, log: Path, offset: int) -> RoostError:
    lines = _tail(log, offset)
    for line in reversed(lines):
        try:
            document = json.loads(line)
        except ValueError:
            continue
        if isinstance(document, dict) and isinstance(document.get("error"), dict) and "code" in document["error"]:
            error = from_problem(document["error"])
            error.message = f"the {part} did not start: {error.message}"
            return error
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    words = "".join(f"\n  {line}" for line in lines[-_TAIL_LINES:])
    return ProcessFailed(f"the {part} {how} while it started{words}", next_step=f"Its log is {log}.")


def _late(parts: tuple[Part, ...], paths: LocalPaths, logs: dict[Part, Path], offsets: dict[Part, int]) -> RoostError:
    words = ""
    for part in parts:
        state = "runs" if running(part, paths) else "does not run"
        words += f"\n{part} {state}; the end of {logs[part]}:"
        words += "".join(f"\n  {line}" for line in _tail(logs[part], offsets.get(part, 0))[-_TAIL_LINES:])
    return ProcessFailed(
        f"{' and '.join(parts)} are not ready after {READY_S:g} s{words}",
        next_step="`roost doctor` says what is missing.",
    )


def _tail(log: Path, offset: int) -> list[str]:
    try:
        with log.open("rb") as file:
            file.seek(max(offset, log.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def stop(part: Part, *, everything: bool = False) -> int | None:
    """End that part and wait until it is gone; its pid, None when it did not run. Blocks.

    `everything` (node): the containers, the network policy and the pool too. Raises NeedsRoot, ProcessFailed.
    """
    paths = local_paths()
    process = running(part, paths)
    if process is None:
        return None
    try:
        process.signal(signal.SIGUSR2 if everything else signal.SIGTERM)
    except PermissionError as error:
        raise NeedsRoot(f"the {part} (pid {process.pid}) belongs to another user") from error
    limit = STOP_ALL_S if everything else STOP_S
    if not process.wait_gone(limit):
        raise ProcessFailed(
            f"the {part} (pid {process.pid}) did not end within {limit:g} s",
            next_step=f"Its log is {paths.logs / (part + '.log')}; `kill -9 {process.pid}` ends it at once.",
        )
    return process.pid
