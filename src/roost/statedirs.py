"""The directories that our processes own: who may enter what is decided here and nowhere else.

    state_dir            root   0755
      server             roost  0700   the database and the tokens: nobody else reads them
      node               root   0711   engine, pool, registry; workspaces' users pass through it, none lists it
    run_dir              root   0755
      server             roost  0711   the API's socket: anyone may connect, peer credentials decide
      node               root   0711   sockets (0600 each), pid files, mounts
    cache_dir            root   0755

Started by somebody else than root (a test, a server of one's own) they are that user's.
"""

from __future__ import annotations

import errno
import os
import pwd
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from roost.errors import HostDiskFull, InvalidConfig, MissingFeature, NeedsRoot
from roost.settings import Settings


@dataclass(frozen=True)
class Directory:
    path: Path
    mode: int
    servers: bool
    """Owned by the server's user, else by root."""


def directories(settings: Settings) -> Iterator[Directory]:
    """All of them, parents first."""
    yield Directory(settings.state_dir, 0o755, False)
    yield Directory(settings.server_state, 0o700, True)
    yield Directory(settings.node_state, 0o711, False)
    yield Directory(settings.run_dir, 0o755, False)
    yield Directory(settings.server_run, 0o711, True)
    yield Directory(settings.node_run, 0o711, False)
    yield Directory(settings.cache_dir, 0o755, False)


def prepare(settings: Settings) -> None:
    """Make what is missing, mend owners and modes; what is right is not touched. Blocks for milliseconds.

    Raises NeedsRoot, HostDiskFull, MissingFeature (no such system user), InvalidConfig (a path is not a directory).
    """
    root = os.geteuid() == 0
    server = _server_user(settings.server.user) if root else (os.geteuid(), os.getegid())
    for directory in directories(settings):
        owner = server if directory.servers else (os.geteuid(), os.getegid())
        try:
            _make(directory.path, directory.mode, owner)
        except OSError as error:
            raise _explain(error, directory.path) from error


def _make(path: Path, mode: int, owner: tuple[int, int]) -> None:
    # Parents above our own are the administrator's; made only where missing, and passable.
    missing = [parent for parent in path.parents if not parent.exists()]
    for parent in reversed(missing):
        parent.mkdir(mode=0o755, exist_ok=True)
        parent.chmod(0o755)
    path.mkdir(mode=0o700, exist_ok=True)  # opened to others only once it has its owner
    # By descriptor: the server's user owns some of the parents' entries and must not redirect root by a link.
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if (found.st_uid, found.st_gid) != owner:
            os.fchown(descriptor, *owner)
        if found.st_mode & 0o7777 != mode:
            os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)


def _server_user(name: str) -> tuple[int, int]:
    try:
        entry = pwd.getpwnam(name)
    except KeyError as error:
        raise MissingFeature(
            f"there is no system user {name!r} for the server",
            next_step=f"Run `make setup`, or `useradd --system --no-create-home {name}`.",
        ) from error
    return entry.pw_uid, entry.pw_gid


def _explain(error: OSError, path: Path) -> Exception:
    if error.errno in (errno.EACCES, errno.EPERM):
        return NeedsRoot(f"{path} cannot be made: {error.strerror}")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return HostDiskFull(f"{path} cannot be made: {error.strerror}")
    return InvalidConfig(f"{path} cannot be used as a directory: {error.strerror}")
