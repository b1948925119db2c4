"""Packs a local repository, with its uncommitted changes, into one file for the node.  Runs in the CLI as its caller.

Invariants:

- Nothing is written into the caller's repository: not its index, refs, objects or work tree.  A temporary bare
  repository beside the output borrows the caller's objects through `objects/info/alternates`; the tree of uncommitted
  changes is made with a copy of the index and an object directory of our own.  So there is nothing to clean up in the
  caller's repository after Ctrl-C or kill -9; the temporary directory is all that can be left, and only by kill -9.
  (git may renew the mtime of a loose object that it would otherwise have written again.)
- The file is an ordinary git bundle without prerequisites: branches, tags, the upstreams of branches, HEAD, and
      refs/roost/worktree   a parentless commit: its tree is the work tree (tracked, deleted, untracked but not
                            ignored), its message one JSON document (`FORMAT`) with what refs cannot say
      refs/roost/index      a parentless commit whose tree is the index, so that staged stays staged
- A shallow repository stays shallow: its boundary is in the JSON, since a bundle has no place for it.
- Credentials in remote URLs stay here.

What git is run with here is the caller's own configuration (filters, ignore files, safe.directory), because the
caller's `git status` shall agree with what arrives.  Hooks and fsmonitor are off.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from roost.errors import CloneFailed, HostDiskFull, InvalidRepository, MissingProgram, RepoNotTrusted, RepoTimeout
from roost.repos.urls import directory_name, strip_credentials

FORMAT: Final = 1
WORKTREE_REF: Final = "refs/roost/worktree"
INDEX_REF: Final = "refs/roost/index"
_QUICK_S: Final = 60.0
_LONG_S: Final = 1800.0
_SCAN_BYTES: Final = 1 << 20
_OPTIONS: Final = (
    *("-c", "core.hooksPath=/dev/null"),
    *("-c", "core.fsmonitor=false"),
    *("-c", "core.splitIndex=false"),  # a split index would write its shared half into the caller's .git
    *("-c", "core.compression=1"),
    *("-c", "gc.auto=0"),
)
_DROPPED = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_OBJECT_DIRECTORY",
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_COMMON_DIR",
    "GIT_NAMESPACE",
    "GIT_PREFIX",
    "GIT_SHALLOW_FILE",
    "GIT_GRAFT_FILE",
    "GIT_IMPLICIT_WORK_TREE",
    "GIT_INTERNAL_SUPER_PREFIX",
    "GIT_EXTERNAL_DIFF",
    "GIT_LITERAL_PATHSPECS",
    "GIT_TRACE",
)


@dataclass(frozen=True, slots=True)
class BundleInfo:
    """What was packed."""

    repo_name: str
    origin_url: str | None
    """Without credentials; None when there is no remote, or it is a path of the caller's machine."""
    branch: str | None
    """None: HEAD is detached."""
    commit: str | None
    """None: there is no commit yet."""
    has_changes: bool
    bytes: int
    notes: tuple[str, ...] = ()
    """What did not come along, as sentences for the caller."""


@dataclass(frozen=True, slots=True)
class _Source:
    """The caller's repository."""

    top: Path
    """Where commands run: the work tree's top, or the bare repository."""
    bare: bool
    git_dir: Path
    objects: Path
    object_format: str
    branch: str | None
    commit: str | None


def make_bundle(path: Path, out: Path) -> BundleInfo:
    """Write the repository that holds `path` to the file `out`.

    Raises InvalidRepository (no repository, or one that cannot be sent whole), RepoNotTrusted, MissingProgram,
    HostDiskFull, RepoTimeout, CloneFailed.
    """
    if shutil.which("git") is None:
        raise MissingProgram("git is not installed", next_step="Install the package `git`, or give a URL.")
    source = _open(path)
    with tempfile.TemporaryDirectory(prefix=".roost-bundle-", dir=out.parent, ignore_cleanup_errors=True) as name:
        packing = _Packing(source, Path(name))
        info = packing.pack(out)
    return info


def find_top(path: Path) -> Path:
    """The top level of the repository that holds `path`; InvalidRepository when there is none."""
    return _open(path).top


def _open(path: Path) -> _Source:
    if not path.exists():
        raise InvalidRepository(f"{path} does not exist")
    start = (path if path.is_dir() else path.parent).resolve()
    try:
        bare = _ask(start, "rev-parse", "--is-bare-repository") == "true"
        git_dir = Path(_ask(start, "rev-parse", "--absolute-git-dir"))
        inside = _ask(start, "rev-parse", "--is-inside-work-tree") == "true"
    except _GitFailed as failure:
        raise _cannot_open(start, failure) from failure
    if not bare and not inside:  # somewhere in .git
        start = git_dir.parent
    top = git_dir if bare else Path(_ask(start, "rev-parse", "--show-toplevel"))
    for key in ("extensions.partialClone", "remote.origin.promisor"):
        if _ask(top, "config", "--get", key, check=False):
            raise InvalidRepository(
                f"{top} is a partial clone: objects are missing in it",
                next_step="Give its URL instead of the path, or clone it again without --filter.",
            )
    branch = _ask(top, "symbolic-ref", "-q", "--short", "HEAD", check=False) or None
    commit = _ask(top, "rev-parse", "-q", "--verify", "HEAD^{commit}", check=False) or None
    objects = Path(_ask(top, "rev-parse", "--git-path", "objects"))
    object_format = _ask(top, "rev-parse", "--show-object-format")
    return _Source(top, bare, git_dir, (top / objects).resolve(), object_format, branch, commit)


def _cannot_open(start: Path, failure: _GitFailed) -> Exception:
    text = failure.stderr
    if "dubious ownership" in text or "safe.directory" in text:
        return RepoNotTrusted(
            f"the repository at {start} belongs to another user, and git refuses it",
            next_step=f"If you trust it: git config --global --add safe.directory '{start}'",
        )
    if "not a git repository" in text or "cannot be used without a working tree" in text:
        return InvalidRepository(f"{start} is not in a git repository")
    return InvalidRepository(f"{start} cannot be read: {text.strip()[-400:]}")


class _Packing:
    def __init__(self, source: _Source, work: Path) -> None:
        self._source = source
        self._repo = work / "repo.git"
        self._index = work / "index"
        self._pristine = work / "index.before"
        self._bundle = work / "bundle"
        self._notes: list[str] = []

    def pack(self, out: Path) -> BundleInfo:
        source = self._source
        self._borrow()
        refs = self._refs()
        shallow = self._shallow()
        staged, worktree = (None, None) if source.bare else self._trees()
        base = _ask(source.top, "rev-parse", f"{source.commit}^{{tree}}") if source.commit else self._empty_tree()
        has_changes = worktree is not None and (worktree != base or (staged or base) != base)
        remotes = self._remotes()
        self._look_for_notes(worktree or base)
        meta = {
            "format": FORMAT,
            "branch": source.branch,
            "commit": source.commit,
            "worktree": worktree is not None,
            "has_changes": has_changes,
            "shallow": shallow,
            "remotes": remotes,
            "branches": self._upstreams(),
        }
        refs[WORKTREE_REF] = self._commit(worktree or base, json.dumps(meta))
        if staged is not None:
            refs[INDEX_REF] = self._commit(staged, "index")
        self._create(refs)
        try:
            size = self._bundle.stat().st_size
            shutil.move(self._bundle, out)
        except OSError as error:
            raise CloneFailed(f"the bundle could not be written to {out}: {error}") from error
        name = directory_name(source.top.as_posix())
        return BundleInfo(
            name, self._origin(remotes), source.branch, source.commit, has_changes, size, tuple(self._notes)
        )

    def _borrow(self) -> None:
        arguments = ("init", "-q", "--bare", "--template=", f"--object-format={self._source.object_format}")
        _git(self._repo.parent, *arguments, str(self._repo))
        (self._repo / "objects" / "info").mkdir(exist_ok=True)
        (self._repo / "objects" / "info" / "alternates").write_bytes(_c_quoted(self._source.objects) + b"\n")

    def _refs(self) -> dict[str, str]:
        """Name to object: branches, tags, and the remote branches that local ones track."""
        listed = self._each_ref("%(objectname) %(refname)", "refs/heads", "refs/tags")
        refs = {name: oid for oid, _, name in (line.partition(" ") for line in listed)}
        upstreams = {name for name in self._each_ref("%(upstream)", "refs/heads") if name.startswith("refs/remotes/")}
        if upstreams:
            for line in self._each_ref("%(objectname) %(refname)", "refs/remotes"):
                oid, _, name = line.partition(" ")
                if name in upstreams:
                    refs[name] = oid
        return refs

    def _each_ref(self, form: str, *patterns: str) -> list[str]:
        listed = _ask(self._source.top, "for-each-ref", f"--format={form}", *patterns)
        return [line for line in listed.split("\n") if line]

    def _shallow(self) -> list[str]:
        path = self._source.top / _ask(self._source.top, "rev-parse", "--git-path", "shallow")
        if not path.is_file():
            return []
        content = path.read_text()
        (self._repo / "shallow").write_text(content)
        self._notes.append("The repository is shallow; its history ends where it does here.")
        return content.split()

    def _trees(self) -> tuple[str | None, str]:
        """The index as a tree (None when it has conflicts) and the work tree as a tree."""
        index = self._source.top / _ask(self._source.top, "rev-parse", "--git-path", "index")
        if index.is_file():
            shutil.copy2(index, self._index)
            shutil.copy2(index, self._pristine)
        ours = {"GIT_OBJECT_DIRECTORY": str(self._repo / "objects")}
        staged: str | None = None
        try:
            staged = _ask(self._source.top, "write-tree", env={**ours, "GIT_INDEX_FILE": str(self._pristine)})
        except _GitFailed as failure:
            if "unmerged" not in failure.stderr and "error building trees" not in failure.stderr:
                raise self._failed("the index could not be read", failure) from failure
            self._notes.append("A merge is under way; its files come along as they are, the merge itself does not.")
        env = {**ours, "GIT_INDEX_FILE": str(self._index)}
        added = _git(self._source.top, "add", "-A", "--ignore-errors", env=env, timeout_s=_LONG_S, check=False)
        if added.returncode != 0:
            self._unreadable(_text(added.stderr))
        if b"embedded git repository" in added.stderr:
            self._notes.append("Repositories inside this one, that are no submodules, did not come along.")
        try:
            return staged, _ask(self._source.top, "write-tree", env=env)
        except _GitFailed as failure:
            raise self._failed("the uncommitted changes could not be read", failure) from failure

    def _unreadable(self, stderr: str) -> None:
        errors = [line for line in stderr.splitlines() if line.startswith(("error:", "fatal:"))]
        refused = [line for line in errors if "open(" in line or "unable to index file" in line]
        fatal = [line for line in errors if line.startswith("fatal:") and "adding files failed" not in line]
        if fatal or not refused:
            raise self._failed("the uncommitted changes could not be read", _GitFailed(stderr))
        shown = "; ".join(line.removeprefix("error: ") for line in refused[:3])
        self._notes.append(f"Files that you may not read did not come along: {shown}.")

    def _remotes(self) -> dict[str, str]:
        remotes: dict[str, str] = {}
        for name in _ask(self._source.top, "remote").split("\n"):
            if not name or name.startswith("-"):
                continue
            url = _ask(self._source.top, "remote", "get-url", "--", name, check=False)
            stripped = strip_credentials(url) if url else None
            if stripped is None:
                self._notes.append(f"Remote {name} is no URL that works elsewhere; it did not come along.")
            else:
                remotes[name] = stripped
        return remotes

    def _origin(self, remotes: Mapping[str, str]) -> str | None:
        if "origin" in remotes:
            return remotes["origin"]
        return next(iter(remotes.values())) if len(remotes) == 1 else None

    def _upstreams(self) -> dict[str, list[str]]:
        """Branch to [remote, ref on the remote]."""
        listed = self._each_ref("%(refname:lstrip=2) %(upstream:remotename) %(upstream:remoteref)", "refs/heads")
        rows = [line.split(" ") for line in listed]
        return {row[0]: [row[1], row[2]] for row in rows if len(row) == 3 and row[1] and row[2]}

    def _look_for_notes(self, tree: str) -> None:
        listed = _git(self._repo, "ls-tree", "-r", "-z", "--full-tree", tree, timeout_s=_LONG_S).stdout
        entries = listed.split(b"\0")
        if any(entry.startswith(b"160000 ") for entry in entries):
            self._notes.append("Submodules come without their content; run `git submodule update --init` inside.")
        if _ask(self._source.top, "config", "--bool", "core.sparseCheckout", check=False) == "true":
            self._notes.append("The checkout is sparse here; all files are there in the workspace.")
        for entry in entries:
            head, _, name = entry.partition(b"\t")
            if name.rpartition(b"/")[2] == b".gitattributes":
                blob = _git(self._repo, "cat-file", "blob", _text(head.split(b" ")[2])).stdout
                if b"filter=lfs" in blob[:_SCAN_BYTES]:
                    self._notes.append("Files in Git LFS come as pointers; run `git lfs pull` inside.")
                    return

    def _commit(self, tree: str, message: str) -> str:
        who = {"NAME": "roost", "EMAIL": "roost@localhost", "DATE": "1000000000 +0000"}
        env = {f"GIT_{role}_{part}": value for role in ("AUTHOR", "COMMITTER") for part, value in who.items()}
        arguments = ("-c", "commit.gpgSign=false", "commit-tree", "-F", "-", tree)
        return _text(_git(self._repo, *arguments, env=env, stdin=message.encode()).stdout).strip()

    def _empty_tree(self) -> str:
        return _text(_git(self._repo, "hash-object", "-w", "-t", "tree", "--stdin", stdin=b"").stdout).strip()

    def _create(self, refs: Mapping[str, str]) -> None:
        # packed-refs written at once: update-ref would make a file for each of what may be thousands of tags.
        lines = [f"{oid} {name}\n" for name, oid in sorted(refs.items())]
        (self._repo / "packed-refs").write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
        head = self._source.commit or "ref: refs/heads/roost-unborn"
        (self._repo / "HEAD").write_text(f"{head}\n")
        what = ["--all", "HEAD"] if self._source.commit else ["--all"]
        env = {"GIT_NO_REPLACE_OBJECTS": "1"}
        try:
            _git(self._repo, "bundle", "create", "-q", str(self._bundle), *what, env=env, timeout_s=_LONG_S)
        except _GitFailed as failure:
            raise self._failed("the repository could not be packed", failure) from failure

    def _failed(self, what: str, failure: _GitFailed) -> Exception:
        text = failure.stderr.strip()[-600:]
        if "No space left on device" in text:
            return HostDiskFull(f"{what}: no space left", next_step="Free space where TMPDIR points to.")
        return CloneFailed(f"{what}: {text}", next_step="`git fsck` in the repository says whether it is sound.")


class _GitFailed(Exception):
    def __init__(self, stderr: str) -> None:
        super().__init__(stderr)
        self.stderr = stderr


def _git(
    cwd: Path,
    *args: str,
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
    timeout_s: float = _QUICK_S,
    check: bool = True,
) -> subprocess.CompletedProcess[bytes]:
    inherited = {key: value for key, value in os.environ.items() if key not in _DROPPED}
    settled = {"LC_ALL": "C", "LANGUAGE": "C", "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(
            ["git", *_OPTIONS, *args],
            cwd=cwd,
            env={**inherited, **settled, **(env or {})},
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RepoTimeout(f"git {args[0]} in {cwd} was not done after {timeout_s:g} s") from error
    except FileNotFoundError as error:
        raise MissingProgram("git is not installed", next_step="Install the package `git`, or give a URL.") from error
    if check and done.returncode != 0:
        raise _GitFailed(_text(done.stderr))
    return done


def _ask(cwd: Path, *args: str, env: Mapping[str, str] | None = None, check: bool = True) -> str:
    """The output of a quick command, without the newline at its end; empty when it failed unchecked."""
    done = _git(cwd, *args, env=env, check=check)
    return _text(done.stdout).removesuffix("\n") if done.returncode == 0 else ""


def _text(data: bytes) -> str:
    # Paths and ref names are bytes; surrogates bring them back unchanged.
    return data.decode("utf-8", "surrogateescape")


def _c_quoted(path: Path) -> bytes:
    """A path as objects/info/alternates wants it: C-quoted when it would not stand for itself."""
    raw = os.fsencode(path)
    if raw[:1] not in (b'"', b"#") and b"\n" not in raw:
        return raw
    escaped = b"".join(
        b"\\%03o" % byte if byte < 32 or byte >= 127 or byte in b'"\\' else bytes([byte]) for byte in raw
    )
    return b'"' + escaped + b'"'
