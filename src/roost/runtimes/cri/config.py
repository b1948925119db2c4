"""Everything the CRI runtime must be told; a frozen value, made by the node from its settings."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from roost.runtimes.cri.volumes import VolumeStore
from roost.runtimes.protocol import Limits


@dataclass(frozen=True)
class CriConfig:
    socket: Path
    """Unix socket of containerd: CRI and containerd's own API answer there."""
    run_dir: Path
    """FIFOs of execs and temporary mounts; on this host, emptied by a reboot."""
    log_dir: Path
    """`<container>/<start>.log`, in CRI's log format."""
    tools_dir: Path
    """The tools tree on this host, mounted read-only at TOOLS_DIR."""
    volumes: VolumeStore
    namespace: str = "k8s.io"
    """containerd's namespace of the objects that CRI makes."""
    cgroup_parent: str = "/roost"
    """Parent of the containers' cgroups: each lies in `<cgroup_parent>/<container>`."""
    snapshotter: str = "overlayfs"
    runtime_handler: str = ""
    """Name of the engine's runtime (gVisor, Kata); empty: its default."""
    dns_servers: tuple[str, ...] = ()
    """Name servers of the containers; empty: the host's resolv.conf as the engine copies it."""
    python: str = sys.executable
    """Interpreter for tools."""
    hidden_images: frozenset[str] = frozenset()
    """References that are the engine's own (the pause image) and not listed."""
    pull_timeout_s: float = 1800.0
    pull_progress_timeout_s: float = 60.0
    """A pull that fetches nothing for so long is given up."""
    call_timeout_s: float = 60.0
    """Bound of one call to the engine that has work to do (a sandbox, a container)."""
    network_ready: Callable[[], Awaitable[None]] | None = None
    """Called when a sandbox has its network and nothing runs in it yet (to take its link into the node's policy)."""
    prepare_cgroup: Callable[[str, Limits], None] | None = None
    """Called (blocking, in a thread) with `<cgroup_parent>/<container>` before a sandbox is made there."""
    remove_cgroup: Callable[[str], None] | None = None
    """Called likewise after the sandbox is gone; a group that is not there must be no error."""

    def hosts(self, container: str) -> Path:
        """The file that is the container's /etc/hosts."""
        return self.run_dir / "hosts" / container

    def cgroup(self, container: str) -> str:
        return f"{self.cgroup_parent.rstrip('/')}/{container}"
