"""The private registry on loopback, where bootstrapped images are kept: docker-registry with our configuration."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import shutil
import socket
import time
from pathlib import Path

import structlog

from roost import faults
from roost.errors import MissingProgram, PortInUse
from roost.linux.process import listener
from roost.node.daemons import Daemon, DaemonSpec
from roost.settings import Settings

log = structlog.get_logger()

_START_TIMEOUT_S = 15.0
_ANSWER_S = 2.0
_ORPHAN_S = 1.0


def render_config(storage: Path, address: str) -> str:
    """docker-registry's configuration (JSON is YAML); it takes the file's words literally, so nothing else is in it."""
    document = {
        "version": "0.1",
        "log": {"level": "warn", "accesslog": {"disabled": True}},
        "storage": {
            "filesystem": {"rootdirectory": str(storage)},
            "delete": {"enabled": True},
            # Uploads of killed builds are cleared after a week, looked for daily.
            "maintenance": {"uploadpurging": {"enabled": True, "age": "168h", "interval": "24h", "dryrun": False}},
        },
        "http": {"addr": address},
    }
    return json.dumps(document, indent=1) + "\n"


class Registry:
    """docker-registry on 127.0.0.1 at `[registry] port`; it outlives us as containerd does."""

    def __init__(self, settings: Settings) -> None:
        self.host = f"127.0.0.1:{settings.registry.port}"
        """What image references begin with."""
        self.storage = settings.node_state / "registry"
        self._port = settings.registry.port
        self._config = settings.node_state / "registry.yml"
        self._pidfile = settings.node_run / "registry.pid"
        self._logfile = settings.node_state / "log" / "registry.log"
        self._daemon: Daemon | None = None

    @property
    def adopted(self) -> bool:
        """Whether the last `start` found it running."""
        return self._daemon is not None and self._daemon.adopted

    @property
    def pid(self) -> int | None:
        return self._daemon.process.pid if self._daemon is not None and self._daemon.process is not None else None

    async def start(self) -> None:
        """Adopt the running registry or start one; return when it answers.

        Raises PortInUse, naming who has the port; MissingProgram; ProcessFailed with the end of its log.
        """
        spec = await asyncio.to_thread(self._prepare)
        if self._daemon is None or self._daemon.spec != spec:
            self._daemon = Daemon(spec)
        found = await asyncio.to_thread(self._daemon.find)
        if found is None or found.fingerprint != spec.fingerprint:
            await asyncio.to_thread(self._check_port, found.process.pid if found is not None else None)
        await self._daemon.start(self._ready, _START_TIMEOUT_S)

    async def stop(self, grace_s: float = 5.0) -> None:
        """End it; what it stores stays. Not running: no error."""
        # It may run though its package is gone: the pid file finds it.
        program = shutil.which("docker-registry") or "/usr/bin/docker-registry"
        await (self._daemon or Daemon(self._spec(program, ""))).stop(grace_s)

    async def watch(self) -> None:
        """Return when it has died."""
        if self._daemon is not None:
            await self._daemon.watch()

    # inner

    def _program(self) -> str:
        program = shutil.which("docker-registry")
        if program is None:
            raise MissingProgram(
                "docker-registry is not installed",
                next_step="Run `make setup`, or `apt-get install docker-registry`.",
            )
        return program

    def _spec(self, program: str, fingerprint: str) -> DaemonSpec:
        argv = (program, "serve", str(self._config))
        return DaemonSpec("registry", argv, self._pidfile, self._logfile, fingerprint)

    def _prepare(self) -> DaemonSpec:
        program = self._program()
        self.storage.mkdir(mode=0o700, parents=True, exist_ok=True)
        rendered = render_config(self.storage, self.host)
        beside = self._config.with_suffix(".new")
        beside.write_text(rendered)
        beside.rename(self._config)
        faults.point("registry.configured")
        return self._spec(program, hashlib.sha256(rendered.encode()).hexdigest()[:16])

    def _check_port(self, ours: int | None) -> None:
        """See that the port is free before a daemon fails on it. Only the kernel's answer to bind counts.

        A listener without an owner is one whose process has just died: the kernel closes its socket a moment later.
        """
        deadline = time.monotonic() + _ORPHAN_S
        while not _can_bind(self._port):
            who = listener(self._port)
            if who is not None and who.pid is not None and who.pid == ours:
                return
            if (who is not None and who.pid is not None) or time.monotonic() > deadline:
                raise PortInUse(
                    str(who) if who is not None else f"port {self._port} is in use",
                    next_step="Stop the other process, or set [registry] port.",
                    details={"port": self._port, "pid": who.pid if who is not None else None},
                )
            time.sleep(0.005)

    async def _ready(self) -> bool:
        """Whether it answers `GET /v2/`, the registry API's own test, and it is ours that does."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
                try:
                    writer.write(f"GET /v2/ HTTP/1.0\r\nHost: {self.host}\r\n\r\n".encode())
                    status = await reader.readline()
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return False
        return b" 200 " in status


def _can_bind(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return False
    return True
