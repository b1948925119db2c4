"""What the kernel can do: its version, cgroups, btrfs with quotas, and the ways of loading an image lazily."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from roost.errors import MissingFeature
from roost.linux import features
from roost.linux.btrfs import is_btrfs, kernel_has_simple_quotas
from roost.linux.cgroup import find_hierarchies
from roost.node.doctor.check import Check, existing, have
from roost.settings import Settings


def kernel(settings: Settings) -> Iterable[Check]:
    """Its version, overlayfs, and scheduling in real time."""
    version = features.kernel_version()
    text = os.uname().release
    meaning = "5.10 starts workspaces; 6.7 limits HOMEs by btrfs simple quotas; 6.14 loads images lazily by fanotify"
    if version >= (6, 7):
        yield Check("kernel", "have", text, meaning, required=True)
    elif version >= (5, 10):
        yield Check("kernel", "warn", text, meaning, "a newer kernel (Debian: `linux-image-amd64` of backports)", True)
    else:
        yield Check("kernel", "lack", text, meaning, "use 5.10 or newer", True)
    overlay = features.file_system("overlay")
    remedy = "" if overlay.works else "use a kernel with overlayfs (all of Debian's and Ubuntu's have it)"
    yield Check("overlayfs", have(overlay.works), overlay.detail, "containers' root file systems", remedy, True)
    real_time = features.real_time_scheduling()
    yield Check(
        "real-time scheduling",
        "have" if real_time.works else "warn",
        f"SCHED_FIFO: {real_time.detail}",
        "keeps the pause of a live commit short; without it pauses are longer under load",
        "" if real_time.works else "run the node as root in the root `cpu` group, or give its group a real-time share",
    )


def cgroups(settings: Settings) -> Iterable[Check]:
    """Which hierarchies and controllers there are, and what can freeze."""
    meaning = "limits of CPU, memory and processes; runc needs them"
    remedy = "mount one: `mount -t cgroup2 none /sys/fs/cgroup`, or boot with systemd"
    try:
        found = find_hierarchies()
    except MissingFeature as error:
        yield Check("cgroups", "lack", error.message, meaning, remedy, True)
        return
    modern = [entry for entry in found if entry.version == 2]
    legacy = [entry for entry in found if entry.version == 1]
    kind = "hybrid (v1 and v2)" if modern and legacy else "v2" if modern else "v1"
    controllers = frozenset().union(*(entry.controllers for entry in found))
    lacking = sorted({"cpu", "memory", "pids"} - controllers)
    detail = f"{kind}: {', '.join(sorted(controllers))}"
    yield Check(
        "cgroups",
        "lack" if "pids" in lacking or "memory" in lacking else "warn" if lacking else "have",
        f"{detail}; lacking {', '.join(lacking)}" if lacking else detail,
        meaning,
        f"enable {', '.join(lacking)} (kernel command line, or cgroup.subtree_control of the parent)"
        if lacking
        else "",
        True,
    )
    freezer = "v2" if modern else "v1" if "freezer" in controllers else ""
    yield Check(
        "freezer",
        have(bool(freezer)),
        f"cgroup {freezer}" if freezer else "none",
        "holds a workspace still while it is committed",
        "" if freezer else "mount cgroup2, or the v1 freezer",
    )


def btrfs(settings: Settings) -> Iterable[Check]:
    """btrfs itself, its simple quotas, and loop devices for a pool in a file."""
    probe = features.file_system("btrfs")
    folder = existing(settings.state_dir)
    if probe.works and is_btrfs(folder):
        detail = f"{folder} is on it: the pool is native"
    elif probe.works:
        detail = f"{probe.detail}; {folder} is not on it: the pool is a loop file"
    else:
        detail = probe.detail
    remedy = "" if probe.works else "use a kernel with btrfs (all of Debian's and Ubuntu's have it)"
    yield Check("btrfs", have(probe.works), detail, "HOMEs and writable layers, with snapshots", remedy, True)
    loaded = "btrfs" in features.file_systems()
    quotas = kernel_has_simple_quotas() if loaded else features.kernel_version() >= (6, 7)
    yield Check(
        "simple quotas",
        "have" if quotas else "warn",
        "the kernel has them" if quotas else "the kernel is older than 6.7",
        "the limit of a HOME is enforced; without them it is measured only",
        "" if quotas else "use kernel 6.7 or newer",
    )
    loop = Path("/dev/loop-control").exists()
    native = probe.works and is_btrfs(folder)
    yield Check(
        "loop devices",
        have(loop),
        "/dev/loop-control" if loop else "no /dev/loop-control",
        "the pool where the state directory is not on btrfs, and mounted images",
        "" if loop else "`modprobe loop`",
        not native,
    )


def lazy(settings: Settings) -> Iterable[Check]:
    """What can load an image while it is in use: fanotify, EROFS, FUSE, cachefiles."""
    folder = existing(settings.state_dir)
    fanotify = features.fanotify_pre_content(folder)
    yield Check(
        "fanotify pre-content",
        have(fanotify.works),
        fanotify.detail,
        "images load lazily at full speed; without it by FUSE, or whole",
        "" if fanotify.works else "use kernel 6.14 or newer, state directory on ext4, xfs or btrfs, as root",
    )
    erofs = features.file_system("erofs")
    yield Check(
        "EROFS",
        have(erofs.works),
        erofs.detail,
        "images that load lazily are mounted by it",
        "" if erofs.works else "use a kernel with EROFS (`modprobe erofs`; Debian: linux-image of the distribution)",
    )
    fuse = Path("/dev/fuse").exists()
    yield Check(
        "FUSE",
        have(fuse),
        "/dev/fuse" if fuse else "no /dev/fuse",
        "lazy loading where the kernel has no pre-content events",
        "" if fuse else "`modprobe fuse`",
    )
    cachefiles = features.cachefiles_on_demand()
    yield Check(
        "cachefiles on demand",
        have(cachefiles.works),
        cachefiles.detail,
        "another way of lazy loading, for kernels 5.19 to 7.1; not needed where fanotify works",
        "" if cachefiles.works or fanotify.works else "a kernel with CONFIG_CACHEFILES_ONDEMAND, or 6.14 and newer",
    )
