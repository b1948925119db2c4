"""The agent relay between a real ssh-add and a real ssh-agent."""

from __future__ import annotations

import asyncio
import os
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest

from roost.repos import agent
from tests.integration.repos_support import NOBODY, agent_running, remove


@pytest.fixture
def place():
    path = Path(tempfile.mkdtemp(prefix="roost-test-", dir="/var/tmp"))
    path.chmod(0o711)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path / "key"], check=True, timeout=30)
    yield path
    remove(path)


async def ssh_add(socket: Path, *args: str, user: tuple[int, int] | None = None) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        "ssh-add", *args, env={"SSH_AUTH_SOCK": str(socket), "PATH": os.environ["PATH"]},
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        user=user[0] if user else None, group=user[1] if user else None, extra_groups=[] if user else None,
    )  # fmt: skip
    async with asyncio.timeout(20):
        output, _ = await process.communicate()
    return process.returncode or 0, output.decode()


async def test_keys_are_listed_and_sign_but_cannot_be_changed(place):
    with agent_running(place / "agent", place / "key") as real:

        async def ask(body: bytes) -> bytes:
            return await agent.answer(body, str(real))

        path = place / "relay.sock"
        async with agent.AgentRelay(path, ask, user=NOBODY):
            assert path.stat().st_mode & 0o777 == 0o600 and path.stat().st_uid == NOBODY[0]
            code, listed = await ssh_add(path, "-l", user=NOBODY)
            assert code == 0 and "ED25519" in listed
            assert (await ssh_add(path, "-T", str(place / "key.pub"), user=NOBODY))[0] == 0  # signs and verifies
            for forbidden in (["-D"], ["-d", str(place / "key.pub")], ["-x"], [str(place / "key")]):
                code, _ = await ssh_add(path, *forbidden)
                assert code != 0
        assert not path.exists()
        assert (await ssh_add(real, "-l"))[1] == listed


async def test_failures_are_answered(place):
    async def broken(body: bytes) -> bytes:
        raise RuntimeError("the CLI went away")

    async def never(body: bytes) -> bytes:
        await asyncio.sleep(60)
        return b""

    for ask in (broken, never):
        async with agent.AgentRelay(place / "s", ask, timeout_s=0.2):
            code, text = await ssh_add(place / "s", "-l")
            assert code != 0 and "refused" in text
    assert await agent.answer(bytes([agent.REQUEST_IDENTITIES]), str(place / "nobody-listens")) == agent.FAILURE


@pytest.mark.parametrize("length", [0, agent.MESSAGE_MAX + 1, 0xFFFFFFFF])
async def test_lengths_out_of_bounds_end_the_connection(place, length):
    asked = []

    async def ask(body: bytes) -> bytes:
        asked.append(body)
        return b"\x0c\0\0\0\0"

    async with agent.AgentRelay(place / "s", ask):
        reader, writer = await asyncio.open_unix_connection(str(place / "s"))
        writer.write(struct.pack(">I", 1) + bytes([agent.EXTENSION]))
        assert await agent.read_message(reader) == agent.FAILURE
        writer.write(struct.pack(">I", length))
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
    assert asked == []


async def test_an_idle_connection_does_not_hold_up_the_end(place):
    async def ask(body: bytes) -> bytes:
        return agent.FAILURE

    async with asyncio.timeout(5):
        async with agent.AgentRelay(place / "s", ask):
            reader, writer = await asyncio.open_unix_connection(str(place / "s"))
            agent.write_message(writer, bytes([agent.EXTENSION]))
            assert await agent.read_message(reader) == agent.FAILURE
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
