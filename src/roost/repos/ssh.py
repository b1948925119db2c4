"""How git speaks ssh for a clone: one command line, no configuration files, host keys kept per tenant.

The address was resolved and checked before; ssh connects to it (`HostName`) and looks the host key up under the name
that people gave (`HostKeyAlias`).  ssh gets a private copy of the tenant's known_hosts: the unprivileged git user never
writes the real one, so it cannot replace the key of another host; new lines are appended afterwards under a lock.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import shlex
from pathlib import Path

from roost.errors import InternalError, MissingProgram
from roost.repos.git import User
from roost.repos.urls import RepoUrl

CONNECT_TIMEOUT_S = 15
_KNOWN_HOSTS_MAX = 4 << 20


def command(url: RepoUrl, address: str, *, program: str | None, known_hosts: Path, agent_socket: Path | None) -> str:
    """The value of GIT_SSH_COMMAND (git hands it to a shell)."""
    if program is None:
        raise MissingProgram("ssh is not installed", next_step="Install the package `openssh-client` on the node.")
    alias = url.host if url.effective_port == 22 else f"[{url.host}]:{url.effective_port}"
    options = {
        "BatchMode": "yes",
        "StrictHostKeyChecking": "accept-new",
        "UserKnownHostsFile": _quoted(known_hosts),
        "UpdateHostKeys": "no",
        "HashKnownHosts": "no",
        "CheckHostIP": "no",
        "HostName": address,
        "HostKeyAlias": alias,
        "IdentityAgent": _quoted(agent_socket) if agent_socket else "none",
        "IdentitiesOnly": "no",
        "IdentityFile": "none",
        "PreferredAuthentications": "publickey",
        "ConnectTimeout": str(CONNECT_TIMEOUT_S),
        "ServerAliveInterval": "15",
        "ServerAliveCountMax": "3",
        "ClearAllForwardings": "yes",
        "ForwardAgent": "no",
        "PermitLocalCommand": "no",
        "ProxyCommand": "none",
        "ControlMaster": "no",
        "ControlPath": "none",
        "RequestTTY": "no",
        "LogLevel": "ERROR",
    }
    words = [program, "-F", os.devnull]
    for key, value in options.items():
        words += ["-o", f"{key}={value}"]
    return shlex.join(words)


def check_user(user: User | None) -> None:
    """ssh refuses to run for a uid without a passwd entry; say so before it does."""
    if user is None:
        return
    try:
        pwd.getpwuid(user[0])
    except KeyError as error:
        raise InternalError(f"uid {user[0]}, which shall run ssh, has no entry in passwd") from error


def copy_known_hosts(source: Path, target: Path, user: User | None) -> bytes:
    """Make ssh's private copy; returns what was in it."""
    try:
        content = source.read_bytes()
    except FileNotFoundError:
        content = b""
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        if user is not None:
            os.fchown(file.fileno(), *user)
    return content


def keep_new_hosts(copy: Path, before: bytes, target: Path) -> None:
    """Append the lines that ssh added to its copy to the tenant's file."""
    descriptor = os.open(copy, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        after = file.read(_KNOWN_HOSTS_MAX)
    known = set(before.splitlines())
    new = [line for line in after.splitlines() if line and line not in known]
    if not new:
        return
    with target.open("a+b") as file:
        os.fchmod(file.fileno(), 0o600)
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        there = set(file.read().splitlines())
        file.write(b"".join(line + b"\n" for line in new if line not in there))


def _quoted(path: Path) -> str:
    text = str(path)
    if '"' in text or "\n" in text or text.startswith("$"):
        raise InternalError(f"ssh cannot be given the path {text!r}")
    return '"' + text.replace("%", "%%") + '"'
