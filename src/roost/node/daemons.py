"""Daemons that outlive us.

The node starts containerd, the registry and others, dies, comes back, and must find each again: running exactly once,
neither twice nor lost.  What holds that:

- A daemon is a session of its own with no terminal, no pipe to us (log file, /dev/null), cwd `/`: our death is nothing
  to it.
- Its pid file names it by (pid, start time, boot): a reused pid or a reboot is seen.
- Between its start and the writing of the pid file we may be killed.  So its *environment* carries the pid file's path
  and the fingerprint of its configuration, and `find` falls back to a scan of /proc for a process with that
  environment.  Its own children (containerd's shims) inherit the environment, so the command line must be the same too;
  and a child that has forked and not yet called exec has both, so it must lead its session.
- Who is found with another fingerprint (an upgrade, a changed setting) is stopped and started anew.

Zombies: a daemon is the child of the process that started it, whichever object there knows it now; whoever notices an
end calls `_reap`.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import structlog

from roost import faults
from roost.errors import MissingProgram, ProcessFailed, RoostError
from roost.linux.process import PidFile, ProcessId, all_processes, read_pidfile, write_pidfile

log = structlog.get_logger()

LOG_ROTATE_BYTES = 10 << 20
_MARK = "ROOST_DAEMON"
_MARK_FINGERPRINT = "ROOST_DAEMON_FINGERPRINT"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What a daemon may need of our environment: the way out to registries. Everything else, ROOST_… first, stays here.
_KEPT = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR", "TZ")
_NOFILE = 1 << 20

# Those this process started and has not seen end; a fact of the process, so it is global.
_children: list[subprocess.Popen[bytes]] = []

Ready = Callable[[], Awaitable[bool]]


@dataclass(frozen=True)
class DaemonSpec:
    """What to run and where it leaves its traces."""

    name: str
    argv: tuple[str, ...]
    """The first an absolute path."""
    pidfile: Path
    logfile: Path
    fingerprint: str = ""
    """Of everything that is configuration; a running daemon with another one is replaced."""
    env: Mapping[str, str] = field(default_factory=dict)


def daemon_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment a daemon starts with: PATH, HOME, proxies and certificates, and what its spec adds."""
    env = {"PATH": _PATH, "HOME": "/root", "LANG": "C.UTF-8"}
    for name in _KEPT:
        for variant in (name, name.lower()):
            if variant in os.environ:
                env[variant] = os.environ[variant]
    return {**env, **extra}


class Daemon:
    """One daemon of ours; every method may be called again at any time, one at a time."""

    def __init__(self, spec: DaemonSpec) -> None:
        self.spec = spec
        self.process: ProcessId | None = None
        self.adopted = False

    # finding

    def find(self) -> PidFile | None:
        """The running process of this spec's pid file, or one that was started and never written down. Blocks."""
        entry = read_pidfile(self.spec.pidfile)
        if entry is not None and entry.process.alive():
            return entry
        for process in all_processes():
            env = process.environ()
            if env.get(_MARK) == str(self.spec.pidfile) and process.cmdline() == self.spec.argv and _leads(process):
                return PidFile(process, env.get(_MARK_FINGERPRINT, ""))
        return None

    # life

    async def start(self, ready: Ready, timeout_s: float) -> bool:
        """Adopt the running daemon or start one; return when `ready` says so: True if it was adopted.

        `ready` is asked over and over; False or a RoostError means not yet. Raises ProcessFailed, with the end of its
        log, when the daemon dies or the time runs out; a daemon that we started is stopped then. MissingProgram.
        """
        found = await asyncio.to_thread(self.find)
        if found is not None and found.fingerprint != self.spec.fingerprint:
            log.info("daemon.replaced", daemon=self.spec.name, pid=found.process.pid, why="its configuration changed")
            await self._end(found.process, 10.0)
            found = None
        if found is not None:
            self.process, self.adopted = found.process, True
            await asyncio.to_thread(self._write, found)
        else:
            self.adopted = False
            self.process = await asyncio.to_thread(self._spawn)
        log.info("daemon.adopted" if self.adopted else "daemon.started", daemon=self.spec.name, pid=self.process.pid)
        try:
            await self._until_ready(ready, timeout_s)
        except BaseException:
            if not self.adopted:
                with suppress(ProcessFailed):
                    await self.stop(2.0)
            raise
        return self.adopted

    async def _until_ready(self, ready: Ready, timeout_s: float) -> None:
        assert self.process is not None
        deadline = time.monotonic() + timeout_s
        pause, last = 0.005, ""
        while True:
            try:
                if await asyncio.wait_for(ready(), max(0.1, deadline - time.monotonic())):
                    return
            except (RoostError, TimeoutError) as error:
                last = f": {error}"
            if not self.process.alive():
                _reap()
                raise self._failed(f"{self.spec.name} ended while it started")
            if time.monotonic() > deadline:
                raise self._failed(f"{self.spec.name} is not ready after {timeout_s:g} s{last}")
            await asyncio.sleep(pause)
            pause = min(0.05, pause * 1.5)

    async def stop(self, grace_s: float = 10.0) -> None:
        """SIGTERM, SIGKILL after `grace_s`; return when it is gone. Not running: no error."""
        entry = await asyncio.to_thread(self.find)
        if entry is not None:
            await self._end(entry.process, grace_s)
        _reap()
        self.spec.pidfile.unlink(missing_ok=True)
        self.process, self.adopted = None, False

    async def _end(self, process: ProcessId, grace_s: float) -> None:
        process.signal(signal.SIGTERM)
        if not await self._gone(process, grace_s):
            log.warning("daemon.killed", daemon=self.spec.name, pid=process.pid, grace_s=grace_s)
            process.signal(signal.SIGKILL)
            if not await self._gone(process, 10.0):
                raise self._failed(f"{self.spec.name} (pid {process.pid}) does not die")
        _reap()

    async def watch(self) -> None:
        """Return when the daemon has died. Not started: at once."""
        if self.process is not None:
            await self._gone(self.process, None)
            _reap()

    # inner

    async def _gone(self, process: ProcessId, timeout_s: float | None) -> bool:
        """Wait without a thread: a pidfd is readable once its process has exited."""
        descriptor = process.pidfd()
        if descriptor is None:
            return True
        loop = asyncio.get_running_loop()
        gone = asyncio.Event()
        loop.add_reader(descriptor, gone.set)
        try:
            await asyncio.wait_for(gone.wait(), timeout_s)
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
        return True

    def _spawn(self) -> ProcessId:
        spec = self.spec
        for folder in (spec.pidfile.parent, spec.logfile.parent):
            folder.mkdir(parents=True, exist_ok=True)
        if spec.logfile.exists() and spec.logfile.stat().st_size > LOG_ROTATE_BYTES:
            spec.logfile.replace(spec.logfile.with_name(spec.logfile.name + ".1"))
        raise_open_files()
        marks = {_MARK: str(spec.pidfile), _MARK_FINGERPRINT: spec.fingerprint}
        faults.point("daemon.before-spawn")
        with spec.logfile.open("ab") as out:
            try:
                child = subprocess.Popen(
                    spec.argv,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    cwd="/",
                    env=daemon_environment({**spec.env, **marks}),
                    start_new_session=True,
                )
            except FileNotFoundError as error:
                raise MissingProgram(f"{spec.argv[0]} is not there", details={"program": spec.argv[0]}) from error
            except OSError as error:
                raise ProcessFailed(f"{spec.name}: {spec.argv[0]}: {error.strerror}") from error
        faults.point("daemon.spawned")
        _children.append(child)
        process = ProcessId.of(child.pid)
        if process is None:
            child.wait()
            raise self._failed(f"{spec.name} ended at once (exit code {child.returncode})")
        self._write(PidFile(process, spec.fingerprint))
        faults.point("daemon.written")
        return process

    def _write(self, entry: PidFile) -> None:
        self.spec.pidfile.parent.mkdir(parents=True, exist_ok=True)
        write_pidfile(self.spec.pidfile, entry)

    def _failed(self, message: str) -> ProcessFailed:
        tail = log_tail(self.spec.logfile)
        return ProcessFailed(
            message + (f". Its last words:\n{tail}" if tail else ""),
            next_step=f"Its log is {self.spec.logfile}.",
            details={"daemon": self.spec.name, "log": str(self.spec.logfile)},
        )


def _leads(process: ProcessId) -> bool:
    try:
        return os.getsid(process.pid) == process.pid and process.alive()
    except ProcessLookupError:
        return False


def _reap() -> None:
    _children[:] = [child for child in _children if child.poll() is None]


def raise_open_files() -> None:
    """Let us and what we start have as many open files as the hard limit gives (at most 1 Mi)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _NOFILE if hard == resource.RLIM_INFINITY else min(hard, _NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def log_tail(path: Path, lines: int = 8, most_bytes: int = 4096) -> str:
    """The last lines of a log file; empty when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - most_bytes))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


# --- supervision --------------------------------------------------------------------------------------------------


class Supervised(Protocol):
    """What `supervise` needs of a daemon's owner."""

    async def start(self) -> None: ...

    async def watch(self) -> None: ...


Report = Callable[[str, RoostError | None], None]
"""Called with "died", "failed" (and why) or "restarted"."""


async def supervise(
    subject: Supervised,
    report: Report,
    *,
    first_pause_s: float = 0.1,
    longest_pause_s: float = 30.0,
    calm_s: float = 60.0,
) -> None:
    """Restart a started daemon whenever it dies, until cancelled.

    The pause before it doubles, and is reset after `calm_s` of life. The daemon goes on when this is cancelled.
    """
    pause = first_pause_s
    while True:
        since = time.monotonic()
        await subject.watch()
        if time.monotonic() - since > calm_s:
            pause = first_pause_s
        report("died", None)
        while True:
            await asyncio.sleep(pause)
            pause = min(longest_pause_s, pause * 2)
            try:
                await subject.start()
            except RoostError as error:
                report("failed", error)
            else:
                report("restarted", None)
                break
