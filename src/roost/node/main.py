"""The node's process: takes over or starts what a host needs for workspaces, keeps it alive, does what is assigned.

Start: pool, then containerd, tools and network, then the registry, then the link to the server.  Each part is adopted
when it runs already, so the death of a node disturbs nothing.  End: SIGTERM and SIGINT end the node, containerd and the
registry, containers go on under their shims and the next node takes them over; SIGUSR2 (`roost node stop --all`) stops
the containers too, takes the network policy back and unmounts the pool.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import structlog

from roost import __version__, statedirs
from roost.errors import MissingProgram, NeedsRoot, PortInUse, RoostError
from roost.linux.cgroup import Group
from roost.linux.claim import claim
from roost.logs import configure
from roost.node.containerd import Containerd
from roost.node.daemons import Supervised, supervise
from roost.node.link import ServerLink
from roost.node.network import Network
from roost.node.pool import Pool
from roost.node.registry import Registry
from roost.node.repositories import NodeRepositories
from roost.node.streams import Streams
from roost.oci.references import is_plain_http, parse_remote
from roost.runtimes.cri import CriConfig, CriRuntime, docker_auth
from roost.runtimes.protocol import ImageRef, Limits, RegistryAuth
from roost.settings import Settings, load
from roost.workspaces.converge import Converger
from roost.workspaces.start import StartTools
from roost.workspaces.startlog import StartLogs

log = structlog.get_logger()

GROW_S = 2.0
STATUS_S = 10.0
SWEEP_S = 3600.0


def run() -> None:
    """Be the node until a signal. Raises NeedsRoot, AlreadyRunning and what the parts raise at their start."""
    settings = load()
    configure(settings.log_level)
    if os.geteuid() != 0:
        raise NeedsRoot("the node mounts, makes namespaces and runs the container engine")
    statedirs.prepare(settings)
    with claim(settings.node_run, "node"):
        asyncio.run(Node(settings).run())


class Node:
    """The parts of a node, in the order they depend on each other."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.pool = Pool(settings)
        self._stop: asyncio.Future[bool] | None = None
        """Result: stop everything, the containers too."""
        self._background: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        self._stop = loop.create_future()
        for number, everything in ((signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGUSR2, True)):
            loop.add_signal_handler(number, self._stopped, everything)
        await asyncio.to_thread(self.pool.open)
        engine = Containerd(self.settings, self.pool.snapshots_dir)
        network = Network(self.settings, engine.cni_conf_dir)
        await network.start()
        await engine.start()
        registry = await self._registry()
        async with self._working(engine, network) as (runtime, converger):
            self._spawn(self._supervise("containerd", engine))
            if registry is not None:
                self._spawn(self._supervise("registry", registry))
            everything = await self._stop
            log.info("node stops", containers=everything)
            for task in self._background:
                task.cancel()
            await asyncio.gather(*self._background, return_exceptions=True)
            if everything:
                await converger.close()  # or a start that goes on would bring one up behind our back
                await self._stop_containers(runtime)
        await engine.stop()
        if registry is not None:
            await registry.stop()
        if everything:
            await network.remove_policy()
            await asyncio.to_thread(self.pool.close)
        log.info("node stopped")

    def _stopped(self, everything: bool) -> None:
        if self._stop is not None and not self._stop.done():
            self._stop.set_result(everything)

    async def _registry(self) -> Registry | None:
        """The private registry, or None where it cannot be had: images then come from elsewhere."""
        registry = Registry(self.settings)
        try:
            await registry.start()
        except (MissingProgram, PortInUse) as error:
            log.warning("no private registry", error=error.message, next_step=error.hint)
            return None
        return registry

    @asynccontextmanager
    async def _working(self, engine: Containerd, network: Network) -> AsyncIterator[tuple[CriRuntime, Converger]]:
        settings = self.settings
        runtime = CriRuntime(self._cri_config(engine, network))
        await runtime.check()
        await runtime.recover()
        logs = StartLogs(settings.node_state / "logs" / "starts")
        repositories = NodeRepositories(settings, runtime)
        await repositories.open()
        tools = StartTools(
            runtime=runtime,
            repositories=repositories,
            room=lambda: asyncio.to_thread(self.pool.ensure_room),
            auth=partial(self._credentials, engine),
            repo_path=settings.repos.repo_path,
            allow_sudo=settings.workspaces.sudo,
        )
        link: ServerLink

        converger = Converger(
            tools, logs, lambda report: link.report(report), stop_grace_s=settings.workspaces.stop_grace_s
        )
        streams = Streams(runtime, converger, logs)

        async def call(method: str, params: dict[str, Any]) -> Any:
            return await self._call(runtime, engine, method, params)

        hello = {"type": "hello", "node": "local", "version": __version__, "runtime": runtime.name, "pid": os.getpid()}
        link = ServerLink(settings.api_socket, hello, converger.assign, call, streams.serve)
        self._spawn(link.run())
        self._spawn(self._events(runtime, converger))
        self._spawn(self._relist(converger))
        self._spawn(self._grow())
        self._spawn(self._status(link))
        self._spawn(self._sweep(logs))
        log.info("node works", pid=os.getpid(), adopted=engine.adopted)
        try:
            yield runtime, converger
        finally:
            await converger.close()
            await runtime.close()

    def _cri_config(self, engine: Containerd, network: Network) -> CriConfig:
        settings = self.settings
        parent = f"/{settings.node.instance}"

        def prepare_cgroup(name: str, limits: Limits) -> None:
            group = Group(name.lstrip("/"))
            group.create()
            group.set_pids(limits.pids or None)

        return CriConfig(
            socket=engine.socket,
            run_dir=settings.node_run / "cri",
            log_dir=settings.node_state / "logs" / "containers",
            tools_dir=engine.tools_dir,
            cgroup_parent=parent,
            dns_servers=network.dns_servers(),
            pull_timeout_s=settings.registry.pull_timeout_s,
            pull_progress_timeout_s=settings.registry.progress_timeout_s,
            python=sys.executable,
            volumes=self.pool,
            hidden_images=frozenset({engine.pause_ref}),
            network_ready=network.guard,
            prepare_cgroup=prepare_cgroup,
            remove_cgroup=lambda name: Group(name.lstrip("/")).remove(),
        )

    async def _credentials(self, engine: Containerd, ref: ImageRef) -> RegistryAuth | None:
        """What a pull of that image needs: credentials from root's docker config, and leave to speak plain http."""
        host = parse_remote(ref).host
        if is_plain_http(host, self.settings.registry.plain_http):
            await asyncio.to_thread(engine.allow_plain_http, host)
        return await asyncio.to_thread(docker_auth, ref)

    async def _call(self, runtime: CriRuntime, engine: Containerd, method: str, params: dict[str, Any]) -> Any:
        match method:
            case "images":
                found = await runtime.images()
                return [{"ref": i.ref, "digest": i.digest, "size_bytes": i.size_bytes} for i in found]
            case "pull":
                ref = ImageRef(params["ref"])
                image = await runtime.pull(ref, await self._credentials(engine, ref))
                return {"ref": image.ref, "digest": image.digest, "size_bytes": image.size_bytes}
            case _:
                raise ValueError(f"unknown method {method!r}")

    # what goes on in the background

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # A node that lost a part of itself is worse than one that is started anew.
            log.error("a part of the node ended", exc_info=error)
            self._stopped(False)

    async def _supervise(self, name: str, subject: Supervised) -> None:
        def said(what: str, error: RoostError | None) -> None:
            log.warning(f"{name} {what}", error=error.message if error else None)

        await supervise(subject, said)

    async def _events(self, runtime: CriRuntime, converger: Converger) -> None:
        """Pass the engine's events on; when the engine was away, look at everything."""
        while True:
            try:
                async for event in runtime.events():
                    converger.look(event.container)
            except RoostError as error:
                log.info("engine's events ended", error=error.message)
            await asyncio.sleep(0.2)
            try:
                await runtime.check()
            except RoostError:
                continue
            converger.again()

    async def _relist(self, converger: Converger) -> None:
        told: set[str] = set()
        while True:
            await asyncio.sleep(self.settings.node.relist_s)
            try:
                strangers = await converger.relist()
            except RoostError as error:
                log.info("containers cannot be listed", error=error.message)
                continue
            for status in strangers:
                if status.container not in told:
                    told.add(status.container)
                    log.warning("a container that nobody wants; it is left alone", container=status.container)

    async def _grow(self) -> None:
        while True:
            await asyncio.sleep(GROW_S)
            try:
                await asyncio.to_thread(self.pool.grow_if_needed)
            except RoostError as error:
                log.warning("the pool cannot grow", error=error.message)

    async def _status(self, link: ServerLink) -> None:
        while True:
            try:
                await link.status(await asyncio.to_thread(self._seen))
            except (RoostError, OSError) as error:
                log.warning("the pool cannot be looked at", error=str(error))
            await asyncio.sleep(STATUS_S)

    def _seen(self) -> dict[str, Any]:
        """What the node says of itself: the pool's room and what each HOME takes."""
        usage = asdict(self.pool.usage())
        return {"pool": usage, "homes": {volume.name: volume.used_bytes for volume in self.pool.list()}}

    async def _sweep(self, logs: StartLogs) -> None:
        while True:
            try:
                await asyncio.to_thread(logs.sweep, self.settings.workspaces.log_keep_days * 86400)
                await asyncio.to_thread(self._give_back)
            except (RoostError, OSError) as error:
                log.warning("sweeping failed", error=str(error))
            await asyncio.sleep(SWEEP_S)

    def _give_back(self) -> None:
        """Return room to a host that is short of it, if the pool has much to spare."""
        usage, step = self.pool.usage(), self.settings.pool.step_bytes
        short = usage.host_free_bytes < self.settings.pool.reserve_bytes + 2 * step
        if not usage.native and short and usage.free_bytes > 4 * step:
            self.pool.trim()

    async def _stop_containers(self, runtime: CriRuntime) -> None:
        grace = self.settings.workspaces.stop_grace_s

        async def down(container: Any) -> None:
            await runtime.stop(container, grace)
            await runtime.delete(container)

        outcomes = await asyncio.gather(
            *(down(status.container) for status in await runtime.list()), return_exceptions=True
        )
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                log.warning("a container did not stop", error=str(outcome))
