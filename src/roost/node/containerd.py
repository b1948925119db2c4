"""Our own containerd: nothing of it is shared with one that the system may have.

Root, state, sockets, configuration, runc's and the CNI's state, temporary mounts and the sandboxes' network namespaces
lie under our state and run directories.  Two things containerd does not let one move, and both are made not to clash:

- the shims' sockets, `/run/containerd/s/<hash>`: `socketRoot` is the constant `defaults.DefaultStateDir` in containerd
  1.x and 2.0-2.2 (pkg/shim/util_unix.go); from 2.3 on (pull request 12785) `socket_dir` moves them, and we do.
  The hash covers our socket's address, the namespace and the id, so no two engines meet.  The shim makes the parent
  directory 0700 when it is missing, which breaks a system containerd that comes later (containerd issue 10502): we
  make it first, with containerd's own mode 0711.
- libcni's result cache, `/var/lib/cni/results`: its files begin with the network's name, which is our instance's.

Containers are children of shims, shims are children of nobody: containerd may be stopped, killed, replaced by one with
another configuration, and the containers go on.

Configuration: version 2 is what 1.6 and 1.7 read; 2.x reads version 3, where CRI is two plugins.  We write the one that
fits.  A change of configuration or of the installed version restarts a running containerd at the next `start`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from roost import faults
from roost.errors import EngineTimeout, EngineUnreachable, InvalidConfig, MissingFeature, MissingProgram
from roost.node.daemons import Daemon, DaemonSpec
from roost.node.tools import PauseImage, ensure_tools, import_pause_image, pause_image
from roost.rpc import grpc
from roost.settings import Settings

log = structlog.get_logger()

SHIM_PARENT = Path("/run/containerd")
CNI_BIN_DIRS = (Path("/usr/lib/cni"), Path("/opt/cni/bin"))
_CNI_PLUGINS = ("ptp", "host-local", "loopback")
_SUN_PATH_MAX = 107
_SHIM_SOCKETS_MAX = 32  # its files have 64 characters; containerd refuses a folder whose sockets would not fit
_CRI_CALL_S = 5.0

Version = tuple[int, int]


@dataclass(frozen=True)
class EngineConfig:
    """Everything that containerd's configuration says."""

    root: Path
    state: Path
    socket: Path
    temp: Path
    runc_root: Path
    snapshots: Path
    cni_bin: Path
    cni_conf: Path
    certs: Path
    sandbox_image: str
    apparmor: bool
    shim_sockets: Path
    log_line_bytes: int = 16384
    proxy_snapshotters: Mapping[str, Path] = field(default_factory=dict)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return json.dumps(str(value))  # a TOML basic string has JSON's escapes


def _table(name: str, values: Mapping[str, object]) -> str:
    lines = [f"[{name}]"] if name else []
    return "\n".join([*lines, *(f"{key} = {_toml(value)}" for key, value in values.items())])


_NOT_OURS = (
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.snapshotter.v1.blockfile",
    "io.containerd.snapshotter.v1.erofs",
    "io.containerd.differ.v1.erofs",
    "io.containerd.internal.v1.restart",
    "io.containerd.internal.v1.tracing",
    "io.containerd.tracing.processor.v1.otlp",
    "io.containerd.nri.v1.nri",
    "io.containerd.image-verifier.v1.bindir",
)
"""Plugins that would touch what is not ours (other file systems, /opt, /var/run/nri, the network) or have no use."""


def render_config(config: EngineConfig, version: Version) -> str:
    """containerd's configuration file for this version of it (1.6 and later)."""
    modern = version >= (2, 0)
    cri = "io.containerd.grpc.v1.cri"
    runtime = "io.containerd.cri.v1.runtime" if modern else cri
    images = "io.containerd.cri.v1.images" if modern else cri
    server = {
        "disable_tcp_service": True,
        "stream_server_address": "127.0.0.1",
        "stream_server_port": "0",
        "enable_tls_streaming": False,
    }
    sandboxes: dict[str, object] = {
        # Without CAP_SYS_RESOURCE a negative oom_score_adj is refused and no sandbox would start.
        "restrict_oom_score_adj": True,
        "disable_apparmor": not config.apparmor,
        "disable_hugetlb_controller": True,
        "tolerate_missing_hugetlb_controller": True,
        # A workspace's user may listen on port 80 and ping: the network namespace is its own.
        "enable_unprivileged_ports": True,
        "enable_unprivileged_icmp": True,
        # The host's /run/netns is not ours.
        "netns_mounts_under_state_dir": True,
        # Data of declared VOLUMEs would lie on the host's disk, outside the pool and its limits.
        "ignore_image_defined_volumes": True,
        "max_container_log_line_size": config.log_line_bytes,
    }
    if modern:
        sandboxes["enable_cdi"] = False
    pulls: dict[str, object] = {"snapshotter": "overlayfs", "disable_snapshot_annotations": False}
    pulls["max_concurrent_downloads"] = 3
    plugins: list[str] = []

    def plugin(name: str, values: Mapping[str, object], *below: str) -> None:
        path = "".join(f".{part}" for part in below)
        plugins.append(_table(f'plugins."{name}"{path}', values))

    if modern:
        plugin(cri, server)
        plugin(runtime, sandboxes)
        plugin(images, pulls)
        plugin(images, {"sandbox": config.sandbox_image}, "pinned_images")
        plugin(runtime, {"default_runtime_name": "runc"}, "containerd")
    else:
        plugin(cri, {"sandbox_image": config.sandbox_image, **server, **sandboxes, "max_concurrent_downloads": 3})
        engine = {key: value for key, value in pulls.items() if key != "max_concurrent_downloads"}
        plugin(cri, {"default_runtime_name": "runc", **engine}, "containerd")
    plugin(runtime, {"runtime_type": "io.containerd.runc.v2"}, "containerd", "runtimes", "runc")
    options = {"SystemdCgroup": False, "Root": config.runc_root}
    plugin(runtime, options, "containerd", "runtimes", "runc", "options")
    # 2.1 renamed bin_dir; giving both is refused there, the old one alone is taken by all.
    cni_bin: dict[str, object] = {"bin_dirs": [config.cni_bin]} if version >= (2, 1) else {"bin_dir": config.cni_bin}
    plugin(runtime, {**cni_bin, "conf_dir": config.cni_conf, "max_conf_num": 1}, "cni")
    plugin(images, {"config_path": config.certs}, "registry")
    if modern:
        plugin("io.containerd.transfer.v1.local", {"config_path": config.certs})
    if version >= (2, 3) and len(str(config.shim_sockets)) <= _SHIM_SOCKETS_MAX:
        plugin("io.containerd.shim.v1.manager", {"socket_dir": config.shim_sockets})
    plugin("io.containerd.snapshotter.v1.overlayfs", {"root_path": config.snapshots})
    plugin("io.containerd.internal.v1.opt", {"path": config.root / "opt"})
    proxies = [
        _table(f"proxy_plugins.{name}", {"type": "snapshot", "address": address})
        for name, address in sorted(config.proxy_snapshotters.items())
    ]
    top = {
        "version": 3 if modern else 2,
        "root": config.root,
        "state": config.state,
        "temp": config.temp,
        "disabled_plugins": list(_NOT_OURS),
    }
    sections = [
        "# Written by roost at every start of its node; changes here are lost.",
        _table("", top),
        _table("grpc", {"address": config.socket, "uid": 0, "gid": 0}),
        _table("ttrpc", {"address": f"{config.socket}.ttrpc", "uid": 0, "gid": 0}),
        _table("debug", {"level": "info"}),
        *plugins,
        *proxies,
    ]
    return "\n\n".join(sections) + "\n"


def containerd_version(program: Path) -> tuple[str, Version]:
    """What `containerd --version` says, and the two numbers that matter. Blocks. Raises MissingFeature."""
    try:
        text = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise MissingFeature(f"{program} --version does not work: {error}") from error
    match = re.search(r"\bv?(\d+)\.(\d+)\.\d+", text)
    if match is None:
        raise MissingFeature(f"{program} --version says {text!r}, which names no version")
    version = (int(match[1]), int(match[2]))
    if version < (1, 6):
        raise MissingFeature(f"containerd {version[0]}.{version[1]} is too old: 1.6 or later is needed")
    return text, version


def hosts_toml(host: str) -> str:
    """containerd's registry configuration (hosts.toml) of a host that speaks plain http."""
    url = _toml(f"http://{host}")
    return f'server = {url}\n\n[host.{url}]\n  capabilities = ["pull", "resolve"]\n'


class Containerd:
    """The private engine of one node."""

    def __init__(self, settings: Settings, snapshots_dir: Path) -> None:
        self._settings = settings
        self._snapshots = snapshots_dir
        self._state = settings.node_state / "containerd"
        self.socket = settings.node_run / "containerd.sock"
        self.tools_dir = Path()
        """The tools tree to mount at /opt/roost; set by `start`."""
        self.pause_ref = ""
        """The pause image's reference; set by `start`."""
        self.cni_conf_dir = self._state / "cni"
        """Where the network's conflist belongs."""
        self.logfile = settings.node_state / "log" / "containerd.log"
        self.version: Version = (0, 0)
        self._daemon: Daemon | None = None

    @property
    def adopted(self) -> bool:
        """Whether the last `start` found it running."""
        return self._daemon is not None and self._daemon.adopted

    @property
    def pid(self) -> int | None:
        return self._daemon.process.pid if self._daemon is not None and self._daemon.process is not None else None

    async def start(self) -> None:
        """Adopt the running containerd or start one; return when CRI answers and the pause image is there.

        Running with the right configuration: it is left as it is. Raises MissingProgram, MissingFeature,
        InvalidConfig (paths too long for a socket), ProcessFailed with the end of its log, EngineFailed.
        """
        spec, image = await asyncio.to_thread(self._prepare)
        self.pause_ref = image.ref
        if self._daemon is None or self._daemon.spec != spec:
            self._daemon = Daemon(spec)
        await self._daemon.start(self._ready, self._settings.node.engine_start_timeout_s)
        # Imported and labelled are two steps; the file says that both were done, in the root that has the image.
        done = self._state / "root" / f"{image.ref.replace('/', '-')}.imported"
        if not done.exists() or not await self._has_image(image.ref):
            await import_pause_image(self.socket, image)
            await self._until_seen(image.ref)
            done.touch()

    async def stop(self, grace_s: float = 10.0) -> None:
        """End containerd; shims and containers go on. Not running: no error."""
        # It may run though its package is gone: the pid file finds it.
        program = Path(shutil.which("containerd") or "/usr/bin/containerd")
        daemon = self._daemon or Daemon(self._spec(program, ""))
        await daemon.stop(grace_s)

    async def watch(self) -> None:
        """Return when containerd has died."""
        if self._daemon is not None:
            await self._daemon.watch()

    def allow_plain_http(self, host: str) -> None:
        """Have pulls from this registry (host or host:port) go without TLS; containerd reads the file at each pull."""
        folder = self._state / "certs.d" / host
        folder.mkdir(parents=True, exist_ok=True)
        _write_if_other(folder / "hosts.toml", hosts_toml(host))

    # inner

    def _program(self) -> Path:
        program = shutil.which("containerd")
        if program is None:
            raise MissingProgram(
                "containerd is not installed", next_step="Run `make setup`, or `apt-get install containerd`."
            )
        return Path(program)

    def _spec(self, program: Path, fingerprint: str) -> DaemonSpec:
        return DaemonSpec(
            name="containerd",
            argv=(str(program), "--config", str(self._state / "config.toml")),
            pidfile=self._settings.node_run / "containerd.pid",
            logfile=self.logfile,
            fingerprint=fingerprint,
        )

    def _prepare(self) -> tuple[DaemonSpec, PauseImage]:
        settings, run = self._settings, self._settings.node_run
        if len(str(self.socket) + ".ttrpc") > _SUN_PATH_MAX:
            raise InvalidConfig(f"run_dir {settings.run_dir} is too long: a unix socket's path has at most 107 bytes")
        program = self._program()
        text, self.version = containerd_version(program)
        cni_bin = next((d for d in CNI_BIN_DIRS if all((d / name).exists() for name in _CNI_PLUGINS)), None)
        if cni_bin is None:
            where = " or ".join(str(d) for d in CNI_BIN_DIRS)
            raise MissingProgram(f"no CNI plugins ({', '.join(_CNI_PLUGINS)}) in {where}: containernetworking-plugins")
        if shutil.which("runc") is None:
            raise MissingProgram("runc is not installed", next_step="Run `make setup`, or `apt-get install runc`.")
        self.tools_dir = ensure_tools(settings.node_state / "tools")
        image = pause_image(self.tools_dir)
        certs = self._state / "certs.d"
        config = EngineConfig(
            root=self._state / "root",
            state=run / "containerd",
            socket=self.socket,
            temp=run / "containerd-tmp",
            runc_root=run / "runc",
            snapshots=self._snapshots,
            cni_bin=cni_bin,
            cni_conf=self.cni_conf_dir,
            certs=certs,
            sandbox_image=image.ref,
            apparmor=_apparmor(),
            shim_sockets=run / "s",
        )
        if not SHIM_PARENT.is_dir():
            SHIM_PARENT.mkdir(mode=0o711, parents=True, exist_ok=True)
            SHIM_PARENT.chmod(0o711)
        for folder in (config.root, config.state, config.temp, config.runc_root, self._snapshots, self.cni_conf_dir):
            folder.mkdir(mode=0o711, parents=True, exist_ok=True)
        self._write_certs(certs)
        rendered = render_config(config, self.version)
        _write_if_other(self._state / "config.toml", rendered)
        faults.point("containerd.configured")
        return self._spec(program, hashlib.sha256(f"{text}\n{rendered}".encode()).hexdigest()[:16]), image

    def _write_certs(self, certs: Path) -> None:
        """One hosts.toml a registry that speaks plain http; those no longer in the settings go.

        Loopback without an entry here is tried without TLS by containerd itself, whatever the port.
        """
        port = self._settings.registry.port
        wanted = {f"127.0.0.1:{port}", f"localhost:{port}", *self._settings.registry.plain_http}
        certs.mkdir(parents=True, exist_ok=True)
        for folder in certs.iterdir():
            if folder.name not in wanted:
                shutil.rmtree(folder)
        for host in wanted:
            if not re.fullmatch(r"[A-Za-z0-9.\-\[\]]+(:\d+)?", host) or host.startswith("."):
                raise InvalidConfig(f"[registry] plain_http: {host!r} is not a host or host:port")
            self.allow_plain_http(host)

    async def _ready(self) -> bool:
        if not self.socket.exists():
            return False
        # Status is answered only when CRI has recovered its containers; Version is answered earlier.
        return bool(await self._call("/runtime.v1.RuntimeService/Status", b""))

    async def _has_image(self, ref: str) -> bool:
        name = ref.encode()
        spec = b"\x0a" + bytes([len(name)]) + name  # ImageSpec{1: image}
        request = b"\x0a" + bytes([len(spec)]) + spec  # ImageStatusRequest{1: ImageSpec}
        return bool(await self._call("/runtime.v1.ImageService/ImageStatus", request))

    async def _until_seen(self, ref: str) -> None:
        """CRI's own image store follows containerd's events, a moment later. Raises EngineTimeout."""
        for _ in range(2000):
            if await self._has_image(ref):
                return
            await asyncio.sleep(0.005)
        raise EngineTimeout(f"containerd imported {ref}, CRI does not see it")

    async def _call(self, method: str, request: bytes) -> bytes:
        """One CRI call in wire form: two messages of one field do not need generated code. Raises EngineUnreachable."""
        # Channels share their connections, and the second's pause after a refused one, unless told otherwise.
        options = (("grpc.use_local_subchannel_pool", 1),)
        async with grpc.aio.insecure_channel(f"unix:{self.socket}", options=options) as channel:
            try:
                call = channel.unary_unary(method, request_serializer=None, response_deserializer=None)
                answer = await call(request, timeout=_CRI_CALL_S)
            except grpc.aio.AioRpcError as error:
                kind = EngineTimeout if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED else EngineUnreachable
                raise kind(f"containerd: {method}: {error.details()}") from error
        return bytes(answer)


def _apparmor() -> bool:
    try:
        enabled = Path("/sys/module/apparmor/parameters/enabled").read_text().startswith("Y")
    except OSError:
        return False
    return enabled and shutil.which("apparmor_parser") is not None


def _write_if_other(path: Path, text: str) -> None:
    """Write by rename, and only what is new."""
    if path.is_file() and path.read_text() == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text)
    beside.rename(path)
