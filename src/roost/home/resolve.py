"""Whom a workspace runs as, and where its HOME is, from the image alone.

The order: the user asked for; the image's USER; `vscode` if the image has it; root.  A user is written as containers
write it: NAME, UID, NAME:GROUP or UID:GID, where digits are always a number (as runc reads it).

/etc/passwd and /etc/group belong to the image, so they are hostile: they are opened with the image's root as `/` for
the whole walk (openat2 RESOLVE_IN_ROOT), which lets a symlink lead anywhere in the image and nowhere else, never by a
magic link, never blocking on a fifo, never more than MAX_BYTES of it.
"""

from __future__ import annotations

import errno
import os
import posixpath
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from roost.errors import InvalidRequest, SeedFailed, UnknownUser, UnusableHome
from roost.linux import fs

MAX_BYTES = 16 << 20
MAX_ID = (1 << 31) - 1
TOOLS_DIR = "/opt/roost"
"""As in roost.runtimes.protocol, which cannot be imported here; a test compares them."""

_SYSTEM = (
    *("/usr", "/etc", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/libexec"),
    *("/proc", "/sys", "/dev", "/run", "/boot", "/nonexistent", TOOLS_DIR),
)
"""No HOME here nor anywhere below: a volume would hide a part of the system."""
_TOP = ("/", "/var", "/tmp", "/opt")
"""No HOME at these themselves; below is fine (/var/jenkins_home)."""
_IN_IMAGE = fs.Resolve.IN_ROOT | fs.Resolve.NO_MAGICLINKS
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)


@dataclass(frozen=True)
class User:
    """Same fields as roost.runtimes.protocol.ContainerUser."""

    uid: int
    gid: int
    name: str
    home: str
    shell: str
    groups: tuple[int, ...]


@dataclass(frozen=True)
class _Passwd:
    name: str
    uid: int
    gid: int
    home: str
    shell: str


@dataclass(frozen=True)
class _Group:
    name: str
    gid: int
    members: tuple[str, ...]


def open_image(image: str) -> int:
    """The root directory of an image. Raises SeedFailed."""
    try:
        return os.open(image, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise SeedFailed(f"the image's tree {image} cannot be opened: {error.strerror}") from error


def open_home(image_fd: int, home: str) -> int | None:
    """The directory HOME of an image, None if it has none. Raises UnusableHome if symlinks lead it to the system."""
    try:
        fd = fs.openat2(image_fd, home, os.O_RDONLY | os.O_DIRECTORY, _IN_IMAGE)
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise
    # Where it really is: /home/me -> /etc would have the volume mounted over /etc.
    root, real = (str(Path(f"/proc/self/fd/{one}").readlink()) for one in (image_fd, fd))
    inside = real.removeprefix(root.rstrip("/")) or "/"
    try:
        check_home(inside)
    except UnusableHome:
        os.close(fd)
        if inside != home:
            raise UnusableHome(
                f"HOME {home} is {inside} in the image, where no volume may be mounted", next_step=_HINT
            ) from None
        raise
    return fd


_HINT = "Name another directory with --home, such as --home /home/NAME."


def check_home(home: str) -> str:
    """The normalized HOME. Raises UnusableHome for a place where a volume would hide the system."""
    if not home.startswith("/") or "\0" in home or "\n" in home:
        raise UnusableHome(f"HOME {home!r} is not an absolute path", next_step=_HINT)
    clean = "/" + posixpath.normpath(home).lstrip("/")
    if clean in _TOP or any(clean == place or clean.startswith(place + "/") for place in _SYSTEM):
        raise UnusableHome(f"HOME {clean} lies where no volume may be mounted", next_step=_HINT)
    return clean


def _lines(image_fd: int, path: str) -> Iterator[list[str]]:
    """The fields of each line of a database like passwd; nothing if it is absent or no file."""
    try:
        fd = fs.openat2(image_fd, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY, _IN_IMAGE)
    except OSError as error:
        if error.errno in _ABSENT:
            return
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        return
    with open(fd, "rb") as file:
        text = file.read(MAX_BYTES).decode("utf-8", "surrogateescape")
    for line in text.split("\n"):
        if line and not line.startswith("#"):
            yield line.split(":")


def _number(text: str) -> int | None:
    """A uid or gid; None if it is not one (isdecimal alone would take other scripts' digits)."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 11 and int(text) <= MAX_ID else None


def _passwd(image_fd: int) -> list[_Passwd]:
    found = []
    for fields in _lines(image_fd, "etc/passwd"):
        if len(fields) >= 7 and (uid := _number(fields[2])) is not None and (gid := _number(fields[3])) is not None:
            found.append(_Passwd(fields[0], uid, gid, fields[5], fields[6]))
    return found


def _groups(image_fd: int) -> list[_Group]:
    found = []
    for fields in _lines(image_fd, "etc/group"):
        if len(fields) >= 4 and (gid := _number(fields[2])) is not None:
            found.append(_Group(fields[0], gid, tuple(name for name in fields[3].split(",") if name)))
    return found


def _choose(asked: str, image_user: str, passwd: list[_Passwd]) -> tuple[str, str]:
    if asked:
        return asked, "option"
    if image_user:
        return image_user, "image"
    if any(entry.name == "vscode" for entry in passwd):
        return "vscode", "vscode"
    return "0", "default"


def _find(spec: str, passwd: list[_Passwd], groups: list[_Group]) -> User:
    who, colon, group = spec.partition(":")
    uid = _number(who)
    entry = next((e for e in passwd if (e.uid == uid if uid is not None else e.name == who)), None)
    if not who or (colon and not group):
        raise UnknownUser(f"{spec!r} is not a user: write NAME, UID, NAME:GROUP or UID:GID")
    if entry is None and uid is None:
        raise UnknownUser(f"the image has no user {who!r}", details={"users": [e.name for e in passwd][:50]})
    gid = entry.gid if entry else 0  # as container engines do
    further: tuple[int, ...] = ()
    if group:
        number = _number(group)
        known = next((g.gid for g in groups if (g.gid == number if number is not None else g.name == group)), number)
        if known is None:
            raise UnknownUser(f"the image has no group {group!r}")
        gid = known
    elif entry:
        further = tuple(sorted({g.gid for g in groups if entry.name in g.members and g.gid != gid}))
    if entry is None:
        assert uid is not None
        return User(uid, gid, str(uid), "", "", further)
    return User(entry.uid, gid, entry.name, entry.home, entry.shell, further)


def resolve(image: str, image_user: str, user: str = "", home: str = "") -> dict[str, object]:
    """User and HOME as one JSON-ready document: user, chosen_by (option, image, vscode, default), image_home_exists.

    `image_user`: the USER of the image's configuration; `user`, `home`: what was asked for, empty: nothing.
    Raises UnknownUser, UnusableHome, SeedFailed (the image's tree cannot be read).
    """
    image_fd = open_image(image)
    try:
        passwd = _passwd(image_fd)
        spec, chosen_by = _choose(user.strip(), image_user.strip(), passwd)
        if chosen_by == "default" and not passwd:
            found = User(0, 0, "root", "/root", "", ())  # an image of nothing but a program
        else:
            found = _find(spec, passwd, _groups(image_fd))
        wanted = home or found.home
        if not wanted:
            raise UnusableHome(f"user {found.name} has no HOME in the image's passwd", next_step=_HINT)
        found = User(**{**asdict(found), "home": check_home(wanted)})
        home_fd = open_home(image_fd, found.home)
        if home_fd is not None:
            os.close(home_fd)
    except OSError as error:
        raise SeedFailed(f"the image's tree cannot be read: {error.strerror} ({error.filename})") from error
    finally:
        os.close(image_fd)
    return {"user": asdict(found), "chosen_by": chosen_by, "image_home_exists": home_fd is not None}


def checked_id(text: str) -> int:
    """A uid or gid given as an argument. Raises InvalidRequest."""
    number = _number(text)
    if number is None:
        raise InvalidRequest(f"{text!r} is not a uid or gid")
    return number
