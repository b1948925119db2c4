"""What this kernel can do, found by trying it where trying leaves nothing behind, else by what it says of itself.

A version number alone proves nothing: distributions switch features off and backport others.
"""

from __future__ import annotations

import ctypes
import errno
import gzip
import os
import platform
import re
import threading
from dataclasses import dataclass
from pathlib import Path

from roost.linux._libc import libc

FAN_CLASS_PRE_CONTENT = 0x8
FAN_CLOEXEC = 0x1
FAN_UNLIMITED_QUEUE = 0x10
FAN_PRE_ACCESS = 0x0010_0000
FAN_MARK_ADD = 0x1
AT_FDCWD = -100

Version = tuple[int, int]


@dataclass(frozen=True)
class Probe:
    """The outcome of one try."""

    works: bool
    detail: str


def kernel_version() -> Version:
    """(major, minor) of the running kernel; (0, 0) when its name says none."""
    found = re.match(r"(\d+)\.(\d+)", platform.release())
    return (int(found[1]), int(found[2])) if found else (0, 0)


def file_systems() -> frozenset[str]:
    """File systems the kernel has now; modules not loaded are missing from it."""
    return frozenset(line.split()[-1] for line in Path("/proc/filesystems").read_text().splitlines() if line.split())


def has_module(name: str) -> bool:
    """Whether a module of that name could be loaded, or is built in, by the indexes depmod(8) left."""
    folder = Path("/lib/modules") / platform.release()
    wanted = re.compile(rf"/{re.escape(name).replace('_', '[_-]')}\.ko")
    for index in ("modules.dep", "modules.builtin"):
        try:
            if wanted.search((folder / index).read_text(errors="replace")):
                return True
        except OSError:
            continue
    return False


def file_system(name: str) -> Probe:
    """Whether a file system can be mounted: registered, or a module for it is there."""
    if name in file_systems():
        return Probe(True, "in the kernel")
    if has_module(name):
        return Probe(True, "as a module, loaded when it is needed")
    return Probe(False, "neither in the kernel nor as a module")


def fanotify_pre_content(folder: Path) -> Probe:
    """Whether reads of files in `folder` can be answered before they happen (Linux 6.14; ext4, xfs, btrfs): a group of
    that class is made and a mark for it set on the folder, and both go with the descriptor."""
    group = libc.fanotify_init(
        FAN_CLASS_PRE_CONTENT | FAN_CLOEXEC | FAN_UNLIMITED_QUEUE, os.O_RDWR | os.O_CLOEXEC | os.O_LARGEFILE
    )
    if group < 0:
        number = ctypes.get_errno()
        why = "needs root" if number == errno.EPERM else os.strerror(number)
        return Probe(False, f"fanotify_init: {why}")
    try:
        mark = libc.fanotify_mark(group, FAN_MARK_ADD, ctypes.c_uint64(FAN_PRE_ACCESS), AT_FDCWD, os.fsencode(folder))
        if mark < 0:
            number = ctypes.get_errno()
            if number == errno.EINVAL:
                return Probe(False, "the kernel knows no pre-content events")
            return Probe(False, f"not on the file system of {folder}: {os.strerror(number)}")
        return Probe(True, f"works on the file system of {folder}")
    finally:
        os.close(group)


def cachefiles_on_demand() -> Probe:
    """Whether EROFS can ask a daemon through cachefiles (5.19 to 7.1, where configured).  /dev/cachefiles may be open
    once on the host, so it is not opened: the kernel's configuration decides."""
    configured = kernel_option("CONFIG_CACHEFILES_ONDEMAND")
    if configured is None:
        if not Path("/dev/cachefiles").exists():
            return Probe(False, "no /dev/cachefiles")
        return Probe(False, "cachefiles is there; its on-demand mode is not known (no kernel configuration to read)")
    return Probe(configured, "configured" if configured else "not configured in this kernel")


def kernel_option(name: str) -> bool | None:
    """Whether the running kernel was built with an option; None where it does not say."""
    text = ""
    try:
        text = gzip.decompress(Path("/proc/config.gz").read_bytes()).decode()
    except OSError:
        try:
            text = Path(f"/boot/config-{platform.release()}").read_text()
        except OSError:
            return None
    return re.search(rf"^{name}=[ym]$", text, re.MULTILINE) is not None


def real_time_scheduling() -> Probe:
    """Whether a thread of ours gets SCHED_FIFO; tried on one that ends at once, so that nobody keeps the class.

    In v1 `cpu` groups without a real-time share the kernel says EPERM even to root (RT_GROUP_SCHED).
    """
    outcome: list[Probe] = []

    def ask() -> None:
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))  # 0: the calling thread (sched_setscheduler(2))
        except OSError as error:
            outcome.append(Probe(False, os.strerror(error.errno or 0)))
        else:
            outcome.append(Probe(True, "granted"))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return outcome[0]


def ip_forward() -> bool:
    """Whether the host forwards IPv4."""
    return Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() == "1"
