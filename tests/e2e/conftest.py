"""A running roost with a tiny image, shared by a module's tests; and repositories to open."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Roost, tiny_image
from tests.e2e.push import push_root


def start_with_image(roost: Roost, folder: Path) -> None:
    """Start node and server, and put the tiny image into the private registry."""
    roost.run("node", "start")
    roost.run("server", "start")
    push_root(tiny_image(folder), f"127.0.0.1:{roost.registry_port}/tiny:1", user="dev")


@pytest.fixture(scope="module")
def roost(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Roost]:
    """A roost that serves all tests of a module."""
    roost = Roost()
    try:
        start_with_image(roost, tmp_path_factory.mktemp("image"))
        yield roost
    finally:
        roost.remove()


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Roost]:
    """A roost of one test's own, not started."""
    roost = Roost()
    try:
        yield roost
    finally:
        roost.remove()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with a commit, a change and a new file, in a folder nobody else may enter."""
    path = tmp_path / "closed" / "my-repo"
    path.mkdir(parents=True)
    path.parent.chmod(0o700)

    def git(*args: str) -> None:
        subprocess.run(
            ["git", "-c", "user.name=T", "-c", "user.email=t@example.com", *args],
            cwd=path,
            check=True,
            capture_output=True,
        )

    git("init", "-q", "-b", "main")
    (path / "README.md").write_text("hello\n")
    (path / "run.sh").write_text("#!/bin/sh\necho run\n")
    (path / "run.sh").chmod(0o755)
    (path / "link").symlink_to("README.md")
    git("add", "-A")
    git("commit", "-q", "-m", "first")
    (path / "README.md").write_text("hello, changed\n")
    (path / "new file.txt").write_text("new\n")
    return path
