"""Repositories from where people have them: https with an own CA, ssh with the caller's agent, file, a plain path."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import start_with_image
from tests.e2e.harness import Roost
from tests.integration.repos_support import (
    GitHttp,
    agent_running,
    git,
    make_authority,
    make_repo,
    sshd_running,
)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder that the clones' user can enter, short enough for sockets."""
    path = Path(tempfile.mkdtemp(prefix="roost-test-", dir="/var/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def roost(place: Path) -> Iterator[Roost]:
    authority = make_authority(place / "ca")
    (place / "ca" / "ca.pem").chmod(0o644)
    roost = Roost(ROOST_REPOS__CA_FILE=str(authority.ca))
    try:
        start_with_image(roost, place / "image")
        yield roost
    finally:
        roost.remove()


@pytest.fixture(scope="module")
def repo(place: Path) -> Path:
    return make_repo(place / "served" / "project.git", {"hello.txt": "from the server\n"})


def test_https(roost: Roost, place: Path, repo: Path) -> None:
    authority = make_authority(place / "ca2")
    roost_ca = Path(roost.env["ROOST_REPOS__CA_FILE"])
    with GitHttp(repo.parent, tls=authority.context).running() as site:
        code, problem = roost.error("up", f"{site.url}/project.git", "--name", "stranger")
        assert (code, problem["code"]) == (6, "repo.unreachable"), "a certificate of nobody we trust"
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(roost_ca.with_name("srv.pem"), roost_ca.with_name("srv.key"))
    with GitHttp(repo.parent, tls=context).running() as site:
        done = roost.json("up", f"{site.url}/project.git", "--name", "https")
    assert (done["repo"]["path"], done["repo"]["commit"]) == (
        "/home/dev/project",
        git(repo, "rev-parse", "HEAD").strip(),
    )
    assert roost.exec("https", "cat project/hello.txt") == "from the server\n"
    assert roost.exec("https", "cat project/.git/config").count(site.url) == 1


def test_ssh_with_the_callers_agent(roost: Roost, place: Path, repo: Path) -> None:
    with sshd_running(place / "ssh") as sshd, agent_running(place / "agent", sshd.user_key) as agent:
        url = f"ssh://root@127.0.0.1:{sshd.port}{repo}"
        code, problem = roost.error("up", url, "--name", "keyless", env={"SSH_AUTH_SOCK": ""})
        assert (code, problem["code"]) == (5, "repo.auth")
        done = roost.json("up", url, "--name", "ssh", env={"SSH_AUTH_SOCK": str(agent)})
        assert done["observed"] == "running"
        assert roost.exec("ssh", "cat project/hello.txt") == "from the server\n"
        again = roost.json("up", url, "--name", "keyless", env={"SSH_AUTH_SOCK": str(agent)})
        assert again["observed"] == "running"


def test_file_url_of_roots_own_command_line(roost: Roost, repo: Path) -> None:
    repo.parent.chmod(0o700)  # the clones' user cannot read it; root's command line does
    done = roost.json("up", f"file://{repo}", "--name", "file")
    repo.parent.chmod(0o755)
    assert done["observed"] == "running"
    assert roost.exec("file", "cat project/hello.txt") == "from the server\n"


def test_branch(roost: Roost, repo: Path) -> None:
    git(repo, "branch", "other")
    roost.json("up", str(repo), "--name", "branch", "--branch", "other")
    assert roost.exec("branch", "cat project/.git/HEAD") == "ref: refs/heads/other\n"
    code, problem = roost.error("up", str(repo), "--name", "nobranch", "--branch", "nothing")
    assert (code, problem["code"]) == (3, "repo.bad_ref")
