"""Commands in a running container, through containerd's Tasks API.

Why not CRI's exec: it carries no user, working directory or environment, and its streams need an HTTP server.  Why
FIFOs: that is how a shim takes and gives a process' streams; bytes go command -> pipe -> shim -> FIFO -> us.

What the shim does with them (containerd 1.6, pkg/process/{exec,io}.go), and what follows
- For each output it opens the FIFO to write *and* to read, so that a client which goes away does not kill the command
  by SIGPIPE: if we stop reading, the command blocks.  Backpressure is therefore exact, and a session that is closed
  must kill and drain, or a goroutine of the shim stays blocked for ever.
- It opens them inside Tasks.Start and waits there until we are at the other end.  We open for reading before, and read
  only after Start: an empty FIFO without a writer would look like its end.
- stdin it opens for reading, and for writing too, so that *it* decides about the end: EOF needs our end closed and
  then CloseIO.  Bytes in a FIFO survive as long as anybody has it open.  It opens stdin at some moment around the
  answer to Start; so Start is not over for us before an open for writing proves that a reader is there (ENXIO if not).
- With a terminal, the end of stdin makes it hang up the terminal and drop output.  An end of stdin is Ctrl-D there:
  what the terminal's reader takes for it, and what is left to read is read.

The end.  The exit code comes from Tasks.Wait, which is a call that hangs until then.  containerd may be restarted
meanwhile: the shim, the command and the FIFOs do not notice, so the wait is taken up again when it is back.  When the
command is over but something it left behind holds its pipes (`daemon &`), output ends after LINGER_S without a byte.

A directory `<run_dir>/exec/<container>.<exec>/` holds the FIFOs from before the exec is made until after it is gone:
what a killed process of ours left can be found there (`recover`).
"""

from __future__ import annotations

import asyncio
import json
import secrets
import shutil
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import structlog

from roost import faults
from roost.errors import (
    ContainerNotFound,
    EngineFailed,
    ExecFailed,
    ExecNotExecutable,
    ExecNotFound,
    RoostError,
    WorkspaceNotRunning,
)
from roost.runtimes.cri import methods
from roost.runtimes.cri.config import CriConfig
from roost.runtimes.cri.containers import Containers
from roost.runtimes.cri.engine import Engine, said
from roost.runtimes.cri.fifos import Fifos
from roost.runtimes.cri.proto import containers_pb2, tasks_pb2
from roost.runtimes.cri.session import CriExecSession
from roost.runtimes.protocol import ContainerId, ExecSpec

log = structlog.get_logger()

_PROCESS_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/Process"
_CACHED_SPECS = 256
_CLEANUP_S = 5.0


class Execs:
    def __init__(self, config: CriConfig, engine: Engine, containers: Containers) -> None:
        self._config = config
        self._engine = engine
        self._containers = containers
        self._folder = config.run_dir / "exec"
        self._specs: dict[str, dict[str, Any]] = {}
        self._sessions: set[CriExecSession] = set()

    async def start(self, container: ContainerId, spec: ExecSpec) -> CriExecSession:
        if not spec.argv or not spec.argv[0]:
            raise ExecNotFound("no command was given")
        found = await self._containers.running(container)
        process = process_spec(await self._process_of(found.id), spec)
        exec_id = secrets.token_hex(8)
        tty = spec.tty is not None
        fifos = Fifos(self._folder / f"{found.id}.{exec_id}", stdin=spec.stdin or tty, tty=tty)
        session = CriExecSession(self._engine, found.id, exec_id, fifos, tty=tty, on_close=self._closed)
        self._sessions.add(session)
        # A start that is cut off in the middle goes on in the shim, where it holds the process and waits for our ends
        # of the FIFOs.  So it is never cut off: who is cancelled leaves it to end, and then to be killed.
        starting = asyncio.create_task(self._begin(session, fifos, process, tty=tty), name=f"start exec {exec_id}")
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            await _bounded(self._abandon(starting, session))
            raise
        except EngineFailed as error:
            await session.close()
            raise await self._why(container, spec, error) from error
        except BaseException:
            await session.close()
            raise
        if tty and not spec.stdin:
            await session.close_stdin()
        return session

    async def _begin(self, session: CriExecSession, fifos: Fifos, process: dict[str, Any], *, tty: bool) -> None:
        fifos.open()
        request = tasks_pb2.ExecProcessRequest(
            container_id=session.engine_id,
            exec_id=session.exec_id,
            stdin=fifos.stdin_path,
            stdout=fifos.stdout_path,
            stderr=fifos.stderr_path,
            terminal=tty,
        )
        request.spec.type_url = _PROCESS_TYPE
        request.spec.value = json.dumps(process).encode()
        await self._engine.call(methods.TASK_EXEC, request, timeout_s=self._config.call_timeout_s)
        faults.point("cri.exec.made")
        started = await self._engine.call(
            methods.TASK_START,
            tasks_pb2.StartRequest(container_id=session.engine_id, exec_id=session.exec_id),
            timeout_s=self._config.call_timeout_s,
        )
        await fifos.connected()
        session.begin(started.pid)

    @staticmethod
    async def _abandon(starting: asyncio.Task[None], session: CriExecSession) -> None:
        await asyncio.wait([starting])
        if not starting.cancelled() and (error := starting.exception()) is not None:
            log.debug("a cancelled exec would have failed", error=str(error))
        await session.close()

    def _closed(self, session: CriExecSession) -> None:
        self._sessions.discard(session)

    async def close(self) -> None:
        """End every session of this process."""
        await asyncio.gather(*(session.close() for session in list(self._sessions)), return_exceptions=True)

    async def _process_of(self, engine_id: str) -> dict[str, Any]:
        """The process part of the container's OCI specification; it never changes, so it is asked once."""
        known = self._specs.get(engine_id)
        if known is not None:
            return known
        try:
            answer = await self._engine.call(methods.CONTAINER_GET, containers_pb2.GetContainerRequest(id=engine_id))
            process = json.loads(answer.container.spec.value)["process"]
        except (ValueError, KeyError) as error:
            raise EngineFailed(f"the engine's description of a container cannot be read: {error!r}") from error
        while len(self._specs) >= _CACHED_SPECS:
            del self._specs[next(iter(self._specs))]
        self._specs[engine_id] = process
        return dict(process)

    async def _why(self, container: ContainerId, spec: ExecSpec, error: EngineFailed) -> RoostError:
        """The leaf that a refused exec means: by the state of the container, else by the words of runc."""
        try:
            await self._containers.running(container)
        except (ContainerNotFound, WorkspaceNotRunning) as why:
            return why
        return exec_error(spec, said(error))

    async def recover(self) -> None:
        """End and remove what an earlier process of ours left: nobody can have its streams back."""
        if not self._folder.is_dir():
            return
        ours = {session.folder.name for session in self._sessions}
        for folder in sorted(self._folder.iterdir()):
            engine_id, _, exec_id = folder.name.partition(".")
            if folder.name in ours or not exec_id:
                continue
            await self._end_stale(engine_id, exec_id, folder)

    async def _end_stale(self, engine_id: str, exec_id: str, folder: Path) -> None:
        fifos = Fifos.left_behind(folder)
        session = CriExecSession(self._engine, engine_id, exec_id, fifos, tty=False)
        try:
            await session.close()
        except RoostError as error:
            log.warning("an exec of an earlier run stays", folder=folder.name, error=error.message)
            return
        shutil.rmtree(folder, ignore_errors=True)
        log.info("an exec of an earlier run was ended", container=engine_id[:12], exec=exec_id)


def process_spec(of_container: dict[str, Any], spec: ExecSpec) -> dict[str, Any]:
    """The OCI process to run: the container's own (capabilities, rlimits, no_new_privs, …) with what `spec` says."""
    env: dict[str, str] = {}
    for item in of_container.get("env") or ():
        key, _, value = str(item).partition("=")
        env[key] = value
    env.update(spec.env)
    env.setdefault("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    process = {key: value for key, value in of_container.items() if key not in ("commandLine", "consoleSize", "user")}
    process |= {
        "args": list(spec.argv),
        "cwd": spec.cwd,
        "env": [f"{key}={value}" for key, value in env.items()],
        "user": {"uid": spec.user.uid, "gid": spec.user.gid, "additionalGids": list(spec.user.groups)},
        "terminal": spec.tty is not None,
    }
    if spec.tty is not None:
        process["consoleSize"] = {"height": spec.tty.rows, "width": spec.tty.columns}
        if "TERM" not in env:
            process["env"].append("TERM=xterm-256color")
    return process


def exec_error(spec: ExecSpec, text: str) -> RoostError:
    """The leaf that runc's message means (libcontainer/setns_init_linux.go and the Go exec package's texts)."""
    command, lower = spec.argv[0], text.lower()
    words = text.removeprefix("OCI runtime exec failed: ").removeprefix("exec failed: ")
    if "chdir to cwd" in lower or ("mkdir" in lower and spec.cwd.lower() in lower):
        return ExecFailed(
            f"the working directory {spec.cwd} cannot be entered: {words}", next_step="Name one that exists inside."
        )
    if "executable file not found" in lower:
        return ExecNotFound(f"{command}: no such command in PATH")
    if "no such file or directory" in lower and "exec" in lower:
        return ExecNotFound(f"{command}: no such file, or its interpreter is missing")
    if any(word in lower for word in ("permission denied", "exec format error", "is a directory")):
        return ExecNotExecutable(f"{command}: {words}")
    return ExecFailed(f"{command}: {words}")


async def _bounded(work: Coroutine[Any, Any, None]) -> None:
    """Give a clean-up a while although we are being cancelled; then it ends by itself."""
    task = asyncio.create_task(work)
    _cleanups.add(task)
    task.add_done_callback(_cleanups.discard)
    await asyncio.wait([task], timeout=_CLEANUP_S)


_cleanups: set[asyncio.Task[None]] = set()
