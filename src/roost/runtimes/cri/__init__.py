"""Containers through containerd: CRI for their life, containerd's own API for exec and image views."""

from roost.runtimes.cri.auth import docker_auth
from roost.runtimes.cri.config import CriConfig
from roost.runtimes.cri.runtime import CriRuntime
from roost.runtimes.cri.volumes import VolumeStore

__all__ = ["CriConfig", "CriRuntime", "VolumeStore", "docker_auth"]
