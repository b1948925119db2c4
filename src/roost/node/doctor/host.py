"""The host as it stands: distribution, root, python, the server's user, room on the disk, our ports."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from roost.linux.process import listener
from roost.node.doctor.check import Check, existing
from roost.settings import Settings


def host(settings: Settings) -> Iterable[Check]:
    """The distribution, root, python and the server's user."""
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


def disk(settings: Settings) -> Iterable[Check]:
    """Room where the state directory is or will be."""
    folder = existing(settings.state_dir)
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


def ports(settings: Settings) -> Iterable[Check]:
    """Whether our ports are free, or ours already."""
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
