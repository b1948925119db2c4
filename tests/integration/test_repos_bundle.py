"""A local repository travels as a bundle and arrives as it was: history, changes, upstreams; its source untouched."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from roost.errors import BadRef, CloneFailed, InvalidRepository, MissingProgram, RepoCorrupt, RepoNotTrusted
from roost.repos.bundle import make_bundle
from roost.repos.clone import CloneRequest, CloneResult, clone, discard, stream_tar
from roost.settings import NetSettings, RepoSettings
from tests.integration.repos_support import NOBODY, git, make_repo, remove, wait_for


@pytest.fixture
def place(monkeypatch):
    path = Path(tempfile.mkdtemp(prefix="roost-test-", dir="/var/tmp"))
    path.chmod(0o711)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    yield path
    remove(path)


@pytest.fixture
def staging(place: Path):
    path = place / "staging"
    path.mkdir(mode=0o711)
    yield path
    assert [entry.name for entry in path.iterdir() if entry.name.startswith(".making-")] == []


async def open_bundle(bundle: Path, staging: Path, **options) -> CloneResult:
    request = CloneRequest(bundle=bundle, **options)
    return await clone(request, staging, user=NOBODY, settings=RepoSettings(), net=NetSettings())


def there(result: CloneResult, *args: str) -> str:
    return git(result.path, "-c", f"safe.directory={result.path}", *args)


def fingerprint(repo: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file of a repository: mode, mtime, content."""
    found = {}
    for directory, _, names in os.walk(repo):
        for name in names:
            path = Path(directory, name)
            status = path.lstat()
            content = os.fsencode(os.readlink(path)) if path.is_symlink() else path.read_bytes()
            # git renews the mtime of loose objects it did not have to write; nothing reads that but gc
            written = 0 if "/.git/objects/" in str(path) else status.st_mtime_ns
            found[str(path)] = (status.st_mode, written, content)
    return found


def dirty(repo: Path) -> None:
    """Every kind of change."""
    (repo / "README.md").write_text("changed\n")
    (repo / "src/a.py").unlink()
    (repo / "staged").write_text("staged\n")
    git(repo, "add", "staged")
    (repo / "untracked dir").mkdir()
    (repo / "untracked dir" / "ünï\ncode").write_text("u\n")
    (repo / "run").write_text("#!/bin/sh\n")
    (repo / "run").chmod(0o755)
    (repo / "link").symlink_to("/etc/passwd")
    (repo / ".gitignore").write_text("ignored\n")
    (repo / "ignored").write_text("no\n")


async def test_changes_travel_and_the_source_is_untouched(place, staging):
    repo = make_repo(place / "a repo ü")
    git(repo, "branch", "feature")
    git(repo, "tag", "-a", "v1", "-m", "one")
    git(repo, "remote", "add", "origin", "https://user:tok3n@git.example/team/thing.git")
    git(repo, "update-ref", "refs/remotes/origin/main", "HEAD")
    git(repo, "config", "branch.main.remote", "origin")
    git(repo, "config", "branch.main.merge", "refs/heads/main")
    dirty(repo)
    before = fingerprint(repo)
    out = place / "out.bundle"
    info = make_bundle(repo / "src", out)
    assert fingerprint(repo) == before
    assert info.repo_name == "a-repo-ü" and info.branch == "main" and info.has_changes
    assert info.origin_url == "https://git.example/team/thing.git"
    assert info.bytes == out.stat().st_size and info.notes == ()
    assert b"tok3n" not in out.read_bytes()
    assert sorted(entry.name for entry in place.iterdir()) == ["a repo ü", "out.bundle", "staging"]
    out.chmod(0o600)
    result = await open_bundle(out, staging)
    assert result.commit == info.commit == git(repo, "rev-parse", "HEAD") and result.branch == "main"
    assert there(result, "status", "--porcelain=v2", "--branch", "-z") == git(
        repo, "status", "--porcelain=v2", "--branch", "-z"
    )
    assert there(result, "diff", "--cached") == git(repo, "diff", "--cached")
    assert there(result, "diff") == git(repo, "diff")
    assert (result.path / "run").stat().st_mode & 0o777 == 0o755
    assert os.readlink(result.path / "link") == "/etc/passwd"
    assert (result.path / "untracked dir" / "ünï\ncode").read_text() == "u\n"
    assert not (result.path / "ignored").exists()
    assert there(result, "for-each-ref", "--format=%(refname) %(objectname)") == git(
        repo, "for-each-ref", "--format=%(refname) %(objectname)"
    )
    assert there(result, "config", "remote.origin.url") == "https://git.example/team/thing.git"
    assert there(result, "rev-parse", "--abbrev-ref", "main@{u}") == "origin/main"
    there(result, "fsck", "--strict")
    other = await open_bundle(out, staging, branch="feature")
    assert other.branch == "feature" and other.notes and there(other, "status", "--porcelain") == ""
    with pytest.raises(BadRef):
        await open_bundle(out, staging, branch="nothing")
    await discard(other)


async def test_clean_detached_and_without_commits(place, staging):
    repo = make_repo(place / "r")
    git(repo, "checkout", "-q", "--detach")
    info = make_bundle(repo, place / "b")
    assert (info.branch, info.has_changes, info.origin_url) == (None, False, None)
    result = await open_bundle(place / "b", staging)
    assert result.branch is None and result.commit == info.commit and there(result, "status", "--porcelain") == ""

    empty = place / "empty"
    empty.mkdir()
    git(empty, "init", "-q", "-b", "trunk")
    info = make_bundle(empty, place / "b")
    assert (info.branch, info.commit, info.has_changes) == ("trunk", None, False)
    result = await open_bundle(place / "b", staging)
    assert (result.branch, result.commit) == ("trunk", None)
    (empty / "new").write_text("n\n")
    assert make_bundle(empty, place / "b").has_changes
    result = await open_bundle(place / "b", staging)
    assert there(result, "status", "--porcelain") == "?? new"


async def test_shallow_worktree_bare_and_sparse(place, staging):
    repo = make_repo(place / "r")
    for number in range(5):
        git(repo, "commit", "-q", "--allow-empty", "-m", str(number))
    git(place, "clone", "-q", "--depth=2", f"file://{repo}", "shallow")
    (place / "shallow" / "README.md").write_text("x\n")
    info = make_bundle(place / "shallow", place / "b")
    assert any("shallow" in note for note in info.notes)
    result = await open_bundle(place / "b", staging)
    assert there(result, "rev-list", "--count", "HEAD") == "2"
    assert there(result, "status", "--porcelain") == " M README.md"
    there(result, "fsck")

    git(repo, "worktree", "add", "-q", "-b", "wt", place / "linked")
    (place / "linked" / "only-here").write_text("x\n")
    info = make_bundle(place / "linked", place / "b")
    assert (info.repo_name, info.branch, info.has_changes) == ("linked", "wt", True)
    assert there(await open_bundle(place / "b", staging), "status", "--porcelain") == "?? only-here"

    git(place, "clone", "-q", "--bare", repo, "bare.git")
    info = make_bundle(place / "bare.git", place / "b")
    assert (info.repo_name, info.branch, info.has_changes) == ("bare", "main", False)
    assert (await open_bundle(place / "b", staging)).path.joinpath("README.md").exists()

    git(repo, "sparse-checkout", "set", "nothing")
    assert not (repo / "src").exists()
    info = make_bundle(repo, place / "b")
    assert any("sparse" in note for note in info.notes) and not info.has_changes
    assert (await open_bundle(place / "b", staging)).path.joinpath("src/a.py").exists()


async def test_merge_in_progress_submodules_lfs_and_nested(place, staging):
    repo = make_repo(place / "r", {"a": "1\n", ".gitattributes": "*.bin filter=lfs\n"})
    git(repo, "checkout", "-q", "-b", "side")
    (repo / "a").write_text("2\n")
    git(repo, "commit", "-qam", "two")
    git(repo, "checkout", "-q", "main")
    (repo / "a").write_text("3\n")
    git(repo, "commit", "-qam", "three")
    sub = make_repo(place / "sub")
    git(repo, "submodule", "--quiet", "add", sub, "sub")
    git(repo, "commit", "-q", "-m", "sub")
    make_repo(repo / "nested")
    with pytest.raises(AssertionError, match=r"merge"):
        git(repo, "merge", "side")
    assert "UU a" in git(repo, "status", "--porcelain")
    info = make_bundle(repo, place / "b")
    for word in ("merge", "Submodules", "LFS", "inside this one"):
        assert any(word in note for note in info.notes), (word, info.notes)
    result = await open_bundle(place / "b", staging)
    assert "<<<<<<<" in (result.path / "a").read_text()
    assert (result.path / "sub").is_dir()


def test_what_is_no_repository(place, monkeypatch):
    with pytest.raises(InvalidRepository):
        make_bundle(place / "nothing", place / "b")
    (place / "plain").mkdir()
    with pytest.raises(InvalidRepository):
        make_bundle(place / "plain", place / "b")
    repo = make_repo(place / "r")
    git(place, "clone", "-q", "--bare", repo, "bare.git")
    git(place / "bare.git", "config", "uploadpack.allowFilter", "true")
    git(place, "clone", "-q", "--filter=blob:none", f"file://{place}/bare.git", "partial")
    with pytest.raises(InvalidRepository) as caught:
        make_bundle(place / "partial", place / "b")
    assert "URL" in caught.value.hint
    for path in (repo, *repo.rglob("*")):
        os.chown(path, *NOBODY, follow_symlinks=False)
    with pytest.raises(RepoNotTrusted) as trust:
        make_bundle(repo, place / "b")
    assert f"safe.directory '{repo}'" in trust.value.hint
    monkeypatch.setenv("PATH", str(place))
    with pytest.raises(MissingProgram):
        make_bundle(repo, place / "b")
    assert not (place / "b").exists()


def test_a_closed_parent_and_a_file_that_may_not_be_read(place):
    """As an ordinary user, below directories of mode 0700."""
    home = place / "home"
    home.mkdir()
    repo = make_repo(home / "r")
    (repo / "secret").write_text("x")
    for path in (home, repo, *repo.rglob("*")):
        os.chown(path, *NOBODY, follow_symlinks=False)
    os.chown(repo / "secret", 0, 0)
    (repo / "secret").chmod(0o600)
    home.chmod(0o700)
    code = "import sys; from pathlib import Path; from roost.repos.bundle import make_bundle; "
    code += "print(make_bundle(Path(sys.argv[1]), Path(sys.argv[2])).notes)"
    done = subprocess.run(
        ["/usr/bin/python3", "-c", code, repo, home / "b"],
        env={"PYTHONPATH": str(Path("src").absolute()), "PATH": os.environ["PATH"], "GIT_CONFIG_GLOBAL": "/dev/null"},
        user=NOBODY[0], group=NOBODY[1], extra_groups=[], cwd="/",
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "may not read" in done.stdout and "secret" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted(place, number):
    repo = make_repo(place / "r")
    dirty(repo)
    slow = place / "slow"
    slow.mkdir()
    real = shutil.which("git")
    marker = place / "started"
    (slow / "git").write_text(
        f'#!/bin/sh\ncase "$*" in *"bundle create"*) touch {marker}; exec sleep 3;; esac\nexec {real} "$@"\n'
    )
    (slow / "git").chmod(0o755)
    before = fingerprint(repo)
    code = "import sys; from pathlib import Path; from roost.repos.bundle import make_bundle; "
    code += "make_bundle(Path(sys.argv[1]), Path(sys.argv[2]))"
    env = {**os.environ, "PATH": f"{slow}:{os.environ['PATH']}"}
    child = subprocess.Popen(
        [sys.executable, "-c", code, repo, place / "b"], env=env, stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_for(marker.exists)
    os.killpg(child.pid, number)
    child.wait(10)
    assert fingerprint(repo) == before and not (place / "b").exists()
    if number == signal.SIGINT:
        assert not list(place.glob(".roost-bundle-*"))


async def test_hostile_bundles(place, staging):
    repo = make_repo(place / "r")
    make_bundle(repo, place / "b")
    good = (place / "b").read_bytes()
    cases = {
        "empty": b"",
        "text": b"hello\n\nworld",
        "cut": good[:-40],
        "spoilt": good[:-60] + bytes(byte ^ 1 for byte in good[-60:-40]) + good[-40:],
        "prerequisite": good.replace(b"# v2 git bundle\n", b"# v2 git bundle\n-" + b"1" * 40 + b" x\n"),
        "capability": good.replace(b"# v2 git bundle\n", b"# v3 git bundle\n@filter=blob:none\n"),
        "missing object": good.replace(b" refs/heads/main", b" refs/heads/main\n" + b"2" * 40 + b" refs/heads/x"),
    }
    for name, content in cases.items():
        (place / "x").write_bytes(content)
        with pytest.raises(RepoCorrupt):
            await open_bundle(place / "x", staging)
            pytest.fail(name)
    odd = good.replace(b" refs/heads/main", b" refs/heads/../../../etc/x\n" + b"2" * 40 + b" refs/heads/a b")
    (place / "x").write_bytes(odd)
    with pytest.raises(RepoCorrupt):
        await open_bundle(place / "x", staging)
    (place / "link").symlink_to(place / "b")
    with pytest.raises(CloneFailed):
        await open_bundle(place / "link", staging)


async def test_a_plain_bundle_of_git(place, staging):
    repo = make_repo(place / "r")
    git(repo, "bundle", "create", "-q", place / "b", "--all", "HEAD")
    result = await open_bundle(place / "b", staging, origin_url="https://u:p@git.example/r.git")
    assert result.branch == "main" and there(result, "status", "--porcelain") == ""
    assert there(result, "config", "remote.origin.url") == "https://git.example/r.git"


async def test_sha256(place, staging):
    repo = place / "r"
    repo.mkdir()
    git(repo, "init", "-q", "--object-format=sha256")
    (repo / "a").write_text("a\n")
    git(repo, "add", "-A")
    git(repo, "commit", "-q", "-m", "first")
    (repo / "a").write_text("b\n")
    make_bundle(repo, place / "b")
    result = await open_bundle(place / "b", staging)
    assert len(result.commit or "") == 64 and there(result, "status", "--porcelain") == " M a"


async def test_tar_arrives_by_busybox(place, staging):
    repo = make_repo(place / "r")
    dirty(repo)
    long = "/".join(["d" * 60] * 4)
    (repo / long).mkdir(parents=True)
    (repo / long / ("f" * 120)).write_text("long\n")
    Path(os.fsdecode(os.fsencode(repo) + b"/\xff\xfe raw")).write_text("raw\n")
    make_bundle(repo, place / "b")
    result = await open_bundle(place / "b", staging)
    data = b"".join([chunk async for chunk in stream_tar(result.path)])
    assert data == b"".join([chunk async for chunk in stream_tar(result.path)])
    target = place / "target"
    target.mkdir()
    subprocess.run(["busybox", "tar", "-x", "-f", "-", "-C", target], input=data, check=True, timeout=60)

    def listing(top: Path):
        for directory, folders, names in os.walk(os.fsencode(top)):
            for name in (*folders, *names):
                path = os.path.join(directory, name)
                status = os.lstat(path)
                link = os.path.islink(path)
                here = Path(os.fsdecode(path))
                content = os.readlink(path) if link else here.read_bytes() if here.is_file() else b""
                yield os.path.relpath(path, os.fsencode(top)), 0 if link else status.st_mode, content

    assert sorted(listing(target)) == sorted(listing(result.path))
    assert (target / "README.md").stat().st_uid == 0


@pytest.mark.slow
async def test_twenty_thousand_files(place, staging):
    repo = place / "r"
    repo.mkdir()
    git(repo, "init", "-q")
    for number in range(20_000):
        path = repo / f"d{number % 200}" / f"f{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{number}\n" * 40)
    git(repo, "add", "-A")
    git(repo, "commit", "-q", "-m", "many")
    (repo / "d1" / "f1").write_text("x")
    marks = [time.monotonic()]
    make_bundle(repo, place / "b")
    marks.append(time.monotonic())
    result = await open_bundle(place / "b", staging)
    marks.append(time.monotonic())
    size = 0
    async for chunk in stream_tar(result.path):
        size += len(chunk)
    marks.append(time.monotonic())
    spans = [round(later - earlier, 2) for earlier, later in itertools.pairwise(marks)]
    print(f"20k files: bundle {spans[0]} s, open {spans[1]} s, tar {spans[2]} s for {size >> 20} MiB")
    assert there(result, "status", "--porcelain") == " M d1/f1"
    assert max(spans) < 30
