"""A container of ours as CRI's messages.  Pure: no engine, no files.

One pod per container.  Sandbox and container carry the caller's labels and one of ours, LABEL_CONTAINER, by which both
are found again whoever made them.  The sandbox's `attempt` is the number of the start, so that a new one may be made
while the engine still forgets the old one: names are reserved as name_namespace_uid_attempt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from roost.runtimes.cri.config import CriConfig
from roost.runtimes.cri.proto import cri_pb2
from roost.runtimes.protocol import LABEL_START, TOOLS_DIR, ContainerId, ContainerSpec, VolumeName

LABEL_CONTAINER = "roost.dev/container"
POD_NAMESPACE = "roost"
CONTAINER_NAME = "workspace"
PID1 = (f"{TOOLS_DIR}/bin/tini", "--", f"{TOOLS_DIR}/bin/busybox", "sh", f"{TOOLS_DIR}/bin/keepalive")
_CPU_PERIOD_US = 100_000
_CPU_QUOTA_MIN_US = 1000
"""The kernel's least quota (kernel/sched/core.c, min_cfs_quota_period)."""


def own_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """The caller's labels of a container, ours taken away."""
    return {key: value for key, value in labels.items() if key != LABEL_CONTAINER}


def log_name(labels: Mapping[str, str]) -> str:
    return f"{labels.get(LABEL_START, '0')}.log"


def sandbox_config(config: CriConfig, spec: ContainerSpec) -> cri_pb2.PodSandboxConfig:
    start = spec.labels.get(LABEL_START, "0")
    pod = cri_pb2.PodSandboxConfig(
        metadata=cri_pb2.PodSandboxMetadata(
            name=spec.container,
            uid=spec.container,
            namespace=POD_NAMESPACE,
            attempt=int(start) & 0xFFFFFFFF if start.isdecimal() else 0,
        ),
        hostname=spec.hostname,
        log_directory=str(config.log_dir / spec.container),
        labels={**spec.labels, LABEL_CONTAINER: spec.container},
        linux=cri_pb2.LinuxPodSandboxConfig(
            cgroup_parent=config.cgroup(spec.container),
            security_context=cri_pb2.LinuxSandboxSecurityContext(
                namespace_options=_namespaces(),
                seccomp=cri_pb2.SecurityProfile(profile_type=cri_pb2.SecurityProfile.RuntimeDefault),
            ),
        ),
    )
    if config.dns_servers:
        pod.dns_config.servers.extend(config.dns_servers)
    return pod


def container_config(
    config: CriConfig, spec: ContainerSpec, volume_paths: Mapping[VolumeName, Path]
) -> cri_pb2.ContainerConfig:
    mounts = [
        cri_pb2.Mount(container_path=TOOLS_DIR, host_path=str(config.tools_dir), readonly=True),
        # Left out, containerd would put a copy of the host's own file there: its names, and not the container's.
        cri_pb2.Mount(container_path="/etc/hosts", host_path=str(config.hosts(spec.container))),
    ]
    for mount in spec.mounts:
        mounts.append(
            cri_pb2.Mount(
                container_path=mount.target, host_path=str(volume_paths[mount.volume]), readonly=mount.read_only
            )
        )
    return cri_pb2.ContainerConfig(
        metadata=cri_pb2.ContainerMetadata(name=CONTAINER_NAME),
        image=cri_pb2.ImageSpec(image=spec.image.digest),
        command=PID1,
        working_dir=spec.working_dir,
        envs=[cri_pb2.KeyValue(key=key, value=value.encode()) for key, value in spec.env.items()],
        mounts=mounts,
        labels={**spec.labels, LABEL_CONTAINER: spec.container},
        log_path=log_name(spec.labels),
        linux=cri_pb2.LinuxContainerConfig(resources=_resources(spec), security_context=_security(spec)),
    )


def hosts_file(spec: ContainerSpec) -> str:
    """/etc/hosts of a container: itself by name, as Debian has it; sudo and others look themselves up."""
    names = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n"
    return f"{names}127.0.1.1 {spec.hostname}\n" if spec.hostname else names


def name_of(labels: Mapping[str, str]) -> ContainerId | None:
    name = labels.get(LABEL_CONTAINER)
    return ContainerId(name) if name else None


def _namespaces() -> cri_pb2.NamespaceOption:
    # The pid namespace is the container's own: tini is PID 1, and all end when it ends.
    return cri_pb2.NamespaceOption(network=cri_pb2.POD, pid=cri_pb2.CONTAINER, ipc=cri_pb2.POD)


def _resources(spec: ContainerSpec) -> cri_pb2.LinuxContainerResources:
    resources = cri_pb2.LinuxContainerResources()
    if spec.limits.cpus > 0:
        resources.cpu_period = _CPU_PERIOD_US
        resources.cpu_quota = max(_CPU_QUOTA_MIN_US, math.ceil(spec.limits.cpus * _CPU_PERIOD_US))
    if spec.limits.memory_bytes > 0:
        resources.memory_limit_in_bytes = spec.limits.memory_bytes
    return resources


def _security(spec: ContainerSpec) -> cri_pb2.LinuxContainerSecurityContext:
    context = cri_pb2.LinuxContainerSecurityContext(
        namespace_options=_namespaces(),
        run_as_user=cri_pb2.Int64Value(value=spec.user.uid),
        run_as_group=cri_pb2.Int64Value(value=spec.user.gid),
        supplemental_groups=spec.user.groups,
        no_new_privs=not spec.allow_sudo,
        masked_paths=MASKED_PATHS,
        readonly_paths=READONLY_PATHS,
        seccomp=cri_pb2.SecurityProfile(profile_type=cri_pb2.SecurityProfile.RuntimeDefault),
    )
    if not spec.allow_sudo:
        context.capabilities.drop_capabilities.append("ALL")
    return context


# CRI takes an empty list as "mask nothing": who wants the usual defence must name it (kubelet does, from
# pkg/securitycontext/util.go; docker and podman have the same lists).
MASKED_PATHS = (
    "/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
    "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware",
    "/sys/devices/virtual/powercap",
)  # fmt: skip
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
