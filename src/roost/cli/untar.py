"""Unpacking what a workspace sends, on a machine it must not reach.

The stream is made by a container, so by an enemy.  What holds, whatever it says:

- Every entry lands below the destination: names are split into parts, `..`, absolute and empty ones are refused, and
  each directory is opened from its parent with O_NOFOLLOW.  No path is ever resolved by the kernel across a symlink,
  neither one the stream made nor one that was there before.
- Only files, directories, symlinks and hard links to files of this very stream are made; devices and fifos are not.
- A symlink that leads out of the destination is not made: the caller's editor or shell would follow it some day.
- No set-id bits, nothing writable by others, and the owner is the caller.
- Files are made anew (an existing one is unlinked first), so no hard link or open file of the caller is written to.

What is left out is counted and named; the copy then ends in CopyFailed, with everything else in place.
`tarfile.data_filter` would hold some of this, but Debian 12's Python has none, and it resolves paths by name.
"""

from __future__ import annotations

import errno
import os
import stat
import tarfile
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO

from roost.errors import CopyFailed

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_PIECE = 1 << 20
_DEPTH_MAX = 200
_NAMED_MAX = 20


@dataclass
class Unpacked:
    """What came out of a stream."""

    files: int = 0
    bytes: int = 0
    left_out: list[str] = field(default_factory=list)
    """Sentences, for the first few."""
    left_out_count: int = 0

    def leave_out(self, name: str, reason: str) -> None:
        self.left_out_count += 1
        if len(self.left_out) < _NAMED_MAX:
            self.left_out.append(f"{name!r}: {reason}")


class _Refused(Exception):
    """Why an entry is not made."""


def unpack(stream: IO[bytes], into: str, root: str, rename: str) -> Unpacked:
    """Extract the tree `root` of a tar stream below the directory `into`, under the name `rename` (empty: its content).

    Blocks. Raises CopyFailed when the stream is no tar, is cut off, or the disk does not take it.
    """
    result = Unpacked()
    made: set[tuple[str, ...]] = set()
    links: list[tuple[tuple[str, ...], str]] = []
    directories: list[tuple[tuple[str, ...], tarfile.TarInfo]] = []
    prefix = (rename,) if rename else ()
    base = os.open(into, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with tarfile.open(fileobj=stream, mode="r|", errorlevel=1) as archive:
            for member in archive:
                try:
                    parts = _parts(member.name, root, prefix)
                    if member.isdir():
                        _make_directories(base, parts)
                        directories.append((parts, member))
                    elif member.isreg():
                        result.bytes += _write(base, parts, archive, member)
                        result.files += 1
                        made.add(parts)
                    elif member.islnk():
                        source = _parts(member.linkname, root, prefix)
                        if source not in made:
                            raise _Refused("a hard link to something else than a file of this copy")
                        _link(base, source, parts)
                        result.files += 1
                        made.add(parts)
                    elif member.issym():
                        _check_target(parts[len(prefix) :], member.linkname)
                        links.append((parts, member.linkname))
                    else:
                        raise _Refused("neither file, directory nor link")
                except _Refused as refusal:
                    result.leave_out(member.name, str(refusal))
        # Symlinks come last: while files are written, none of the stream's own stands in their way.
        for parts, target in links:
            try:
                _symlink(base, parts, target)
                result.files += 1
            except _Refused as refusal:
                result.leave_out("/".join(parts), str(refusal))
        for parts, member in reversed(directories):
            _finish_directory(base, parts, member)
    except (tarfile.TarError, EOFError) as error:
        raise CopyFailed(f"what the workspace sent is no sound tar stream: {error}") from error
    except OSError as error:
        raise CopyFailed(f"{into}: {error.strerror or error}", next_step="Mend that and copy again.") from error
    finally:
        os.close(base)
    return result


def _parts(name: str, root: str, prefix: tuple[str, ...]) -> tuple[str, ...]:
    """The path below the destination of an entry; `root` is what was asked for."""
    if name.startswith("/") or "\0" in name:
        raise _Refused("an absolute path")
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in parts:
        raise _Refused("a path with ..")
    if len(parts) > _DEPTH_MAX:
        raise _Refused("too deep")
    if root:
        if parts[:1] != (root,):
            raise _Refused("not in what was asked for")
        parts = parts[1:]
    return prefix + parts


def _check_target(inner: tuple[str, ...], target: str) -> None:
    """Refuse a symlink that leads out of the copied tree.

    `..` only at its beginning, and no more of them than the link lies deep: those are real directories.  After a name,
    which may be another symlink, `..` means the parent of wherever that one leads: `d -> .` makes `d/..` the outside.
    """
    parts = [part for part in target.split("/") if part not in ("", ".")]
    up = next((index for index, part in enumerate(parts) if part != ".."), len(parts))
    if not inner or not target or target.startswith("/") or ".." in parts[up:] or up > len(inner) - 1:
        raise _Refused(f"a symlink to {target!r}, outside of the copy")


def _open_directory(base: int, parts: tuple[str, ...], make: bool = False) -> int:
    """A descriptor of a directory below `base`; no part of the way may be a symlink."""
    current = os.dup(base)
    try:
        for part in parts:
            if make:
                with suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=current)
            try:
                deeper = os.open(part, _DIRECTORY, dir_fd=current)
            except OSError as error:
                # O_DIRECTORY with O_NOFOLLOW on a symlink: ENOTDIR, on some file systems ELOOP (open(2)).
                if error.errno in (errno.ENOTDIR, errno.ELOOP):
                    raise _Refused(f"{part!r} on the way is no directory here") from error
                raise
            os.close(current)
            current = deeper
    except BaseException:
        os.close(current)
        raise
    return current


def _make_directories(base: int, parts: tuple[str, ...]) -> None:
    os.close(_open_directory(base, parts, make=True))


def _cleared(parent: int, name: str) -> None:
    """Nothing of that name stands here any more. A directory is not removed for a file."""
    try:
        if stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            raise _Refused("a directory of that name is here already")
        os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        return


def _write(base: int, parts: tuple[str, ...], archive: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    if not parts:
        raise _Refused("a file where a directory was asked for")
    parent = _open_directory(base, parts[:-1], make=True)
    try:
        _cleared(parent, parts[-1])
        descriptor = os.open(parts[-1], _NEW_FILE, 0o600, dir_fd=parent)
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            content = archive.extractfile(member)
            assert content is not None
            written = 0
            while piece := content.read(_PIECE):
                view = memoryview(piece)
                while view:
                    view = view[file.write(view) or 0 :]
                written += len(piece)
            if written != member.size:
                raise CopyFailed(f"{member.name!r} is cut off")
            os.fchmod(descriptor, (member.mode & 0o755) | 0o600)
            os.utime(descriptor, (member.mtime, member.mtime))
        return written
    finally:
        os.close(parent)


def _link(base: int, source: tuple[str, ...], parts: tuple[str, ...]) -> None:
    if not parts:
        raise _Refused("a link where a directory was asked for")
    if source == parts:
        return
    origin = _open_directory(base, source[:-1])
    try:
        parent = _open_directory(base, parts[:-1], make=True)
        try:
            _cleared(parent, parts[-1])
            os.link(source[-1], parts[-1], src_dir_fd=origin, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(parent)
    finally:
        os.close(origin)


def _symlink(base: int, parts: tuple[str, ...], target: str) -> None:
    if not parts:
        raise _Refused("a link where a directory was asked for")
    parent = _open_directory(base, parts[:-1], make=True)
    try:
        _cleared(parent, parts[-1])
        os.symlink(target, parts[-1], dir_fd=parent)
    finally:
        os.close(parent)


def _finish_directory(base: int, parts: tuple[str, ...], member: tarfile.TarInfo) -> None:
    """Mode and time, when nothing is written below any more."""
    if not parts:
        return  # the caller's own directory
    try:
        descriptor = _open_directory(base, parts)
    except (_Refused, FileNotFoundError):
        return
    try:
        os.fchmod(descriptor, (member.mode & 0o755) | 0o700)
        os.utime(descriptor, (member.mtime, member.mtime))
    finally:
        os.close(descriptor)
