"""The programs that roost starts, each with the package that brings it: the engine, the network's, git, the tools.

Looked for on PATH and in the sbin directories; each is asked for its version, with a limit of time.  Whether the host
forwards packets is looked at beside the network's programs, which are of no use without.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from roost.linux import features
from roost.node.doctor.check import Check, have
from roost.settings import Settings

PROGRAM_TIMEOUT_S = 2.0
_SEARCH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SETUP = "`make setup` installs it"


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


def engine(settings: Settings) -> Iterable[Check]:
    """containerd, its shim and runc."""
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


def network(settings: Settings) -> Iterable[Check]:
    """The CNI plugins, nft and ip; and whether the host forwards at all."""
    places = (Path("/usr/lib/cni"), Path("/opt/cni/bin"))
    needed = ("ptp", "host-local", "loopback")
    folder = next((place for place in places if all((place / name).exists() for name in needed)), None)
    yield Check(
        "CNI plugins",
        have(folder is not None),
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


def git(settings: Settings) -> Iterable[Check]:
    """git, and ssh for it."""
    check = _program("git", "clones repositories", "git")
    if check.status == "have" and _version(check.detail) < (2, 34):
        check = Check("git", "warn", f"{check.detail} is old", check.meaning, "git 2.34 or newer", True)
    yield check
    yield _program("ssh", "clones over ssh", "openssh-client", ask=("-V",), required=False)


def tools(settings: Settings) -> Iterable[Check]:
    """What goes into each workspace, and what makes pools and images."""
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
