"""Clones from real servers, and every way in which they fail: typed, and nothing half-made left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from roost.errors import (
    AddressNotAllowed,
    BadRef,
    ProtocolNotAllowed,
    RepoAuth,
    RepoCorrupt,
    RepoHostKey,
    RepoNotFound,
    RepoTimeout,
    RepoUnreachable,
)
from roost.repos import agent
from roost.repos.clone import CloneRequest, CloneResult, clone, sweep
from roost.repos.git import Progress
from roost.repos.urls import file_url, parse_url
from roost.settings import NetSettings, RepoSettings
from tests.integration.repos_support import (
    ALL,
    LOCAL,
    NOBODY,
    Authority,
    GitHttp,
    agent_running,
    free_port,
    git,
    listens,
    make_authority,
    make_repo,
    processes_below,
    remove,
    sshd_running,
    wait_for,
)

SECRET = "s3cret-Pa55word"


@pytest.fixture
def place():
    path = Path(tempfile.mkdtemp(prefix="roost-test-", dir="/var/tmp"))
    path.chmod(0o711)
    yield path
    remove(path)


@pytest.fixture
def staging(place: Path):
    path = place / "staging"
    path.mkdir(mode=0o711)
    yield path
    left = [entry.name for entry in path.iterdir() if entry.name.startswith(".making-")]
    assert left == []
    assert processes_below(path) == []


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def served(place: Path) -> Path:
    """A directory with `project.git`, and the directory a server may show."""
    repo = make_repo(place / "origin" / "work", {"README.md": "hello\n", "bin/run": "#!/bin/sh\n"})
    (repo / "bin/run").chmod(0o755)
    (repo / "link").symlink_to("README.md")
    git(repo, "add", "-A")
    git(repo, "commit", "-q", "-m", "second")
    git(repo, "branch", "other")
    git(repo, "tag", "v1")
    root = place / "served"
    root.mkdir()
    git(place, "clone", "-q", "--bare", repo, root / "project.git")
    return root


async def make(source: str, staging: Path, *, settings: RepoSettings = ALL, net: NetSettings = LOCAL, **options):
    agent_socket = options.pop("agent_socket", None)
    on_progress = options.pop("on_progress", None)
    request = CloneRequest(parse_url(source), **options)
    return await clone(
        request, staging, user=NOBODY, settings=settings, net=net, agent_socket=agent_socket, on_progress=on_progress
    )


def check_project(result: CloneResult, url: str, branch: str | None = "main") -> None:
    tree = result.path
    assert (tree / "README.md").read_text() == "hello\n"
    assert os.readlink(tree / "link") == "README.md"
    assert (tree / "bin/run").stat().st_mode & 0o777 == 0o755
    assert result.branch == branch and result.commit and len(result.commit) == 40
    assert result.bytes > 0 and result.seconds > 0
    assert git(tree, "-c", f"safe.directory={tree}", "status", "--porcelain") == ""
    config = (tree / ".git/config").read_text()
    assert f"url = {url}\n" in config
    assert not any((tree / ".git/hooks").glob("*")) if (tree / ".git/hooks").exists() else True
    assert tree.stat().st_uid == NOBODY[0]


async def test_http(served, staging):
    seen: list[Progress] = []
    with GitHttp(served).running() as site:
        url = f"{site.url}/project.git"
        result = await make(url, staging, on_progress=seen.append)
    check_project(result, url)
    assert any(one.phase == "Receiving objects" and one.percent == 100 for one in seen)
    assert [entry.name for entry in staging.iterdir()] == [result.path.name]


async def test_https_with_own_ca_and_password(served, staging, authority):
    with GitHttp(served, tls=authority.context, auth=("alice@corp", SECRET)).running() as site:
        url = f"{site.url}/project.git"
        settings = ALL.model_copy(update={"ca_file": str(authority.ca)})
        result = await make(url.replace("://", f"://alice%40corp:{SECRET}@"), staging, settings=settings)
        check_project(result, url)
        for directory, _, names in os.walk(result.path):
            for name in names:
                path = Path(directory, name)
                if stat.S_ISREG(path.lstat().st_mode):
                    assert SECRET.encode() not in path.read_bytes()
        assert sum(1 for _, header in site.requests if header) >= 1


async def test_the_password_is_in_no_command_line_or_environment(served, staging, authority):
    site = GitHttp(served, tls=authority.context, auth=("alice", SECRET), hang_after_refs=True)
    with site.running():
        settings = ALL.model_copy(update={"ca_file": str(authority.ca)})
        url = f"https://alice:{SECRET}@127.0.0.1:{site.port}/project.git"
        task = asyncio.create_task(make(url, staging, settings=settings))
        await asyncio.to_thread(wait_for, lambda: any(path.endswith("upload-pack") for path, _ in site.requests[1:]))
        found = processes_below(staging)
        assert found
        for line in found:
            for kind in ("cmdline", "environ"):
                assert SECRET.encode() not in Path("/proc", line.split()[0], kind).read_bytes()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_untrusted_certificate(served, staging, authority):
    with GitHttp(served, tls=authority.context).running() as site:
        with pytest.raises(RepoUnreachable) as caught:
            await make(f"{site.url}/project.git", staging)
    assert "ca_file" in caught.value.hint


async def test_credentials_needed_and_wrong(served, staging):
    with GitHttp(served, auth=("alice", SECRET)).running() as site:
        with pytest.raises(RepoAuth):
            await make(f"{site.url}/project.git", staging)
        with pytest.raises(RepoAuth) as caught:
            await make(f"http://alice:wr0ngsecret@127.0.0.1:{site.port}/project.git", staging)
    assert "wr0ngsecret" not in str(caught.value) + str(caught.value.details)


@pytest.mark.parametrize("status, kind", [(403, RepoAuth), (404, RepoNotFound), (500, RepoUnreachable)])
async def test_status(served, staging, status, kind):
    with GitHttp(served, status=status).running() as site:
        with pytest.raises(kind):
            await make(f"{site.url}/project.git", staging)


async def test_missing_repository_and_branch(served, staging):
    with GitHttp(served).running() as site:
        with pytest.raises(RepoNotFound):
            await make(f"{site.url}/nothing.git", staging)
        with pytest.raises(BadRef):
            await make(f"{site.url}/project.git", staging, branch="nothing")
        result = await make(f"{site.url}/project.git", staging, branch="other")
        assert result.branch == "other"
        tag = await make(f"{site.url}/project.git", staging, branch="v1")
        assert tag.branch is None and tag.commit == result.commit
    with pytest.raises(BadRef):
        await make("http://127.0.0.1:1/x", staging, branch="--upload-pack=x")


async def test_empty_repository(place, served, staging):
    git(place, "init", "-q", "--bare", served / "empty.git")
    with GitHttp(served).running() as site:
        result = await make(f"{site.url}/empty.git", staging)
    assert result.commit is None and result.notes == ("The repository is empty.",)


async def test_dead_port_and_unknown_host(staging):
    with pytest.raises(RepoUnreachable):
        await make(f"http://127.0.0.1:{free_port()}/x.git", staging)
    with pytest.raises(RepoUnreachable):
        await make("https://no-such-host.invalid/x.git", staging)


async def test_a_server_that_never_answers_ends_by_the_progress_limit(staging):
    settings = ALL.model_copy(update={"progress_timeout_s": 0.7})
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x.git"
        started = asyncio.get_running_loop().time()
        with pytest.raises(RepoTimeout) as caught:
            await make(url, staging, settings=settings)
        assert "nothing came" in caught.value.message
        assert asyncio.get_running_loop().time() - started < 6


async def test_the_total_limit(served, staging, monkeypatch):
    monkeypatch.setenv("GIT_COMMAND_TIMEOUT", "0.8")
    with GitHttp(served, hang_after_refs=True).running() as site:
        with pytest.raises(RepoTimeout):
            await make(f"{site.url}/project.git", staging)
        site.released.set()


@pytest.mark.parametrize("lie, kind", [({"cut_pack_at": 60}, RepoUnreachable), ({"spoil_pack": True}, RepoCorrupt)])
async def test_a_server_that_lies_in_the_middle_of_the_pack(place, served, staging, lie, kind):
    big = make_repo(place / "big", {f"f{n}": os.urandom(3000).hex() for n in range(30)})
    git(place, "clone", "-q", "--bare", big, served / "big.git")
    with GitHttp(served, **lie).running() as site:
        with pytest.raises(kind):
            await make(f"{site.url}/big.git", staging)


async def test_redirects(served, staging):
    with GitHttp(served).running() as other, GitHttp(served).running() as site:
        site.redirects = {
            "/old.git": f"{site.url}/project.git",
            "/rel.git": "/project.git",
            "/away.git": f"http://127.0.0.2:{other.port}/project.git",
            "/port.git": f"{other.url}/project.git",
            "/file.git": "file:///etc",
            "/loop.git": f"{site.url}/loop.git",
        }
        check_project(await make(f"{site.url}/old.git", staging), f"{site.url}/old.git")
        check_project(await make(f"{site.url}/rel.git", staging), f"{site.url}/rel.git")
        for name in ("away", "port"):
            with pytest.raises(AddressNotAllowed):
                await make(f"{site.url}/{name}.git", staging)
        assert other.requests == []
        with pytest.raises((RepoNotFound, AddressNotAllowed)):
            await make(f"{site.url}/file.git", staging)
        with pytest.raises(Exception, match="301"):
            await make(f"{site.url}/loop.git", staging)


async def test_private_addresses_need_trust_or_policy(served, staging):
    with GitHttp(served).running() as site:
        for host in ("127.0.0.1", "localhost", "2130706433", "127.1", "[::ffff:127.0.0.1]"):
            with pytest.raises(AddressNotAllowed):
                await make(f"http://{host}:{site.port}/project.git", staging, net=NetSettings())
        assert site.requests == []
        result = await make(f"http://localhost:{site.port}/project.git", staging, net=NetSettings(), trusted=True)
        assert result.commit
        allowed = NetSettings(allow=["localhost"])
        assert (await make(f"http://localhost:{site.port}/project.git", staging, net=allowed)).commit


async def test_protocols(served, staging):
    with pytest.raises(ProtocolNotAllowed):
        await make("http://127.0.0.1:1/x.git", staging, settings=RepoSettings())
    with pytest.raises(ProtocolNotAllowed):
        await make(str(file_url(served / "project.git")), staging, settings=RepoSettings())
    url = str(file_url(served / "project.git"))
    check_project(await make(url, staging, settings=RepoSettings(), trusted=True), url)


async def test_file_that_the_git_user_may_not_read(place, served, staging):
    served.chmod(0o700)
    with pytest.raises(RepoAuth) as caught:
        await make(str(file_url(served / "project.git")), staging)
    assert "path itself" in caught.value.hint
    with pytest.raises(RepoNotFound):
        await make(str(file_url(place / "nothing.git")), staging)


async def test_git_protocol(served, staging):
    port = free_port()
    log = (staging.parent / "daemon.log").open("w")
    command = ["git", "daemon", "--listen=127.0.0.1", f"--port={port}", "--export-all", f"--base-path={served}"]
    env = {**os.environ, "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
    daemon = subprocess.Popen(command, stderr=log, env=env, start_new_session=True)
    try:
        await asyncio.to_thread(wait_for, lambda: listens(port))
        url = f"git://localhost:{port}/project.git"
        check_project(await make(url, staging, trusted=True), url)
    finally:
        os.killpg(daemon.pid, signal.SIGTERM)
        daemon.wait(10)
        log.close()


async def test_ssh_through_the_agent_relay(place, served, staging):
    passed: list[int] = []
    with sshd_running(place / "sshd") as sshd, agent_running(place / "agent", sshd.user_key) as real:

        async def ask(body: bytes) -> bytes:
            passed.append(body[0])
            return await agent.answer(body, str(real))

        url = f"ssh://root@127.0.0.1:{sshd.port}{served}/project.git"
        async with agent.AgentRelay(place / "relay.sock", ask, user=NOBODY) as relay:
            check_project(await make(url, staging, agent_socket=relay.path), url)
        assert set(passed) == {agent.REQUEST_IDENTITIES, agent.SIGN_REQUEST}
        hosts = (staging / "known_hosts").read_text()
        assert hosts.startswith(f"[127.0.0.1]:{sshd.port} ssh-ed25519 ")
        with pytest.raises(RepoAuth):  # no agent
            await make(url, staging)
        async with agent.AgentRelay(place / "relay.sock", ask, user=NOBODY) as relay:
            with pytest.raises(RepoNotFound):
                await make(url.replace("project", "nothing"), staging, agent_socket=relay.path)
            await make(url, staging, agent_socket=relay.path)
        assert (staging / "known_hosts").read_text() == hosts
        port = sshd.port
    with sshd_running(place / "sshd2", port=port):  # the host has another key now
        with pytest.raises(RepoHostKey):
            await make(url, staging)
    assert (staging / "known_hosts").read_text() == hosts
    with pytest.raises(RepoUnreachable):
        await make(url, staging)


async def test_something_that_is_no_ssh_server(served, staging):
    with GitHttp(served).running() as site:
        with pytest.raises(RepoUnreachable):
            await make(f"ssh://root@127.0.0.1:{site.port}/x.git", staging)


async def test_cancel_leaves_nothing(served, staging):
    with GitHttp(served, hang_after_refs=True).running() as site:
        task = asyncio.create_task(make(f"{site.url}/project.git", staging))
        await asyncio.to_thread(wait_for, lambda: len(site.requests) >= 2)
        assert processes_below(staging)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert list(staging.iterdir()) == []


CHILD = """
import asyncio, sys
from pathlib import Path
from roost.repos.clone import CloneRequest, clone
from roost.repos.urls import parse_url
from tests.integration.repos_support import ALL, LOCAL, NOBODY
asyncio.run(clone(CloneRequest(parse_url(sys.argv[1])), Path(sys.argv[2]), user=NOBODY, settings=ALL, net=LOCAL))
"""


async def test_kill_9_in_the_middle_then_sweep(served, staging):
    with GitHttp(served, hang_after_refs=True).running() as site:
        child = subprocess.Popen([sys.executable, "-c", CHILD, f"{site.url}/project.git", str(staging)])
        await asyncio.to_thread(wait_for, lambda: len(site.requests) >= 2)
        child.kill()
        child.wait(10)
        (left,) = staging.iterdir()
        assert left.name.startswith(".making-")
        assert processes_below(left)
        assert await sweep(staging) == [left.name]
        assert list(staging.iterdir()) == []
        await asyncio.to_thread(wait_for, lambda: not processes_below(staging))


@pytest.mark.parametrize("point", ["clone.made-work", "clone.cloned", "clone.renamed"])
async def test_crash_points_then_sweep(served, staging, point):
    url = str(file_url(served / "project.git"))
    env = {**os.environ, "ROOST_CRASH_AT": point}
    child = subprocess.run([sys.executable, "-c", CHILD, url, str(staging)], env=env, timeout=60, check=False)
    assert child.returncode == -signal.SIGKILL
    await sweep(staging)
    assert [entry.name for entry in staging.iterdir() if not entry.name.startswith("clone-")] == []
    await sweep(staging, finished=True)
    assert list(staging.iterdir()) == []
    assert (await make(url, staging)).commit


async def test_nothing_of_a_hostile_repository_runs(place, served, staging):
    proof = place / "proof"
    repo = make_repo(place / "hostile", {".gitattributes": "* filter=evil diff=evil\n*.lfs filter=lfs\n", "a": "x\n"})
    (repo / ".gitmodules").write_text('[submodule "x"]\n\tpath = x\n\turl = ./x\n\tupdate = none\n')
    git(repo, "add", "-A")
    git(repo, "commit", "-q", "-m", "evil")
    for hook in ("post-checkout", "post-upload-pack"):
        (repo / ".git/hooks" / hook).write_text(f"#!/bin/sh\ntouch {proof}\n")
        (repo / ".git/hooks" / hook).chmod(0o755)
    git(repo, "config", "uploadpack.packObjectsHook", f"touch {proof}; git pack-objects")
    git(repo, "config", "core.fsmonitor", f"touch {proof}")
    git(repo, "config", "filter.evil.smudge", f"touch {proof}; cat")
    result = await make(str(file_url(repo)), staging)
    assert (result.path / "a").read_text() == "x\n"
    assert not proof.exists()
    assert len(result.notes) == 2 and "Submodules" in result.notes[0] and "LFS" in result.notes[1]


async def test_a_tree_with_dot_git_inside_is_refused(place, served, staging):
    repo = make_repo(place / "dotgit")
    blob = git(repo, "hash-object", "-w", "README.md")
    inner = subprocess.run(
        ["git", "mktree"], cwd=repo, input=f"100644 blob {blob}\tconfig\n", text=True, capture_output=True, check=True
    ).stdout.strip()
    raw = b"40000 .git\0" + bytes.fromhex(inner)
    tree = subprocess.run(
        ["git", "hash-object", "-t", "tree", "-w", "--literally", "--stdin"],
        cwd=repo, input=raw, capture_output=True, check=True,
    ).stdout.decode().strip()  # fmt: skip
    commit = git(repo, "commit-tree", "-m", "evil", tree)
    git(repo, "update-ref", "refs/heads/main", commit)
    with pytest.raises(RepoCorrupt):
        await make(str(file_url(repo)), staging)
