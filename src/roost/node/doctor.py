"""`roost doctor`: what this host has and lacks, what that means for roost, and how to get it.

Everything is looked at where it stands, in parallel, within a second, and nothing is changed: no server, no node and no
engine needs to run.  A check that cannot be made is a `warn` with the reason, never a crash of the whole.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from roost.errors import MissingFeature
from roost.linux import features
from roost.linux.btrfs import is_btrfs, kernel_has_simple_quotas
from roost.linux.cgroup import find_hierarchies
from roost.linux.process import listener
from roost.settings import Settings

Status = Literal["have", "lack", "warn"]

PROGRAM_TIMEOUT_S = 2.0
_ANSWER_S = 0.3
_SEARCH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SETUP = "`make setup` installs it"


@dataclass(frozen=True)
class Check:
    """One thing looked at."""

    name: str
    status: Status
    """have: there; lack: not there; warn: there with a limit, or not to be found out."""
    detail: str
    """What was seen."""
    meaning: str
    """What roost does with it."""
    remedy: str = ""
    """How to get it; empty when there is nothing to do."""
    required: bool = False
    """Without it no workspace starts."""


_Probe = Callable[[Settings], Iterable[Check]]


def checks(settings: Settings) -> list[Check]:
    """All checks, in a fixed order; blocks for less than a second."""
    with ThreadPoolExecutor(max_workers=8, thread_name_prefix="doctor") as pool:
        pending = [(probe, pool.submit(_run, probe, settings)) for probe in _PROBES]
        found: list[Check] = []
        for probe, future in pending:
            try:
                found += future.result()
            except OSError as error:
                name = probe.__name__.strip("_").replace("_", " ")
                found.append(Check(name, "warn", f"cannot be looked at: {error}", "not known"))
    return found


def _run(probe: _Probe, settings: Settings) -> list[Check]:
    return list(probe(settings))


def missing(found: Iterable[Check]) -> list[Check]:
    """Those without which no workspace starts."""
    return [check for check in found if check.required and check.status == "lack"]


# --- helpers ------------------------------------------------------------------------------------------------------


def which(program: str) -> str | None:
    """A program on PATH or in the sbin directories, which an ordinary PATH may lack."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:{_SEARCH}")


def _says(*argv: str) -> str:
    """First line of what a program prints; empty when it fails or takes too long."""
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, errors="replace", timeout=PROGRAM_TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else ""


def _version(text: str) -> tuple[int, ...]:
    found = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(part) for part in found.groups() if part) if found else ()


def _program(
    name: str,
    meaning: str,
    package: str,
    *,
    program: str = "",
    ask: tuple[str, ...] = ("--version",),
    required: bool = True,
) -> Check:
    path = which(program or name)
    if path is None:
        remedy = f"{_SETUP}, or `apt-get install {package}`"
        return Check(name, "lack", "not on PATH", meaning, remedy, required)
    text = _says(path, *ask) if ask else ""
    return Check(name, "have", f"{text} ({path})" if text else path, meaning, required=required)


def _existing(path: Path) -> Path:
    """The path, or its nearest ancestor that exists."""
    return next((folder for folder in (path, *path.parents) if folder.exists()), Path("/"))


# --- the host -----------------------------------------------------------------------------------------------------


def _host(settings: Settings) -> Iterable[Check]:
    values: dict[str, str] = {}
    try:
        lines = Path("/etc/os-release").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition("=")
        values[key] = value.strip('"')
    name = values.get("PRETTY_NAME", "unknown")
    least = {"debian": 12, "ubuntu": 24}.get(values.get("ID", ""))
    major = values.get("VERSION_ID", "").partition(".")[0]
    meaning = "`make setup` installs Debian packages; roost is tested on Debian 12+ and Ubuntu 24.04+"
    if least is not None and (not major or int(major) >= least):
        yield Check("distribution", "have", name, meaning)
    else:
        yield Check("distribution", "warn", name, meaning, "use a supported one, or install the programs below by hand")
    root = os.geteuid() == 0
    yield Check(
        "root",
        "have" if root else "lack",
        "this process is root" if root else f"this process is uid {os.geteuid()}",
        "the node mounts, makes cgroups and network namespaces",
        "" if root else "run as root (`sudo roost doctor`); some checks below are blind without",
        True,
    )
    text = ".".join(map(str, sys.version_info[:3]))
    new = sys.version_info >= (3, 11)
    yield Check(
        "python", "have" if new else "lack", f"{text} ({sys.executable})", "roost runs on 3.11 or newer", required=True
    )
    try:
        entry = pwd.getpwnam(settings.server.user)
        yield Check(
            "server user",
            "have",
            f"{settings.server.user} (uid {entry.pw_uid})",
            "the server runs as it",
            required=True,
        )
    except KeyError:
        remedy = f"`make setup` makes it, or `useradd --system --no-create-home {settings.server.user}`"
        yield Check("server user", "lack", f"no user {settings.server.user!r}", "the server runs as it", remedy, True)


def _disk(settings: Settings) -> Iterable[Check]:
    folder = _existing(settings.state_dir)
    free = shutil.disk_usage(folder).free
    needed = settings.pool.reserve_bytes + settings.pool.initial_bytes
    meaning = "workspaces, images and HOMEs lie there; a reserve is never used"
    enough = free > needed
    yield Check(
        "disk",
        "have" if enough else "lack" if free < settings.pool.reserve_bytes else "warn",
        f"{free / (1 << 30):.1f} GiB free in {folder} ({needed / (1 << 30):.1f} wanted)",
        meaning,
        ""
        if enough
        else "free some, or set ROOST_STATE_DIR elsewhere, or lower [pool] initial_bytes and reserve_bytes",
        True,
    )


def _ports(settings: Settings) -> Iterable[Check]:
    for what, port, setting in (
        ("server port", settings.server.port, "[server] port"),
        ("registry port", settings.registry.port, "[registry] port"),
    ):
        found = listener(port)
        meaning = f"the {what.split()[0]} listens on it"
        if found is None:
            yield Check(what, "have", f"{port} is free", meaning, required=True)
        elif _is_ours(found.pid, settings):
            yield Check(what, "have", f"{port} is in use by this roost (pid {found.pid})", meaning, required=True)
        else:
            yield Check(what, "lack", str(found), meaning, f"stop that process, or set another {setting}", True)


def _is_ours(pid: int | None, settings: Settings) -> bool:
    """Whether a process is of this installation: its pid is in our pid files or its command line names our paths."""
    if pid is None:
        return False
    for folder in (settings.server_run, settings.node_run):
        for file in folder.glob("*.pid"):
            try:
                if re.search(rf"\b{pid}\b", file.read_text()):
                    return True
            except OSError:
                continue
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        environment = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    ours = str(settings.state_dir)
    if f"{ours}/" in command:
        return True
    default = ours == "/var/lib/roost" and not any(item.startswith("ROOST_STATE_DIR=") for item in environment)
    return "roost" in command and (default or f"ROOST_STATE_DIR={ours}" in environment)


# --- the kernel ---------------------------------------------------------------------------------------------------


def _kernel(settings: Settings) -> Iterable[Check]:
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
    yield Check("overlayfs", _have(overlay.works), overlay.detail, "containers' root file systems", remedy, True)
    real_time = features.real_time_scheduling()
    yield Check(
        "real-time scheduling",
        "have" if real_time.works else "warn",
        f"SCHED_FIFO: {real_time.detail}",
        "keeps the pause of a live commit short; without it pauses are longer under load",
        "" if real_time.works else "run the node as root in the root `cpu` group, or give its group a real-time share",
    )


def _have(works: bool) -> Status:
    return "have" if works else "lack"


def _cgroups(settings: Settings) -> Iterable[Check]:
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
        _have(bool(freezer)),
        f"cgroup {freezer}" if freezer else "none",
        "holds a workspace still while it is committed",
        "" if freezer else "mount cgroup2, or the v1 freezer",
    )


def _btrfs(settings: Settings) -> Iterable[Check]:
    probe = features.file_system("btrfs")
    folder = _existing(settings.state_dir)
    if probe.works and is_btrfs(folder):
        detail = f"{folder} is on it: the pool is native"
    elif probe.works:
        detail = f"{probe.detail}; {folder} is not on it: the pool is a loop file"
    else:
        detail = probe.detail
    remedy = "" if probe.works else "use a kernel with btrfs (all of Debian's and Ubuntu's have it)"
    yield Check("btrfs", _have(probe.works), detail, "HOMEs and writable layers, with snapshots", remedy, True)
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
        _have(loop),
        "/dev/loop-control" if loop else "no /dev/loop-control",
        "the pool where the state directory is not on btrfs, and mounted images",
        "" if loop else "`modprobe loop`",
        not native,
    )


def _lazy(settings: Settings) -> Iterable[Check]:
    folder = _existing(settings.state_dir)
    fanotify = features.fanotify_pre_content(folder)
    yield Check(
        "fanotify pre-content",
        _have(fanotify.works),
        fanotify.detail,
        "images load lazily at full speed; without it by FUSE, or whole",
        "" if fanotify.works else "use kernel 6.14 or newer, state directory on ext4, xfs or btrfs, as root",
    )
    erofs = features.file_system("erofs")
    yield Check(
        "EROFS",
        _have(erofs.works),
        erofs.detail,
        "images that load lazily are mounted by it",
        "" if erofs.works else "use a kernel with EROFS (`modprobe erofs`; Debian: linux-image of the distribution)",
    )
    fuse = Path("/dev/fuse").exists()
    yield Check(
        "FUSE",
        _have(fuse),
        "/dev/fuse" if fuse else "no /dev/fuse",
        "lazy loading where the kernel has no pre-content events",
        "" if fuse else "`modprobe fuse`",
    )
    cachefiles = features.cachefiles_on_demand()
    yield Check(
        "cachefiles on demand",
        _have(cachefiles.works),
        cachefiles.detail,
        "another way of lazy loading, for kernels 5.19 to 7.1; not needed where fanotify works",
        "" if cachefiles.works or fanotify.works else "a kernel with CONFIG_CACHEFILES_ONDEMAND, or 6.14 and newer",
    )


# --- programs -----------------------------------------------------------------------------------------------------


def _engine(settings: Settings) -> Iterable[Check]:
    meaning = "roost runs one of its own; a system containerd is not touched"
    path = which("containerd")
    text = _says(path, "--version") if path else ""
    # `containerd <where it was built from> <version> <revision>`
    version = _version(" ".join(text.split()[2:]))
    if version and version < (1, 6):
        yield Check("containerd", "lack", f"{text} is too old", meaning, "containerd 1.6 or newer", True)
    else:
        yield _program("containerd", meaning, "containerd")
    yield _program("containerd-shim-runc-v2", "holds each container", "containerd", ask=())
    yield _program("runc", "starts containers", "runc")


def _network(settings: Settings) -> Iterable[Check]:
    places = (Path("/usr/lib/cni"), Path("/opt/cni/bin"))
    needed = ("ptp", "host-local", "loopback")
    folder = next((place for place in places if all((place / name).exists() for name in needed)), None)
    yield Check(
        "CNI plugins",
        _have(folder is not None),
        f"{', '.join(needed)} in {folder}"
        if folder
        else f"{', '.join(needed)} neither in {' nor in '.join(map(str, places))}",
        "a workspace's network",
        "" if folder else f"{_SETUP}, or `apt-get install containernetworking-plugins`",
        True,
    )
    yield _program("nft", "keeps workspaces from each other, the host and private ranges", "nftables")
    yield _program("ip", "looks at networks", "iproute2", ask=("-V",))
    forward = features.ip_forward()
    writable = os.access("/proc/sys/net/ipv4/ip_forward", os.W_OK)
    yield Check(
        "ip_forward",
        "have" if forward else "warn" if writable else "lack",
        "on" if forward else "off; the node switches it on" if writable else "off, and cannot be switched on here",
        "workspaces reach the network through the host",
        "" if forward or writable else "as root on the host: `sysctl -w net.ipv4.ip_forward=1`",
        True,
    )


def _git(settings: Settings) -> Iterable[Check]:
    check = _program("git", "clones repositories", "git")
    if check.status == "have" and _version(check.detail) < (2, 34):
        check = Check("git", "warn", f"{check.detail} is old", check.meaning, "git 2.34 or newer", True)
    yield check
    yield _program("ssh", "clones over ssh", "openssh-client", ask=("-V",), required=False)


def _tools(settings: Settings) -> Iterable[Check]:
    for name, paths, package, meaning in (
        ("tini (static)", ("/usr/bin/tini-static",), "tini", "is process 1 of every workspace"),
        (
            "busybox (static)",
            ("/bin/busybox", "/usr/lib/roost/busybox"),
            "busybox-static",
            "brings shell and tar into every image",
        ),
    ):
        there = [path for path in paths if os.access(path, os.X_OK)]
        static = [path for path in there if _is_static(path)]
        if static:
            yield Check(name, "have", static[0], meaning, required=True)
        else:
            detail = f"{there[0]} is linked dynamically" if there else f"no {paths[0]}"
            yield Check(name, "lack", detail, meaning, f"{_SETUP}, or `apt-get install {package}`", True)
    yield _program("mkfs.btrfs", "makes the pool where the state directory is not on btrfs", "btrfs-progs")
    yield _program("mmdebstrap", "`roost image bootstrap` builds an image with it", "mmdebstrap", required=False)
    yield _program("docker-registry", "holds bootstrapped images", "docker-registry", required=False)


def _is_static(path: str) -> bool:
    """Whether an ELF program names no loader (PT_INTERP lies near the start of the file)."""
    with Path(path).open("rb") as file:
        head = file.read(4096)
    return head[:4] == b"\x7fELF" and re.search(rb"/ld-(linux|musl)|/ld64", head) is None


# --- other engines ------------------------------------------------------------------------------------------------


def _docker(settings: Settings) -> Iterable[Check]:
    meaning = "not needed: a further place to run workspaces, in a coming release"
    address = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    if not address.startswith("unix://"):
        yield Check("Docker", "warn", f"DOCKER_HOST is {address}; only local sockets are looked at", meaning)
        return
    path = address.removeprefix("unix://")
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(_ANSWER_S)
            client.connect(path)
            client.sendall(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")
            reply = client.recv(4096).decode(errors="replace")
    except OSError as error:
        detail = f"{path} does not answer ({error.strerror or error})" if Path(path).exists() else f"no {path}"
        yield Check("Docker", "lack", detail, meaning, "`apt-get install docker.io`, if you want it")
        return
    found = re.search(r"(?mi)^server: *(.+?)\r?$", reply)
    yield Check("Docker", "have", f"{found[1] if found else 'it'} answers on {path}", meaning)


def _kubernetes(settings: Settings) -> Iterable[Check]:
    meaning = "not needed: a further place to run workspaces, in a coming release"
    named = [Path(item) for item in os.environ.get("KUBECONFIG", "").split(":") if item]
    for file in [*named, Path.home() / ".kube/config"]:
        if file.is_file():
            yield Check("Kubernetes", "have", f"a configuration in {file} (not tried)", meaning)
            return
    if Path("/var/run/secrets/kubernetes.io/serviceaccount/token").is_file():
        yield Check("Kubernetes", "have", "this is a pod with a service account", meaning)
        return
    yield Check("Kubernetes", "lack", "no kubeconfig", meaning, "set KUBECONFIG, if you want it")


_PROBES: tuple[_Probe, ...] = (
    _host,
    _kernel,
    _cgroups,
    _lazy,
    _btrfs,
    _disk,
    _engine,
    _network,
    _git,
    _tools,
    _ports,
    _docker,
    _kubernetes,
)
