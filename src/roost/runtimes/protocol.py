"""The one protocol that workspaces know of container engines.

Nothing here assumes a local disk, one engine, or that the engine runs where we do: files go in and out through
`exec`, and a program that must see an image's tree and a volume as directories is handed to `run_tool`, which runs it
wherever both can be mounted (this host for `cri`, a helper container for Docker, an init container on Kubernetes).

Every method is idempotent: doing again what is done already succeeds and changes nothing.  Every method raises only
errors of `roost.errors`; the ones named in its docstring are those a caller may want to tell apart, EngineUnreachable,
EngineTimeout and EngineFailed can come from each.  Cancelling a call leaves nothing half-made that a second call would
not complete or remove.  `tests/conformance` is the executable form of this text.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType, Protocol

ContainerId = NewType("ContainerId", str)
"""Name of a workspace's container, `roost-<workspace id>`; the engine's own ids stay inside the runtime."""
VolumeName = NewType("VolumeName", str)
"""Name of a volume, `roost-<workspace id>-home`."""
ImageRef = NewType("ImageRef", str)
"""An image reference as docker writes it, normalized (registry, tag or digest explicit)."""
ImageDigest = NewType("ImageDigest", str)
"""`sha256:<hex>` of the image's configuration, the identity of what is run."""

TOOLS_DIR = "/opt/roost"
"""Where the read-only tools tree is mounted in every container: bin/tini, bin/busybox (both static), bin/keepalive."""

LABEL_WORKSPACE = "roost.dev/workspace"
LABEL_TENANT = "roost.dev/tenant"
LABEL_OWNER = "roost.dev/owner"
LABEL_LAYOUT = "roost.dev/layout"
LABEL_START = "roost.dev/start"
"""The number of the start a container was made for (decimal)."""


@dataclass(frozen=True)
class RegistryAuth:
    """Credentials for one pull; never printed."""

    username: str
    password: str = field(repr=False)


@dataclass(frozen=True)
class ImageInfo:
    """An image that is present and unpacked."""

    ref: ImageRef
    digest: ImageDigest
    size_bytes: int
    env: tuple[str, ...] = ()
    """`NAME=value`, in the image's order."""
    user: str = ""
    """The configuration's User as it stands: name, uid, name:group or uid:gid; empty: root."""
    working_dir: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ContainerUser:
    """Whom processes in a container run as; resolved from the image, never from the host."""

    uid: int
    gid: int
    name: str
    """Name in the image's passwd, or the decimal uid where it has none."""
    home: str
    shell: str = ""
    groups: tuple[int, ...] = ()
    """Supplementary group ids."""


@dataclass(frozen=True)
class Limits:
    """Zero means no limit."""

    cpus: float = 0.0
    memory_bytes: int = 0
    pids: int = 0


@dataclass(frozen=True)
class VolumeMount:
    volume: VolumeName
    target: str
    """Absolute path in the container."""
    read_only: bool = False


@dataclass(frozen=True)
class ContainerSpec:
    """Everything about a container to be.  PID 1 is always tini from TOOLS_DIR with the keep-alive under it."""

    container: ContainerId
    image: ImageInfo
    user: ContainerUser
    hostname: str
    env: Mapping[str, str] = field(default_factory=dict)
    """In addition to the image's; HOME, USER, WORKSPACE_DIR are the caller's to set."""
    working_dir: str = "/"
    mounts: tuple[VolumeMount, ...] = ()
    limits: Limits = Limits()
    labels: Mapping[str, str] = field(default_factory=dict)
    allow_sudo: bool = True
    """False: no_new_privs and no capabilities."""


class ContainerState(StrEnum):
    created = "created"
    running = "running"
    exited = "exited"
    unknown = "unknown"
    """The engine cannot say (as after a crash of its helper); delete and create again."""


@dataclass(frozen=True)
class ContainerStatus:
    container: ContainerId
    state: ContainerState
    labels: Mapping[str, str]
    exit_code: int | None = None
    """Of PID 1, when exited; 128+n for a signal."""
    reason: str = ""
    """The engine's word for it, such as OOMKilled."""
    started_at: float | None = None
    """Seconds since the epoch."""


@dataclass(frozen=True)
class ContainerStats:
    cpu_seconds: float
    memory_bytes: int
    pids: int


@dataclass(frozen=True)
class VolumeInfo:
    name: VolumeName
    used_bytes: int | None
    limit_bytes: int
    """0: none, or not enforced."""
    trashed_at: float | None = None
    """Seconds since the epoch; None: in use."""


@dataclass(frozen=True)
class TerminalSize:
    columns: int
    rows: int


@dataclass(frozen=True)
class ExecSpec:
    argv: tuple[str, ...]
    user: ContainerUser
    cwd: str
    env: Mapping[str, str] = field(default_factory=dict)
    """The whole environment added to the container's own; PATH comes from there when not given."""
    tty: TerminalSize | None = None
    """A terminal of this size, else three pipes."""
    stdin: bool = False
    """False: stdin is empty (at its end) from the start."""


class Channel(StrEnum):
    stdout = "stdout"
    stderr = "stderr"


class ExecSession(Protocol):
    """One running command.  Close it always; closing ends a command that still runs."""

    async def write(self, data: bytes) -> None:
        """Send to stdin; returns when the command's pipe took it (backpressure).

        A command that no longer reads: no error.
        """

    async def close_stdin(self) -> None:
        """The end of stdin: the command reads EOF after the last byte sent."""

    def output(self) -> AsyncIterator[tuple[Channel, bytes]]:
        """Output as it comes, ended when the command and all who hold its pipes are done. A terminal has stdout only.

        When something the command left behind goes on holding its pipes (a daemon), output ends shortly after the
        command, once no more comes.
        """

    async def resize(self, size: TerminalSize) -> None: ...

    async def signal(self, number: int) -> None:
        """Send a signal to the command; no error if it has just ended."""

    async def wait(self) -> int:
        """Exit code of the command: 0-255, 128+n for signal n. Can be called any number of times."""

    async def close(self) -> None:
        """End the command if it runs (SIGKILL) and free everything."""


@dataclass(frozen=True)
class LogLine:
    at: float
    """Seconds since the epoch."""
    channel: Channel
    text: str
    """Without the line end; undecodable bytes replaced."""


@dataclass(frozen=True)
class Tool:
    """A Python program of ours that sees an image and a volume as directories.

    Run as `python -m <module> <args…>`; `{image}` in an argument becomes the path of the image's root file system
    (read-only), `{volume}` the path of the volume's root (read-write).  It prints one JSON document on stdout.
    """

    module: str
    args: tuple[str, ...]


@dataclass(frozen=True)
class ToolResult:
    exit_code: int
    stdout: bytes
    stderr: bytes


@dataclass(frozen=True)
class RuntimeEvent:
    """Something happened to a container of ours; look at its status."""

    container: ContainerId


class Runtime(Protocol):
    name: str

    async def check(self) -> None:
        """Return if the engine can be used; else raise EngineUnreachable or MissingFeature."""

    async def close(self) -> None:
        """Free connections; containers go on."""

    # images

    async def image(self, ref: ImageRef) -> ImageInfo | None:
        """The image if it is here and unpacked."""

    async def images(self) -> list[ImageInfo]:
        """All images here, one per reference."""

    async def pull(self, ref: ImageRef, auth: RegistryAuth | None = None) -> ImageInfo:
        """Fetch and unpack; always asks the registry, layers that are here are not fetched again.

        Raises ImageNotFound, ImageAuth, RegistryUnreachable, ImageInvalid, EngineTimeout.
        """

    # volumes

    async def create_volume(self, name: VolumeName, limit_bytes: int, labels: Mapping[str, str]) -> bool:
        """Make an empty volume (True), or adjust the limit of the one that is there (False).

        Raises PoolFull, HostDiskFull.
        """

    async def volumes(self) -> list[VolumeInfo]:
        """All volumes of ours, the trashed ones too."""

    async def trash_volume(self, name: VolumeName) -> None:
        """Put a volume aside; nothing is lost, `restore_volume` brings it back. An absent one: no error."""

    async def restore_volume(self, name: VolumeName) -> None:
        """Bring a trashed volume back. Raises VolumeNotFound."""

    async def purge_volume(self, name: VolumeName) -> None:
        """Destroy a *trashed* volume; one that is in use is left alone. An absent one: no error."""

    async def run_tool(
        self, tool: Tool, image: ImageInfo, volume: VolumeName | None = None, *, timeout_s: float = 600.0
    ) -> ToolResult:
        """Run a tool beside an image and a volume. Raises VolumeNotFound, ImageNotFound, EngineTimeout."""

    # containers

    async def create(self, spec: ContainerSpec) -> None:
        """Make the container, not started. One of the same name is there: AlreadyExists is not an error if its
        labels are the same, else EngineFailed: delete it first."""

    async def start(self, container: ContainerId) -> None:
        """Start it; returns when PID 1 runs. Running: no error. Raises ContainerNotFound.

        One that has ended is not started again (EngineFailed): delete it and create it for the next start.
        """

    async def stop(self, container: ContainerId, grace_s: float) -> None:
        """SIGTERM, after `grace_s` SIGKILL; returns when it is down. Absent or down: no error."""

    async def delete(self, container: ContainerId) -> None:
        """Kill and remove container and network; its log file stays. Absent: no error."""

    async def status(self, container: ContainerId) -> ContainerStatus | None: ...

    async def list(self) -> list[ContainerStatus]:
        """All containers of ours on this engine."""

    async def exec(self, container: ContainerId, spec: ExecSpec) -> ExecSession:
        """Start a command.

        Raises ContainerNotFound, WorkspaceNotRunning, ExecNotFound, ExecNotExecutable, ExecFailed.
        """

    def logs(self, container: ContainerId, *, follow: bool = False, previous: bool = False) -> AsyncIterator[LogLine]:
        """Output of PID 1, oldest first, of the present container or the one before it. Raises ContainerNotFound."""

    async def stats(self, container: ContainerId) -> ContainerStats:
        """Raises ContainerNotFound, WorkspaceNotRunning."""

    def events(self) -> AsyncIterator[RuntimeEvent]:
        """Changes of our containers from now on; ends with EngineUnreachable when the engine goes away."""
