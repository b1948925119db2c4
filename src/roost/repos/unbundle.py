"""A repository from a bundle that a client sent: history, refs, remotes and the uncommitted changes.

The bytes are hostile.  They are parsed by git as the unprivileged user (index-pack with fsck, update-ref, read-tree),
the header, a few lines of text, by us.  `git clone` is not used: git 2.39 neither runs fsck on bundles nor takes a
shallow one.  What the bundle says about remotes and upstreams becomes configuration only after it was read as a
URL and as names; nothing else of the sender's configuration comes along, so no filter, hook or alias does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from roost.errors import BadRef, CloneFailed, RepoCorrupt, RepoUnreachable
from roost.repos.bundle import FORMAT, INDEX_REF, WORKTREE_REF
from roost.repos.git import Git, OnProgress
from roost.repos.urls import strip_credentials

HEADER_MAX: Final = 16 << 20
REFS_MAX: Final = 100_000
_META_MAX = 8 << 20
_OID = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_REF = re.compile(r"refs/(?:heads|tags|remotes)/[^\x00-\x20\x7f~^:?*\[\\]+")
_REMOTE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True, slots=True)
class Header:
    """The text before the pack."""

    object_format: str
    refs: Mapping[str, str]
    """Name to object, only branches, tags and remote branches."""
    head: str | None
    worktree: str | None
    index: str | None
    pack_offset: int


@dataclass(frozen=True, slots=True)
class Meta:
    """What `make_bundle` says beside the refs; all defaults for a bundle that git itself made."""

    branch: str | None = None
    commit: str | None = None
    worktree: bool = False
    shallow: tuple[str, ...] = ()
    remotes: Mapping[str, str] = field(default_factory=dict)
    branches: Mapping[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Restored:
    """What the work tree shows now."""

    branch: str | None
    commit: str | None
    notes: tuple[str, ...]


def read_header(descriptor: int) -> Header:
    """Read the header of a bundle from its start; RepoCorrupt when it is none, or needs objects we do not have."""
    data = b""
    while b"\n\n" not in data:
        chunk = os.pread(descriptor, 1 << 20, len(data))
        if not chunk or len(data) > HEADER_MAX:
            raise RepoCorrupt("what was sent is not a git bundle")
        data += chunk
    end = data.index(b"\n\n")
    first, *lines = data[:end].decode("utf-8", "surrogateescape").split("\n")
    if first not in ("# v2 git bundle", "# v3 git bundle"):
        raise RepoCorrupt("what was sent is not a git bundle")
    if len(lines) > REFS_MAX:
        raise RepoCorrupt(f"the bundle has more than {REFS_MAX} refs")
    object_format = "sha1"
    refs: dict[str, str] = {}
    special: dict[str, str] = {}
    for line in lines:
        if line.startswith("@"):
            if line not in ("@object-format=sha1", "@object-format=sha256"):
                raise RepoCorrupt(f"the bundle asks for {line[:80]!r}, which is not known")
            object_format = line.partition("=")[2]
            continue
        if line.startswith("-"):
            raise RepoCorrupt("the bundle is not complete: it needs objects that it does not bring")
        oid, _, name = line.partition(" ")
        if not _OID.fullmatch(oid):
            raise RepoCorrupt("the bundle's header has a line that is no ref")
        if name in ("HEAD", WORKTREE_REF, INDEX_REF):
            special[name] = oid
        elif _REF.fullmatch(name) and ".." not in name and "@{" not in name:
            refs[name] = oid
    return Header(object_format, refs, special.get("HEAD"), special.get(WORKTREE_REF), special.get(INDEX_REF), end + 2)


def read_meta(text: str) -> Meta:
    """Read the JSON of the worktree commit, keeping only what is well formed; RepoCorrupt when it is no such JSON."""
    try:
        raw: Any = json.loads(text[:_META_MAX])
    except ValueError as error:
        raise RepoCorrupt("the bundle's description is not JSON") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise RepoCorrupt("the bundle was made by another version of roost", next_step="Use the same version on both.")
    branch, commit, shallow = raw.get("branch"), raw.get("commit"), raw.get("shallow")
    remotes, branches = raw.get("remotes"), raw.get("branches")
    urls = {
        str(name): url
        for name, given in (remotes.items() if isinstance(remotes, dict) else ())
        if _REMOTE.fullmatch(str(name)) and isinstance(given, str) and (url := strip_credentials(given))
    }
    tracked = {
        str(name): (str(pair[0]), str(pair[1]))
        for name, pair in (branches.items() if isinstance(branches, dict) else ())
        if isinstance(pair, list) and len(pair) == 2 and pair[0] in urls
        if _REF.fullmatch(f"refs/heads/{name}") and _REF.fullmatch(str(pair[1]))
    }
    return Meta(
        branch if isinstance(branch, str) and _REF.fullmatch(f"refs/heads/{branch}") else None,
        commit if isinstance(commit, str) and _OID.fullmatch(commit) else None,
        raw.get("worktree") is True,
        tuple(str(oid) for oid in shallow if _OID.fullmatch(str(oid))) if isinstance(shallow, list) else (),
        urls,
        tracked,
    )


def config_text(meta: Meta) -> str:
    """The part of .git/config about remotes and upstreams."""
    parts = []
    for name, url in meta.remotes.items():
        parts.append(
            f'[remote "{name}"]\n\turl = {_value(url)}\n\tfetch = {_value(f"+refs/heads/*:refs/remotes/{name}/*")}\n'
        )
    for branch, (remote, ref) in meta.branches.items():
        section = branch.replace("\\", "\\\\").replace('"', '\\"')
        parts.append(f'[branch "{section}"]\n\tremote = {_value(remote)}\n\tmerge = {_value(ref)}\n')
    return "".join(parts)


def _value(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


async def restore(
    git: Git,
    bundle: Path,
    tree: Path,
    *,
    branch: str | None,
    origin_url: str | None,
    on_progress: OnProgress | None = None,
) -> Restored:
    """Make the repository `tree` (must not exist) from the bundle; the caller removes it after an error."""
    try:
        descriptor = os.open(bundle, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise CloneFailed(f"the bundle cannot be read: {error.strerror}") from error
    try:
        header = await asyncio.to_thread(read_header, descriptor)
        what = "opening the bundle"
        arguments = ("init", "-q", "--template=", f"--object-format={header.object_format}", "--", tree)
        await git.run(*arguments, cwd=tree.parent, what=what)
        os.lseek(descriptor, header.pack_offset, os.SEEK_SET)
        unpack = ("index-pack", "--stdin", "--fsck-objects", "-v")
        try:
            await git.run(*unpack, cwd=tree, what=what, stdin=descriptor, on_progress=on_progress)
        except (RepoUnreachable, CloneFailed) as error:  # a pack that ends early: here no network can be to blame
            raise RepoCorrupt(error.message, details=error.details) from error
    finally:
        os.close(descriptor)
    meta = Meta()
    if header.worktree is not None:
        shown = await git.run("log", "-1", "--format=%B", header.worktree, "--", cwd=tree, what=what)
        meta = read_meta(shown.stdout.decode("utf-8", "surrogateescape"))
    if origin_url is not None and (stripped := strip_credentials(origin_url)):
        meta = replace(meta, remotes={**meta.remotes, "origin": stripped})
    if meta.shallow:
        await _append(git, tree / ".git" / "shallow", "".join(f"{oid}\n" for oid in meta.shallow))
    await _append(git, tree / ".git" / "config", config_text(meta))
    oids = [*header.refs.values(), *filter(None, (header.head, header.worktree, header.index))]
    reachable = "".join(f"{oid}\n" for oid in dict.fromkeys(oids)).encode()
    checked = await git.run(
        "rev-list", "--objects", "--quiet", "--stdin", cwd=tree, what=what, stdin=reachable, check=False
    )
    if checked.exit_code != 0:
        raise RepoCorrupt(f"the bundle is not complete: {checked.stderr.strip()[-300:]}")
    updates = "".join(f"create {name} {oid}\n" for name, oid in header.refs.items())
    refs = updates.encode("utf-8", "surrogateescape")
    created = await git.run("update-ref", "--stdin", cwd=tree, what=what, stdin=refs, check=False)
    if created.exit_code != 0:
        raise RepoCorrupt(f"the bundle's refs cannot be: {created.stderr.strip()[-300:]}")
    return await _check_out(git, tree, header, meta, branch, on_progress)


async def _check_out(
    git: Git, tree: Path, header: Header, meta: Meta, branch: str | None, on_progress: OnProgress | None
) -> Restored:
    what = "checking the files out"
    notes: list[str] = []
    own = meta.branch or next(
        (name.removeprefix("refs/heads/") for name, oid in header.refs.items()
         if name.startswith("refs/heads/") and oid == header.head and header.worktree is None),
        None,
    )  # fmt: skip
    chosen = branch or own
    commit = meta.commit or header.head
    if branch is not None and branch != own:
        commit = header.refs.get(f"refs/heads/{branch}") or header.refs.get(f"refs/tags/{branch}")
        if commit is None:
            raise BadRef(f"the repository has no branch {branch!r}")
        if f"refs/heads/{branch}" not in header.refs:
            chosen = None
        if meta.worktree:
            notes.append("Uncommitted changes belong to another branch and were left out.")
    with_changes = meta.worktree and (branch is None or branch == own)
    if chosen is not None:
        await git.run("symbolic-ref", "HEAD", f"refs/heads/{chosen}", cwd=tree, what=what)
    elif commit is not None:
        await git.run("update-ref", "--no-deref", "HEAD", commit, cwd=tree, what=what)
    if chosen is not None and commit is not None and header.refs.get(f"refs/heads/{chosen}") != commit:
        raise RepoCorrupt(f"the bundle has no branch {chosen!r} at its commit")
    if with_changes and header.worktree is not None:
        read = ("read-tree", "--reset", "-u", header.worktree)
        await git.run(*read, cwd=tree, what=what, on_progress=on_progress)
        index = header.index or commit
        await git.run("read-tree", *([index] if index else ["--empty"]), cwd=tree, what=what)
        await git.run("update-index", "-q", "--refresh", cwd=tree, what=what, check=False)
    elif commit is not None:
        read = ("read-tree", "--reset", "-u", commit)
        await git.run(*read, cwd=tree, what=what, on_progress=on_progress)
    return Restored(chosen, commit, tuple(notes))


async def _append(git: Git, path: Path, text: str) -> None:
    """Write as the git user: it owns the directory and could have put a link there, so root must not follow it."""
    if not text:
        return
    process = await asyncio.create_subprocess_exec(
        "/usr/bin/tee",
        "-a",
        os.fspath(path),
        env={"LC_ALL": "C"},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        user=git.user[0] if git.user else None,
        group=git.user[1] if git.user else None,
        extra_groups=[] if git.user else None,
        umask=0o022,
    )
    try:
        async with asyncio.timeout(30):
            _, errors = await process.communicate(text.encode("utf-8", "surrogateescape"))
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode != 0:
        raise CloneFailed(f"{path.name} could not be written: {errors.decode('utf-8', 'replace').strip()[:300]}")
