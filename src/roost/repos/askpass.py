"""Gives git one user name and one password, without either being in argv, an environment, a URL or a file.

git runs our helper (GIT_ASKPASS), the helper connects to a unix socket in a directory that only the git user may
enter.  The answer is given when all of these hold: the peer's uid is the git user's, the nonce is ours, the prompt
names the host that the credential is for, and this kind of question was not answered before.  So a redirect, a
submodule or a second process gets nothing, and the nonce is worthless once git has asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import re
import secrets
import shutil
import socket
import struct
import sys
from pathlib import Path
from types import TracebackType

import structlog

from roost.errors import MissingProgram
from roost.repos.git import User
from roost.repos.urls import Credential, RepoUrl

log = structlog.get_logger()

_PROMPT = re.compile(r"(Username|Password) for '([a-z]+)://(?:[^@']*@)?([^/']+)/?[^']*': ?")
_CLIENT = Path(__file__).with_name("askpass_client.py")


class Askpass:
    """`async with Askpass(directory, url, credential, user) as askpass:` then `askpass.environment` is for git."""

    def __init__(self, directory: Path, url: RepoUrl, credential: Credential, user: User | None) -> None:
        self._directory = directory
        self._credential = credential
        self._user = user
        host = f"[{url.host}]" if ":" in url.host else url.host
        self._origin = (url.scheme, host if url.port is None else f"{host}:{url.port}")
        self._nonce = secrets.token_hex(32)
        self._answered: set[str] = set()
        self._server: asyncio.Server | None = None

    @property
    def environment(self) -> dict[str, str]:
        return {"GIT_ASKPASS": str(self._directory / "askpass")}

    async def __aenter__(self) -> Askpass:
        interpreter = usable_interpreter(self._user)
        self._directory.mkdir(mode=0o700)
        _write(self._directory / "nonce", self._nonce.encode(), 0o400, self._user)
        # Isolated and without site: nothing of the environment counts, and it starts in a third of the time.
        source = f"#!{interpreter} -IS\n{_CLIENT.read_text()}"
        _write(self._directory / "askpass", source.encode(), 0o500, self._user)
        listener = bind_unix(self._directory, "socket", self._user)
        self._server = await asyncio.start_unix_server(self._serve, sock=listener)
        _give(self._directory, self._user)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
        await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(20):
                answer = self._answer(await reader.readline(), peer_uid(writer))
                if answer is not None:
                    writer.write(answer.encode() + b"\n")
                    await writer.drain()
        except (OSError, TimeoutError, ValueError) as error:
            log.warning("askpass: a question was not answered", error=str(error))
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _answer(self, line: bytes, uid: int) -> str | None:
        question = json.loads(line or b"{}")
        expected = self._user[0] if self._user else os.geteuid()
        nonce = question.get("nonce") if isinstance(question, dict) else None
        if uid != expected or not isinstance(nonce, str) or not hmac.compare_digest(nonce, self._nonce):
            log.warning("askpass: refused a stranger", uid=uid)
            return None
        match = _PROMPT.fullmatch(str(question.get("prompt", "")))
        if match is None or (match[2], match[3].lower()) != self._origin or match[1] in self._answered:
            log.warning("askpass: refused a question that is not ours", prompt=str(question.get("prompt", ""))[:200])
            return None
        self._answered.add(match[1])
        return self._credential.username if match[1] == "Username" else self._credential.password


def usable_interpreter(user: User | None) -> str:
    """A Python that this user can run: ours may lie in somebody's private directory."""
    candidates = [os.path.realpath(sys.executable), sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"]
    for candidate in candidates:
        if " " not in candidate and len(candidate) < 120 and can_reach(Path(candidate), user, os.X_OK):
            return candidate
    raise MissingProgram(
        "no Python that the git user can run", next_step="Install the package `python3`, or roost outside of /root."
    )


def can_reach(path: Path, user: User | None, mode: int) -> bool:
    """Whether the user may enter every directory above the path and has `mode` (os.R_OK…) on it; no ACLs."""
    if user is None:
        return os.access(path, mode)
    try:
        real = path.resolve(strict=True)
        return all(_permits(parent, user, os.X_OK) for parent in real.parents) and _permits(real, user, mode)
    except OSError:
        return False


def _permits(path: Path, user: User, mode: int) -> bool:
    status = path.stat()
    shift = 6 if status.st_uid == user[0] else 3 if status.st_gid == user[1] else 0
    return (status.st_mode >> shift) & mode == mode


def bind_unix(directory: Path, name: str, user: User | None) -> socket.socket:
    """A listening unix socket of mode 0600, owned by the user, however long the directory's path is."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    handle = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        listener.bind(f"/proc/self/fd/{handle}/{name}")
        # Nobody can connect before listen(), so the mode is right before it matters.
        Path(f"/proc/self/fd/{handle}/{name}").chmod(0o600)
        if user is not None:
            os.chown(f"/proc/self/fd/{handle}/{name}", *user)
        listener.listen(8)
    except BaseException:
        listener.close()
        raise
    finally:
        os.close(handle)
    return listener


def peer_uid(writer: asyncio.StreamWriter) -> int:
    """uid of the process at the other end of a unix socket (SO_PEERCRED)."""
    peer = writer.get_extra_info("socket")
    _, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)


def _write(path: Path, content: bytes, mode: int, user: User | None) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        os.fchmod(file.fileno(), mode)
        if user is not None:
            os.fchown(file.fileno(), *user)


def _give(path: Path, user: User | None) -> None:
    if user is not None:
        os.chown(path, *user)
