"""Trees by directory descriptors: copy one, move one into another without clobbering, remove one.

Nothing here ever resolves a path with more than one component outside a directory it has just made itself, nor
follows a symlink: every step opens one name below an open directory with O_NOFOLLOW.  So what a hostile HOME holds,
or changes while we work, decides at most which of its own files are found, never what is written elsewhere.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from roost import faults
from roost.linux import fs

if TYPE_CHECKING:
    import hashlib

MAX_DEPTH = 200
"""Directories nested deeper are left out of a copy: each level costs two descriptors and a frame."""
_CHUNK = 1 << 20
_ZEROS = bytes(_CHUNK)
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def directory(parent: int, name: str) -> Iterator[int]:
    """A directory below another. Raises NotADirectoryError for anything else, symlinks too."""
    try:
        fd = os.open(name, _DIRECTORY, dir_fd=parent)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), name) from error
        raise
    try:
        yield fd
    finally:
        os.close(fd)


def names(folder: int) -> list[str]:
    """The names in a directory, always in the same order: what was cut off goes on in the order it began."""
    return sorted(os.listdir(folder))


@dataclass(frozen=True)
class Entry:
    """One line of a manifest."""

    path: str
    """Relative to HOME; bytes that are not UTF-8 as surrogates."""
    type: str
    """file, directory, symlink or fifo."""
    mode: int
    size: int = 0
    digest: str = ""
    """`blake2b:<hex>` (32 bytes) of a file's content or a symlink's target."""


def _hasher() -> hashlib.blake2b:
    import hashlib  # it loads OpenSSL: 5 ms that the start of a seeded workspace need not wait

    return hashlib.blake2b(digest_size=32)


def digest_of(data: bytes) -> str:
    hashed = _hasher()
    hashed.update(data)
    return f"blake2b:{hashed.hexdigest()}"


@dataclass
class Copy:
    """A copy of a tree into a new directory, everything owned by uid:gid.

    Kept: modes with setuid, setgid and sticky, mtimes, symlinks as they are, hard links, holes, fifos, `user.*`
    attributes and file capabilities.  Left out and reported: device nodes, sockets, what nests too deep.
    """

    uid: int
    gid: int
    without: frozenset[str] = frozenset()
    """Names at the top that are not copied."""
    entries: list[Entry] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    _root: int = -1
    _links: dict[tuple[int, int], Entry] = field(default_factory=dict)

    def run(self, source: int, target: int) -> None:
        """Copy what is in the directory `source` into the empty directory `target`."""
        self._root = target
        self._directory(source, target, "", 0)

    def _skip(self, path: str, reason: str) -> None:
        self.skipped.append({"path": path, "reason": reason})

    def _directory(self, source: int, target: int, prefix: str, depth: int) -> None:
        for name in names(source):
            faults.point("home.seed.copying")
            path = prefix + name
            if depth == 0 and name in self.without:
                self._skip(path, "the name is reserved for roost")
                continue
            found = os.stat(name, dir_fd=source, follow_symlinks=False)
            kind = stat.S_IFMT(found.st_mode)
            if kind == stat.S_IFREG:
                self._file(source, target, name, path, found)
            elif kind == stat.S_IFDIR:
                if depth == MAX_DEPTH:
                    self._skip(path, f"nested deeper than {MAX_DEPTH} directories")
                    continue
                os.mkdir(name, 0o700, dir_fd=target)
                with directory(source, name) as inner_source, directory(target, name) as inner_target:
                    self.entries.append(Entry(path, "directory", stat.S_IMODE(found.st_mode)))
                    self._directory(inner_source, inner_target, path + "/", depth + 1)
                    self._attributes(inner_source, inner_target, path, found)
            elif kind == stat.S_IFLNK:
                link = os.readlink(name, dir_fd=source)
                os.symlink(link, name, dir_fd=target)
                os.chown(name, self.uid, self.gid, dir_fd=target, follow_symlinks=False)
                self._mtime(target, name, found)
                raw = os.fsencode(link)
                self.entries.append(Entry(path, "symlink", 0o777, len(raw), digest_of(raw)))
            elif kind == stat.S_IFIFO:
                os.mkfifo(name, 0o600, dir_fd=target)
                os.chown(name, self.uid, self.gid, dir_fd=target, follow_symlinks=False)
                os.chmod(name, stat.S_IMODE(found.st_mode), dir_fd=target)
                self._mtime(target, name, found)
                self.entries.append(Entry(path, "fifo", stat.S_IMODE(found.st_mode)))
            else:
                self._skip(path, "socket" if kind == stat.S_IFSOCK else "device node")

    @staticmethod
    def _mtime(target: int, name: str, found: os.stat_result) -> None:
        os.utime(name, ns=(found.st_atime_ns, found.st_mtime_ns), dir_fd=target, follow_symlinks=False)

    def _attributes(self, source: int, target: int, path: str, found: os.stat_result) -> None:
        os.fchown(target, self.uid, self.gid)  # first: it clears setuid, setgid and capabilities
        os.fchmod(target, stat.S_IMODE(found.st_mode))
        for name in fs.copy_xattrs(source, target, _wanted):
            self._skip(path, f"the volume does not keep the attribute {name}")
        os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))

    def _file(self, source: int, target: int, name: str, path: str, found: os.stat_result) -> None:
        identity = (found.st_dev, found.st_ino)
        if found.st_nlink > 1 and (first := self._links.get(identity)) is not None:
            try:
                os.link(first.path, name, src_dir_fd=self._root, dst_dir_fd=target, follow_symlinks=False)
            except OSError as error:
                # Too many links, or a path longer than PATH_MAX: a copy serves as well.
                if error.errno not in (errno.EMLINK, errno.ENAMETOOLONG):
                    raise
            else:
                self.entries.append(Entry(path, "file", first.mode, first.size, first.digest))
                return
        reader = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=source)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            writer = os.open(name, flags, 0o600, dir_fd=target)
            try:
                size, digest = _content(reader, writer, found)
                self._attributes(reader, writer, path, found)
            finally:
                os.close(writer)
        finally:
            os.close(reader)
        entry = Entry(path, "file", stat.S_IMODE(found.st_mode), size, digest)
        self.entries.append(entry)
        if found.st_nlink > 1:
            self._links.setdefault(identity, entry)


def _wanted(name: str) -> bool:
    return name == "security.capability" or (name.startswith("user.") and not name.startswith("user.overlay."))


def _content(reader: int, writer: int, found: os.stat_result) -> tuple[int, str]:
    """Copy a file's bytes and holes; its size and digest."""
    hashed = _hasher()
    position = 0
    sparse = found.st_blocks * 512 < found.st_size

    def run(until: int | None) -> None:
        nonlocal position
        while until is None or position < until:
            data = os.read(reader, _CHUNK if until is None else min(_CHUNK, until - position))
            if not data:
                return
            hashed.update(data)
            position += len(data)
            while data:
                data = data[os.write(writer, data) :]

    while sparse and position < found.st_size:
        try:
            start = os.lseek(reader, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            start = found.st_size  # the rest is a hole
        for offset in range(position, start, _CHUNK):
            hashed.update(_ZEROS[: min(_CHUNK, start - offset)])
        position = start
        if start < found.st_size:
            end = os.lseek(reader, start, os.SEEK_HOLE)
            os.lseek(reader, start, os.SEEK_SET)
            os.lseek(writer, start, os.SEEK_SET)
            run(end)
            if position < end:
                break  # it was cut short while we read
    if sparse:
        os.ftruncate(writer, position)
    else:
        run(None)
    return position, f"blake2b:{hashed.hexdigest()}"


# --- moving in


@dataclass
class Merge:
    """What moving a tree in left behind."""

    kept: list[str] = field(default_factory=list)
    """Paths that were there already and stay as they were; what would have come is still in the source."""
    skipped: list[dict[str, str]] = field(default_factory=list)

    def run(self, source: int, target: int, prefix: str = "", depth: int = 0) -> None:
        """Rename everything of `source` into `target` where nothing has the name; directories on both sides are gone
        through, and are left empty in `source`.  Can be run again after it was cut off anywhere."""
        for name in names(source):
            faults.point("home.seed.publishing")
            path = prefix + name
            try:
                move_new(source, target, name)
                continue
            except FileExistsError:
                pass
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                # A subvolume that the user made inside HOME, in which nothing can be renamed from outside.
                self.kept.append(path)
                self.skipped.append({"path": path, "reason": "its directory is another file system"})
                continue
            try:
                with directory(source, name) as inner_source, directory(target, name) as inner_target:
                    if depth > MAX_DEPTH:
                        raise NotADirectoryError
                    self.run(inner_source, inner_target, path + "/", depth + 1)
            except NotADirectoryError:
                self.kept.append(path)


def move_new(source: int, target: int, name: str) -> None:
    """Rename to the same name in another directory. Raises FileExistsError if it is taken."""
    try:
        fs.rename_noreplace(name, name, source_fd=source, target_fd=target)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # A file system without RENAME_NOREPLACE (NFS): we hold the volume's lock, and nobody else runs in it yet.
        try:
            os.stat(name, dir_fd=target, follow_symlinks=False)
        except FileNotFoundError:
            os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)
        else:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name) from None


def paths(top: int, prefix: str = "", depth: int = 0) -> Iterator[str]:
    """Every path below a directory that `Copy` made (so none is deeper than MAX_DEPTH)."""
    for name in names(top):
        yield prefix + name
        if depth <= MAX_DEPTH and stat.S_ISDIR(os.stat(name, dir_fd=top, follow_symlinks=False).st_mode):
            with directory(top, name) as inner:
                yield from paths(inner, prefix + name + "/", depth + 1)


# --- removing


def remove(parent: int, name: str) -> None:
    """Remove a name and all below it; absent: no error.

    However deep it nests: what lies below MAX_DEPTH is moved up beside `name` first.
    """
    todo = [name]
    for one in todo:
        try:
            os.unlink(one, dir_fd=parent)
        except FileNotFoundError:
            pass
        except IsADirectoryError:
            _remove_directory(parent, one, parent, 0, todo)


def _remove_directory(parent: int, name: str, top: int, depth: int, todo: list[str]) -> None:
    with directory(parent, name) as fd:
        for entry in names(fd):
            try:
                os.unlink(entry, dir_fd=fd)
            except IsADirectoryError:
                if depth < MAX_DEPTH:
                    _remove_directory(fd, entry, top, depth + 1, todo)
                else:
                    aside = f".remove-{os.getpid()}-{len(todo)}"
                    fs.rename_noreplace(entry, aside, source_fd=fd, target_fd=top)
                    todo.append(aside)
    os.rmdir(name, dir_fd=parent)
