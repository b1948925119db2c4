"""The runner ends what it started: the whole group, TERM then KILL, and never runs git as root."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from roost.errors import RepoTimeout
from roost.repos.git import Git, Progress
from tests.integration.repos_support import NOBODY, wait_for


def running(marker: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if marker.encode() in command and state != "Z":
                found.append(entry.name)
    return found


STUBBORN = '!trap "" TERM; echo started >&2; sleep {marker} & sleep {marker}; sleep {marker}'


async def test_a_group_that_ignores_term_is_killed(tmp_path):
    marker = "31.4159"
    git = Git(home=Path("/"), user=NOBODY, timeout_s=0.5, progress_timeout_s=30)
    started = time.monotonic()
    with pytest.raises(RepoTimeout):
        await git.run("-c", "alias.stubborn=" + STUBBORN.format(marker=marker), "stubborn", cwd=Path("/"))
    assert time.monotonic() - started < 6
    await asyncio.to_thread(wait_for, lambda: not running(marker))


async def test_cancel_ends_the_group():
    marker = "27.1828"
    git = Git(home=Path("/"), user=NOBODY)
    task = asyncio.create_task(git.run("-c", f"alias.s=!sleep {marker} & sleep {marker}", "s", cwd=Path("/")))
    await asyncio.to_thread(wait_for, lambda: len(running(marker)) >= 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not running(marker)


async def test_output_is_bounded_and_split_from_progress(tmp_path):
    seen: list[Progress] = []
    script = r'!i=0; while [ $i -lt 3000 ]; do echo "noise $i https://u:secretword@h/" >&2; i=$((i+1)); done; '
    script += r'printf "Receiving objects:  50%% (1/2)\rReceiving objects: 100%% (2/2), done.\n" >&2; '
    script += "echo end >&2; exit 3"
    git = Git(home=Path("/"), user=NOBODY)
    result = await git.run("-c", f"alias.noisy={script}", "noisy", cwd=Path("/"), check=False, on_progress=seen.append)
    assert result.exit_code == 3 and len(result.stderr) < 40_000
    assert result.stderr.startswith("noise 0 https://***@h/") and result.stderr.rstrip().endswith("end")
    assert "secretword" not in result.stderr and "Receiving" not in result.stderr
    assert [one.percent for one in seen] == [50, 100]


async def test_it_runs_as_the_user_given_and_never_as_root():
    git = Git(home=Path("/"), user=NOBODY)
    result = await git.run("-c", "alias.who=!id -u; id -G", "who", cwd=Path("/"))
    assert result.text.split() == [str(NOBODY[0]), str(NOBODY[1])]
    with pytest.raises(PermissionError):
        await Git(home=Path("/")).run("version", cwd=Path("/"))
