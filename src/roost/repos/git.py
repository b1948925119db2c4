"""The one place on servers and nodes where the git binary is run.

Invariants, whatever is asked of it:

- The command line is a list.  Callers separate options from values with `--` or `--end-of-options`.
- The environment is built from nothing.  No system or user configuration is read, HOME is a private empty directory,
  nobody is asked anything on a terminal, messages are in the C locale.  What a repository brings along (hooks,
  fsmonitor, filters, submodules, alternates commands) is switched off by configuration of the command scope, which
  ranks above the repository's own.
- Only the protocols named for this very run work, whatever a redirect or a submodule asks for.
- It runs in its own session, so no terminal and no signal of ours reaches it, and the whole group can be ended: TERM,
  then KILL.  When the run is cancelled or times out nothing of it is left running when the call returns.
- As root it must be given an unprivileged user: the objects, the index and the work tree are parsed from hostile bytes.
- stderr is kept bounded, redacted before anyone sees it.  Progress lines are not part of it.

`transfer.fsckObjects` turns into errors what fsck calls warnings.  A handful of those are harmless and common in old
repositories (tools that wrote zero-padded modes or broken dates); they stay warnings, everything about paths and
.gitmodules stays an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog

from roost.errors import MissingProgram
from roost.repos import outcome

log = structlog.get_logger()

User = tuple[int, int]
"""uid and gid."""

STDOUT_MAX: Final = 16 << 20
TERM_GRACE_S: Final = 2.0
PROXY_VARIABLES: Final = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

HARDENING: Final[tuple[tuple[str, str], ...]] = (
    ("core.hooksPath", "/dev/null"),
    ("core.fsmonitor", "false"),
    ("core.untrackedCache", "false"),
    ("core.attributesFile", "/dev/null"),
    ("core.excludesFile", "/dev/null"),
    ("core.protectHFS", "true"),
    ("core.protectNTFS", "true"),
    ("core.alternateRefsCommand", "true"),
    ("core.gitProxy", "none"),
    ("credential.helper", ""),
    ("transfer.fsckObjects", "true"),
    ("transfer.bundleURI", "false"),
    ("protocol.allow", "never"),
    ("http.followRedirects", "false"),
    ("http.sslVerify", "true"),
    ("http.emptyAuth", "false"),
    ("http.delegation", "none"),
    ("submodule.recurse", "false"),
    ("fetch.recurseSubmodules", "false"),
    ("gc.auto", "0"),
    ("gc.autoDetach", "false"),
    ("maintenance.auto", "false"),
    ("init.defaultBranch", "main"),
    ("init.templateDir", ""),
    ("clone.defaultRemoteName", "origin"),
    ("advice.detachedHead", "false"),
    *(
        (f"fetch.fsck.{name}", "warn")
        for name in (
            "zeroPaddedFilemode",
            "badTimezone",
            "badDate",
            "badDateOverflow",
            "badEmail",
            "badName",
            "missingSpaceBeforeDate",
            "missingSpaceBeforeEmail",
            "missingEmail",
            "missingNameBeforeEmail",
            "missingTaggerEntry",
            "badTagName",
            "multipleAuthors",
            "nulInCommit",
        )
    ),
)


@dataclass(frozen=True, slots=True)
class Progress:
    """One progress line of git, e.g. `Receiving objects: 42% (25/60), 1.20 MiB | 2.00 MiB/s`."""

    phase: str
    percent: int | None
    done: int
    total: int | None
    remote: bool
    """The server's own progress (counting, compressing), not ours."""


OnProgress = Callable[[Progress], None]

_PROGRESS = re.compile(r"(remote: )?([A-Z][A-Za-z -]{2,40}): +(?:(\d{1,3})% \((\d+)/(\d+)\)|(\d+))(?:[,. ].*)?$")


def parse_progress(line: str) -> Progress | None:
    """Read a progress line; None for everything else."""
    match = _PROGRESS.match(line.strip())
    if match is None:
        return None
    remote, phase, percent, done, total, count = match.groups()
    return Progress(
        phase,
        min(int(percent), 100) if percent else None,
        int(done or count),
        int(total) if total else None,
        bool(remote),
    )


@dataclass(frozen=True, slots=True)
class GitResult:
    """How a git command ended; `stderr` is redacted and free of progress lines."""

    exit_code: int
    stdout: bytes
    stderr: str

    @property
    def text(self) -> str:
        return self.stdout.decode("utf-8", "replace").strip()


@dataclass(frozen=True, slots=True)
class Git:
    """git as one user, for one purpose: which protocols, configuration and time it gets."""

    home: Path
    """Private, empty directory that `user` can enter."""
    user: User | None = None
    """Unprivileged uid and gid to run as; None: as we are (then we are not root)."""
    protocols: tuple[str, ...] = ()
    config: tuple[tuple[str, str], ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 300.0
    progress_timeout_s: float = 60.0
    secrets: tuple[str, ...] = field(default=(), repr=False)
    """Taken out of whatever git prints."""

    def environment(self) -> dict[str, str]:
        """The whole environment of the git process."""
        config = [*HARDENING, *((f"protocol.{name}.allow", "always") for name in self.protocols), *self.config]
        env = {
            "PATH": PATH,
            "HOME": str(self.home),
            "XDG_CONFIG_HOME": str(self.home),
            "LC_ALL": "C",
            "LANGUAGE": "C",
            "TZ": "UTC",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_ATTR_NOSYSTEM": "1",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_ASKPASS": "/bin/false",
            "SSH_ASKPASS": "/bin/false",
            "SSH_ASKPASS_REQUIRE": "never",
            "GIT_SSH_COMMAND": "/bin/false",
            "GIT_SSH_VARIANT": "ssh",
            "GIT_LFS_SKIP_SMUDGE": "1",
            "GIT_OPTIONAL_LOCKS": "0",
            "GIT_PROGRESS_DELAY": "0",
            "GIT_PAGER": "cat",
            "GIT_EDITOR": "/bin/false",
            "GIT_CEILING_DIRECTORIES": "/",
            # Overrides protocol.*.allow; both, so that neither a new default nor a set variable opens a way.
            "GIT_ALLOW_PROTOCOL": ":".join(self.protocols) or "none",
            "GIT_PROTOCOL_FROM_USER": "0",
            "GIT_CONFIG_COUNT": str(len(config)),
            **proxies(os.environ),
            **self.env,
        }
        for number, (key, value) in enumerate(config):
            env[f"GIT_CONFIG_KEY_{number}"] = key
            env[f"GIT_CONFIG_VALUE_{number}"] = value
        return env

    async def run(
        self,
        *args: str | os.PathLike[str],
        cwd: Path,
        what: str = "git",
        check: bool = True,
        stdin: int | bytes | None = None,
        on_progress: OnProgress | None = None,
        env: Mapping[str, str] | None = None,
    ) -> GitResult:
        """Run one git command to its end.

        `stdin` is a file descriptor to read from or bytes; `what` names the step in errors.  Without `check` a
        failure is returned, not raised.  Raises RepoTimeout, MissingProgram, or what the text means (outcome.classify).
        """
        program = shutil.which("git", path=PATH)
        if program is None:
            raise MissingProgram("git is not installed", next_step="Install the package `git`.")
        if self.user is None and os.geteuid() == 0:
            raise PermissionError("git is never run as root on repositories of others: give a user")
        process = await asyncio.create_subprocess_exec(
            program,
            *(os.fspath(arg) for arg in args),
            cwd=cwd,
            env={**self.environment(), **(env or {})},
            stdin=_stdin(stdin),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            umask=0o022,
            user=self.user[0] if self.user else None,
            group=self.user[1] if self.user else None,
            extra_groups=[] if self.user else None,
        )
        watch = _Watch(on_progress)
        try:
            work = asyncio.gather(
                _feed(process, stdin if isinstance(stdin, bytes) else None),
                _collect(process, watch),
                watch.read(process),
                process.wait(),
            )
            stalled = await _wait(work, watch, self.timeout_s, self.progress_timeout_s)
        finally:
            await _end_group(process)
        if stalled is not None:
            log.warning("git timed out", what=what, progress=stalled, stderr=outcome.redact(watch.text(), self.secrets))
            limit = self.progress_timeout_s if stalled else self.timeout_s
            raise outcome.timed_out(what, limit, progress=stalled)
        _, stdout, _, exit_code = work.result()
        result = GitResult(exit_code, stdout, outcome.redact(watch.text(), self.secrets))
        if check and exit_code != 0:
            raise outcome.classify(exit_code, result.stderr, what=what)
        return result


def _stdin(given: int | bytes | None) -> int:
    if given is None:
        return asyncio.subprocess.DEVNULL
    return asyncio.subprocess.PIPE if isinstance(given, bytes) else given


def proxies(environ: Mapping[str, str]) -> dict[str, str]:
    """The proxy variables git shall see.  curl ignores HTTP_PROXY in capitals (a CGI attack), people set it anyway."""
    found: dict[str, str] = {}
    for name in PROXY_VARIABLES:
        value = environ.get(name) or environ.get(name.upper())
        if value:
            found[name] = value
    return found


class _Watch:
    """Reads stderr: splits off progress, keeps the rest bounded, remembers when something last came."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        self.last = asyncio.get_running_loop().time()
        self._on_progress = on_progress
        self._head = ""
        self._tail = ""

    async def read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        pending = b""
        while chunk := await process.stderr.read(8192):
            self.touch()
            *lines, pending = re.split(rb"[\r\n]", (pending + chunk)[-(64 << 10) :])
            for line in lines:
                self._line(line.decode("utf-8", "replace"))
        self._line(pending.decode("utf-8", "replace"))

    def touch(self) -> None:
        self.last = asyncio.get_running_loop().time()

    def text(self) -> str:
        return self._head + self._tail

    def _line(self, line: str) -> None:
        line = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line).rstrip()
        if not line or line == "remote:":
            return
        progress = parse_progress(line)
        if progress is not None:
            if self._on_progress is not None:
                self._on_progress(progress)
            return
        half = outcome.STDERR_MAX // 2
        line = line[:4096] + "\n"
        if not self._tail and len(self._head) + len(line) <= half:
            self._head += line
        else:
            self._tail = (self._tail + line)[-half:]


async def _feed(process: asyncio.subprocess.Process, data: bytes | None) -> None:
    if data is None or process.stdin is None:
        return
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(data)
        await process.stdin.drain()
    process.stdin.close()


async def _collect(process: asyncio.subprocess.Process, watch: _Watch) -> bytes:
    assert process.stdout is not None
    parts: list[bytes] = []
    size = 0
    while chunk := await process.stdout.read(64 << 10):
        watch.touch()
        if size < STDOUT_MAX:
            parts.append(chunk)
            size += len(chunk)
    return b"".join(parts)[:STDOUT_MAX]


async def _wait(
    work: asyncio.Future[tuple[None, bytes, None, int]], watch: _Watch, total_s: float, progress_s: float
) -> bool | None:
    """Wait for the work; None: done, False: the total time is up, True: nothing came for too long."""
    loop = asyncio.get_running_loop()
    end = loop.time() + total_s
    try:
        while True:
            now = loop.time()
            until = min(end, watch.last + progress_s)
            if now >= until:
                return now < end
            done, _ = await asyncio.wait((work,), timeout=until - now)
            if done:
                return None
    finally:
        if not work.done():
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work


async def _end_group(process: asyncio.subprocess.Process) -> None:
    """End whatever is left of the process group.  The leader may be gone while helpers (ssh, index-pack) live on."""
    if not _signal_group(process.pid, signal.SIGTERM) or not _living(process.pid):
        await _reap(process)
        return
    ended = asyncio.ensure_future(_group_gone(process))
    try:
        await asyncio.wait((ended,), timeout=TERM_GRACE_S)
    finally:
        _signal_group(process.pid, signal.SIGKILL)
        ended.cancel()
        await _reap(process)


async def _group_gone(process: asyncio.subprocess.Process) -> None:
    while _signal_group(process.pid, 0) and _living(process.pid):  # noqa: ASYNC110 - a group has no event to wait for
        await asyncio.sleep(0.01)


def _living(group: int) -> bool:
    """Whether the group has a member that is no zombie: an orphan may wait long for a lazy init to reap it."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, _, pgrp = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(pgrp) == group and state not in "ZX":
                    return True
    return False


async def _reap(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        await process.wait()


def _signal_group(group: int, number: int) -> bool:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True
