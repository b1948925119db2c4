"""Containers through containerd: CRI for their life, containerd's own API for exec and image views."""

import os

# gRPC's core hangs handlers on fork() that stop its pollers; a child that is about to exec (git, a tool) then dies in them
# with "next_worker->state == KICKED" when another thread is in the core.  We never use gRPC in a forked child, so they
# are off; core reads this when the first channel is made.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from roost.runtimes.cri.auth import docker_auth
from roost.runtimes.cri.config import CriConfig
from roost.runtimes.cri.runtime import CriRuntime
from roost.runtimes.cri.volumes import VolumeStore

__all__ = ["CriConfig", "CriRuntime", "VolumeStore", "docker_auth"]
