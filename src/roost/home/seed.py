"""Filling a volume from the image's HOME, once, without clobbering, whole or not at all.

The invariant
-------------
A volume is always in exactly one of these states, told by names in `<volume>/.roost/`, and every change of state is one
rename within that directory:

    fresh       neither `staged` nor `seed.json`.  `incoming` may lie there: garbage of a run that was killed.
    staged      `staged/` is there: `staged/tree` holds a complete copy of the image's HOME less what has been moved out
                of it already, `staged/about.json` its manifest.  All of it is on disk (syncfs before the rename).
    seeded      `seed.json` is there; `staged` may lie there: garbage again.

    fresh --(copy into incoming, syncfs, rename incoming -> staged)--> staged
    staged --(move staged/tree/* into the volume, syncfs, rename seed.json.new -> seed.json)--> seeded

- *Nothing is clobbered.*  Moving in is renameat2(RENAME_NOREPLACE), name by name from the top; a directory that is
  there on both sides is gone through, anything else that is there stays, with what it is.  A pre-existing file is not
  opened.
- *Killed while moving in* nothing is lost or doubled: a name is either still in `staged/tree` or in the volume, and
  the next run moves what is left.  What it then finds left over is precisely what was there before: a directory of
  ours was moved as a whole, so the names in `staged/tree` that meet something in the volume meet something that was
  not ours.  So the manifest of what was written (staged less left over) and the count of what was kept come out the
  same, however often the run was cut off.  This is why a file is never copied straight to its place: after a crash
  its half would look like a file of the user's.
- *Ownership*: everything in HOME becomes uid:gid of the workspace's user.  Image builders who copy as root would leave
  files their user cannot change, and an image whose uid differs from the asked one would leave strangers' files.
- *A hostile volume*: see tree.py for why nothing outside is written.  `.roost` that is no directory is moved aside,
  not followed; a forged marker or staging makes only its own HOME look seeded or adds to it what its user could write.
- *A full volume*: the copy is removed (unlinking works at a quota's limit) and HomeFull says so; when moving in, the
  copy stays and the next run with room completes it.

Another image later: the volume stays as it is, and the image is noted in `history`.  An image that changed between a
kill and the next run: the staged one is completed first, then counts as the one seeded.

Two runs at once (a node was killed, its seeder lived on) are kept apart by flock on the volume's root.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from roost import faults
from roost.errors import HomeFull, SeedFailed
from roost.home import tree
from roost.home.resolve import check_home, open_home, open_image
from roost.linux import fs

OWN = ".roost"
VERSION = 1
LOCK_TIMEOUT_S = 120.0
HISTORY_MAX = 50
_JSON_MAX = 256 << 20


def seed(
    *, image: str, volume: str, home: str, uid: int, gid: int, image_digest: str, lock_timeout_s: float = LOCK_TIMEOUT_S
) -> dict[str, Any]:
    """Seed the volume if it is not seeded yet; one JSON-ready document of what is so now.

    `state`: seeded (by this run), already (by an earlier one), other_image (by another image; nothing was changed).
    `files`, `directories`, `bytes`: what was written when it was seeded; `kept`: how many names were there before and
    stayed; `skipped`: what could not be kept, with reasons.
    Raises HomeFull, SeedFailed, UnusableHome.
    """
    home = check_home(home)
    try:
        volume_fd = os.open(volume, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise SeedFailed(f"the volume {volume} cannot be opened: {error.strerror}") from error
    try:
        with _errors():
            done = _quick(volume_fd, image_digest)
            if done is not None:
                return done
            with _locked(volume_fd, lock_timeout_s):
                return _seed(volume_fd, image, home, uid, gid, image_digest)
    finally:
        os.close(volume_fd)


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise HomeFull(
                "HOME has no room for what the image's HOME holds",
                next_step="Give the workspace a larger --disk; the next start goes on where this one stopped.",
            ) from error
        raise SeedFailed(f"HOME could not be seeded: {error.strerror} ({error.filename})") from error


@contextmanager
def _locked(volume: int, timeout_s: float) -> Iterator[None]:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(volume, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise SeedFailed(f"another process has held this HOME for {timeout_s:.0f} s") from error
            time.sleep(0.05)
    try:
        yield
    finally:
        fcntl.flock(volume, fcntl.LOCK_UN)


# --- the states


def _quick(volume: int, image_digest: str) -> dict[str, Any] | None:
    """The answer for a volume that this image seeded and that has no garbage: three system calls at every start."""
    try:
        with tree.directory(volume, OWN) as own:
            marker = _marker(own)
            if marker is None or marker["image_digest"] != image_digest or _exists(own, "staged"):
                return None
            return _answer(marker, "already")
    except (FileNotFoundError, NotADirectoryError):
        return None


def _seed(volume: int, image: str, home: str, uid: int, gid: int, image_digest: str) -> dict[str, Any]:
    aside = _make_own(volume, uid, gid)
    with tree.directory(volume, OWN) as own:
        faults.point("home.seed.begun")
        tree.remove(own, "incoming")
        marker = _marker(own)
        fresh = marker is None
        if marker is None:
            about = _about(own)
            if about is None:
                tree.remove(own, "staged")
                about = _stage(volume, own, image, home, uid, gid, image_digest)
            marker = _publish(volume, own, about, aside, uid, gid)
        tree.remove(own, "staged")
        faults.point("home.seed.cleaned")
        if marker["image_digest"] == image_digest:
            return _answer(marker, "seeded" if fresh else "already")
        history = marker["history"]
        if not history or history[-1].get("image_digest") != image_digest:
            history.append({"image_digest": image_digest, "seen_at": time.time()})
            _write_json(own, "seed.json", {**marker, "history": history[-HISTORY_MAX:]})
            faults.point("home.seed.noted")
        return {**_answer(marker, "other_image"), "image_digest": image_digest, "seeded_from": marker["image_digest"]}


def _make_own(volume: int, uid: int, gid: int) -> list[dict[str, str]]:
    """Make `.roost`; what has that name and is no directory is moved aside, and reported."""
    aside: list[dict[str, str]] = []
    for number in range(1000):
        with suppress(FileExistsError):
            os.mkdir(OWN, 0o755, dir_fd=volume)
        try:
            with tree.directory(volume, OWN) as own:
                os.fchown(own, uid, gid)
                os.fchmod(own, 0o755)
            return aside
        except NotADirectoryError:
            name = f"{OWN}.aside-{number}"
            with suppress(FileExistsError):
                fs.rename_noreplace(OWN, name, source_fd=volume, target_fd=volume)
                aside = [{"path": OWN, "reason": f"not a directory; moved to {name}"}]
    raise SeedFailed(f"{OWN} in HOME is not a directory and cannot be moved aside")


def _stage(volume: int, own: int, image: str, home: str, uid: int, gid: int, image_digest: str) -> dict[str, Any]:
    image_fd = open_image(image)
    try:
        source = open_home(image_fd, home)
        try:
            os.mkdir("incoming", 0o700, dir_fd=own)
            faults.point("home.seed.incoming")
            with tree.directory(own, "incoming") as incoming:
                os.mkdir("tree", 0o700, dir_fd=incoming)
                copy = tree.Copy(uid, gid, without=frozenset({OWN}))
                if source is not None:
                    with tree.directory(incoming, "tree") as target:
                        copy.run(source, target)
                about = {
                    "version": VERSION,
                    "image_digest": image_digest,
                    "home": home,
                    "uid": uid,
                    "gid": gid,
                    "mode": 0o755 if source is None else stat.S_IMODE(os.fstat(source).st_mode),
                    "skipped": copy.skipped,
                    "entries": [vars(entry) for entry in copy.entries],
                }
                _write_json(incoming, "about.json", about)
                faults.point("home.seed.copied")
                fs.syncfs(incoming)
            faults.point("home.seed.synced")
            os.rename("incoming", "staged", src_dir_fd=own, dst_dir_fd=own)
            os.fsync(own)
        except OSError:
            # Give the room back; what cannot be removed now is garbage to the next run.
            with suppress(OSError):
                tree.remove(own, "incoming")
            raise
        finally:
            if source is not None:
                os.close(source)
    finally:
        os.close(image_fd)
    faults.point("home.seed.staged")
    return about


def _publish(
    volume: int, own: int, about: dict[str, Any], aside: list[dict[str, str]], uid: int, gid: int
) -> dict[str, Any]:
    merge = tree.Merge()
    with tree.directory(own, "staged") as staged, tree.directory(staged, "tree") as source:
        merge.run(source, volume)
        left = set(tree.paths(source))
    faults.point("home.seed.moved")
    os.fchown(volume, uid, gid)
    os.fchmod(volume, about["mode"])
    written = [entry for entry in about["entries"] if entry["path"] not in left]
    manifest = {key: about[key] for key in ("version", "image_digest", "home")} | {"entries": written}
    _write_json(own, "manifest.json", manifest)
    faults.point("home.seed.manifest")
    fs.syncfs(volume)
    faults.point("home.seed.published")
    marker = {
        **{key: about[key] for key in ("version", "image_digest", "home", "uid", "gid")},
        "seeded_at": time.time(),
        "files": sum(entry["type"] != "directory" for entry in written),
        "directories": sum(entry["type"] == "directory" for entry in written),
        "bytes": sum(entry["size"] for entry in written if entry["type"] == "file"),
        "kept": len(merge.kept),
        "skipped": about["skipped"] + merge.skipped + aside,
        "history": [],
    }
    _write_json(own, "seed.json", marker)
    faults.point("home.seed.marked")
    return marker


# --- documents


def _answer(marker: dict[str, Any], state: str) -> dict[str, Any]:
    keys = ("files", "directories", "bytes", "skipped", "kept", "image_digest")
    return {"state": state, **{key: marker[key] for key in keys}}


def _exists(folder: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _marker(own: int) -> dict[str, Any] | None:
    """The marker, None for one that is not there or that roost did not write."""
    found = _read_json(own, "seed.json")
    shape = {
        "image_digest": str,
        "history": list,
        "files": int,
        "directories": int,
        "bytes": int,
        "kept": int,
        "skipped": list,
    }
    if found is None or not all(isinstance(found.get(key), kind) for key, kind in shape.items()):
        return None
    found["history"] = [one for one in found["history"] if isinstance(one, dict)]
    return found


def _about(own: int) -> dict[str, Any] | None:
    """What is staged, None if nothing is or roost did not write it."""
    try:
        with tree.directory(own, "staged") as staged, tree.directory(staged, "tree"):
            found = _read_json(staged, "about.json")
    except (FileNotFoundError, NotADirectoryError):
        return None
    shape = {"image_digest": str, "home": str, "uid": int, "gid": int, "mode": int, "skipped": list, "entries": list}
    if found is None or not all(isinstance(found.get(key), kind) for key, kind in shape.items()):
        return None
    if not 0 <= found["mode"] <= 0o7777 or not all(
        isinstance(entry, dict) and {"path", "type", "size"} <= entry.keys() for entry in found["entries"]
    ):
        return None
    return found


def _read_json(folder: int, name: str) -> dict[str, Any] | None:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO):
            return None
        raise
    state = os.fstat(fd)
    if not stat.S_ISREG(state.st_mode) or state.st_size > _JSON_MAX:
        os.close(fd)
        return None
    with open(fd, "rb") as file:
        try:
            found = json.loads(file.read())
        except (ValueError, RecursionError):
            return None
    return found if isinstance(found, dict) else None


def _write_json(folder: int, name: str, document: dict[str, Any]) -> None:
    """Replace a document in one step, on disk when this returns."""
    new = f"{name}.new"
    tree.remove(folder, new)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(new, flags, 0o644, dir_fd=folder), "w", encoding="ascii") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(json.dumps(document, separators=(",", ":")))  # json.dump never uses the C encoder: 13 times slower
        file.flush()
        os.fsync(file.fileno())
    faults.point("home.seed.document")
    try:
        os.rename(new, name, src_dir_fd=folder, dst_dir_fd=folder)
    except IsADirectoryError:  # planted: nothing of ours is a directory of that name
        tree.remove(folder, name)
        os.rename(new, name, src_dir_fd=folder, dst_dir_fd=folder)
    os.fsync(folder)
