"""One command that runs in a container; `execs` tells how its streams work."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import structlog

from roost.errors import EngineFailed, EngineUnreachable, ExecFailed, InternalError, RoostError
from roost.runtimes.cri import methods
from roost.runtimes.cri.engine import Engine, absent, said
from roost.runtimes.cri.fifos import Fifos
from roost.runtimes.cri.proto import tasks_pb2
from roost.runtimes.protocol import Channel, TerminalSize

log = structlog.get_logger()

_ENGINE_AWAY_S = 60.0
"""containerd may be away this long while a command is waited for."""
_CALL_S = 15.0
_CLOSE_S = 10.0
_EOT = b"\x04"


class CriExecSession:
    """An ExecSession (see the protocol)."""

    def __init__(
        self,
        engine: Engine,
        engine_id: str,
        exec_id: str,
        fifos: Fifos,
        *,
        tty: bool,
        on_close: Callable[[CriExecSession], None] | None = None,
    ) -> None:
        self._engine = engine
        self.engine_id = engine_id
        self.exec_id = exec_id
        self._fifos = fifos
        self._tty = tty
        self._on_close = on_close
        self._exit: asyncio.Task[int] | None = None
        self._pid = 0
        self._writing = asyncio.Lock()
        self._line_open = False
        self._stdin_ended = False
        self._closing: asyncio.Task[None] | None = None

    @property
    def folder(self) -> Path:
        return self._fifos.folder

    def begin(self, pid: int) -> None:
        """The command runs as process `pid` of this host."""
        self._pid = pid
        self._exit = self._fifos.over = asyncio.create_task(self._await_exit(), name=f"exec {self.exec_id}")

    # exit

    async def _await_exit(self) -> int:
        request = tasks_pb2.WaitRequest(container_id=self.engine_id, exec_id=self.exec_id)
        loop = asyncio.get_running_loop()
        away_since: float | None = None
        while True:
            asked = loop.time()
            try:
                return (await self._engine.call(methods.TASK_WAIT, request, timeout_s=None)).exit_status
            except EngineUnreachable:
                now = loop.time()
                if away_since is None or now - asked > _CALL_S:  # a call that hung was held by a living engine
                    away_since = now
                if now - away_since > _ENGINE_AWAY_S:
                    raise
            except EngineFailed as error:
                raise ExecFailed(
                    f"how the command ended is not known: the container's helper is gone ({said(error)})",
                    next_step="Restart the workspace if it does not come back by itself.",
                ) from error
            await asyncio.sleep(0.1)

    @property
    def _over(self) -> bool:
        return self._exit is None or self._exit.done()

    async def wait(self) -> int:
        if self._exit is None:
            raise InternalError("the command was not started")
        return await asyncio.shield(self._exit)

    # stdin

    async def write(self, data: bytes) -> None:
        async with self._writing:
            if self._stdin_ended:
                return
            if self._tty and data:
                self._line_open = not data.endswith((b"\n", b"\r", _EOT))
            await self._fifos.write(data)

    async def close_stdin(self) -> None:
        if self._tty:
            # On a line that is not empty, the first one only ends the line's read.
            await self.write(_EOT * 2 if self._line_open else _EOT)
            self._stdin_ended = True
            return
        async with self._writing:
            if self._stdin_ended:
                return
            self._stdin_ended = True
            if not self._fifos.stdin_path:
                return
            self._fifos.close_writer()
            request = tasks_pb2.CloseIORequest(container_id=self.engine_id, exec_id=self.exec_id, stdin=True)
            try:
                await self._call_engine(methods.TASK_CLOSE_IO, request)
            except EngineFailed as error:
                if not self._over and not _ended(error):
                    raise

    # output

    def output(self) -> AsyncIterator[tuple[Channel, bytes]]:
        return self._fifos.output()

    # control

    async def resize(self, size: TerminalSize) -> None:
        request = tasks_pb2.ResizePtyRequest(
            container_id=self.engine_id, exec_id=self.exec_id, width=size.columns, height=size.rows
        )
        await self._tell(methods.TASK_RESIZE, request)

    async def signal(self, number: int) -> None:
        request = tasks_pb2.KillRequest(container_id=self.engine_id, exec_id=self.exec_id, signal=number)
        await self._tell(methods.TASK_KILL, request)

    async def _tell(
        self, method: methods.Method[methods.RequestT, methods.ResponseT], request: methods.RequestT
    ) -> None:
        if self._over:
            return
        try:
            await self._call_engine(method, request)
        except EngineFailed as error:
            if not self._over and not _ended(error):
                raise

    async def _call_engine(
        self, method: methods.Method[methods.RequestT, methods.ResponseT], request: methods.RequestT
    ) -> methods.ResponseT:
        return await self._engine.call(method, request, timeout_s=_CALL_S)

    # end

    async def close(self) -> None:
        if self._closing is None:
            self._closing = asyncio.create_task(self._end(), name=f"close exec {self.exec_id}")
        await asyncio.shield(self._closing)

    async def _end(self) -> None:
        await self._fifos.release()
        # Until the engine has forgotten the command: its DeleteProcess waits for the copying to end, 2 s at most.
        drain = asyncio.create_task(self._fifos.drain(), name=f"drain exec {self.exec_id}")
        try:
            if self._exit is None:  # of an earlier process of ours, or half-started
                await self._kill()
            elif not self._exit.done():
                await self._kill()
                await asyncio.wait([self._exit], timeout=_CLOSE_S)
            request = tasks_pb2.DeleteProcessRequest(container_id=self.engine_id, exec_id=self.exec_id)
            try:
                await self._call_engine(methods.TASK_DELETE_PROCESS, request)
            except RoostError as error:
                if not isinstance(error, EngineFailed) or not (absent(error) or _ended(error)):
                    log.debug("exec is not forgotten by the engine", exec=self.exec_id, error=error.message)
        finally:
            tasks = [drain] if self._exit is None else [drain, self._exit]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._fifos.remove()
            if self._on_close is not None:
                self._on_close(self)

    async def _kill(self) -> None:
        """SIGKILL to the command and to what is left in its process group (it leads a session of its own)."""
        if self._pid > 1 and self._exit is not None and not self._exit.done():
            try:
                os.killpg(self._pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        request = tasks_pb2.KillRequest(container_id=self.engine_id, exec_id=self.exec_id, signal=int(signal.SIGKILL))
        try:
            await self._call_engine(methods.TASK_KILL, request)
        except RoostError as error:
            if not isinstance(error, EngineFailed):
                log.info("a command cannot be killed", exec=self.exec_id, error=error.message)


def _ended(error: EngineFailed) -> bool:
    """Whether the engine refused because the process is over."""
    text = said(error)
    return absent(error) or any(
        word in text for word in ("already finished", "not found", "not running", "stopped state", "process done")
    )
