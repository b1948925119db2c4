"""Commands in a container: streams, their ends, codes, signals, terminals, users."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import time

import pytest

from roost.errors import ExecFailed, ExecNotExecutable, ExecNotFound
from roost.runtimes.protocol import Channel, ExecSpec, TerminalSize
from tests.conformance.subjects import DEV, HOME, ROOT, Subject, run

MIB = 1 << 20


@pytest.fixture
async def up(subject: Subject) -> Subject:
    await subject.up()
    return subject


async def test_exit_codes(up: Subject) -> None:
    for code in (0, 1, 42, 255):
        assert (await up.run("sh", "-c", f"exit {code}")).code == code


async def test_wait_can_be_asked_again(up: Subject) -> None:
    session = await up.runtime.exec(up.container, ExecSpec(("sh", "-c", "exit 3"), DEV, HOME))
    assert (await session.wait(), await session.wait()) == (3, 3)
    assert tuple(await asyncio.gather(session.wait(), session.wait())) == (3, 3)
    await session.close()
    await session.close()


async def test_channels_are_apart_and_binary(up: Subject) -> None:
    data = bytes(range(256)) * 64 + b"\r\n\x00\xff"
    done = await up.run("sh", "-c", "echo out; echo err >&2; cat", stdin=data)
    assert done.out == b"out\n" + data
    assert done.err == b"err\n"


async def test_end_of_stdin(up: Subject) -> None:
    done = await asyncio.wait_for(up.run("cat", stdin=b"all of it"), 20)
    assert (done.code, done.out) == (0, b"all of it")
    done = await asyncio.wait_for(up.run("cat", stdin=b""), 20)
    assert (done.code, done.out) == (0, b"")
    done = await asyncio.wait_for(up.run("cat"), 20)  # no stdin at all
    assert (done.code, done.out) == (0, b"")


async def test_no_byte_is_lost_at_the_end_of_stdin(up: Subject) -> None:
    """Small inputs whose end comes at once, again and again."""

    async def one(number: int) -> None:
        text = f"input {number}\n".encode() * (number % 7)
        done = await up.run("cat", stdin=text)
        assert done.out == text

    for batch in range(10):
        await asyncio.wait_for(asyncio.gather(*(one(batch * 4 + i) for i in range(4))), 60)


async def test_stdin_piece_by_piece(up: Subject) -> None:
    session = await up.runtime.exec(up.container, ExecSpec(("cat",), DEV, HOME, stdin=True))
    output = session.output()
    for text in (b"one", b"two", b"three"):
        await session.write(text)
        assert await asyncio.wait_for(anext(output), 10) == (Channel.stdout, text)
    await session.close_stdin()
    await session.close_stdin()
    await session.write(b"too late")
    with pytest.raises(StopAsyncIteration):
        await asyncio.wait_for(anext(output), 10)
    assert await session.wait() == 0
    await session.close()


async def test_a_command_that_does_not_read(up: Subject) -> None:
    """Writing does not fail, and does not hang longer than the command."""
    done = await asyncio.wait_for(up.run("sh", "-c", "exit 4", stdin=b"x" * (8 * MIB)), 20)
    assert done.code == 4
    done = await asyncio.wait_for(up.run("head", "-c", "3", stdin=b"abcdef" * MIB), 20)
    assert done.out == b"abc"


async def test_backpressure(up: Subject) -> None:
    """Output that nobody reads stops the command, and is all there when it is read."""
    session = await up.runtime.exec(
        up.container, ExecSpec(("sh", "-c", "head -c 67108864 /dev/zero; echo done >&2"), DEV, HOME)
    )
    await asyncio.sleep(1)
    output = session.output()
    size, err = 0, b""
    async for channel, data in output:
        if channel is Channel.stdout:
            size += len(data)
        else:
            # The pipes on the way hold a few MiB; the two channels have no order between them beyond that.
            assert size >= 56 * MIB, "stderr was written before stdout was taken"
            err += data
    assert (size, err, await session.wait()) == (64 * MIB, b"done\n", 0)
    await session.close()


@pytest.mark.slow
async def test_500_mb_both_ways(up: Subject) -> None:
    total = 500 * MIB
    block = os.urandom(4 * MIB)
    session = await up.runtime.exec(up.container, ExecSpec(("cat",), DEV, HOME, stdin=True))
    sent, got, size = hashlib.blake2b(), hashlib.blake2b(), 0

    async def feed() -> None:
        for _ in range(total // len(block)):
            sent.update(block)
            await session.write(block)
        await session.close_stdin()

    feeding = asyncio.create_task(feed())
    async for _, data in session.output():
        got.update(data)
        size += len(data)
    await feeding
    assert size == total
    assert got.digest() == sent.digest()
    assert await session.wait() == 0
    await session.close()


@pytest.mark.slow
async def test_500_mb_out_and_in(up: Subject) -> None:
    total = 500 * MIB
    size = 0
    session = await up.runtime.exec(up.container, ExecSpec(("head", "-c", str(total), "/dev/zero"), DEV, HOME))
    async for _, data in session.output():
        size += len(data)
    await session.close()
    assert size == total
    session = await up.runtime.exec(up.container, ExecSpec(("wc", "-c"), DEV, HOME, stdin=True))
    block = bytes(4 * MIB)
    for _ in range(total // len(block)):
        await session.write(block)
    await session.close_stdin()
    said = b"".join([data async for _, data in session.output()])
    await session.close()
    assert int(said) == total


async def test_signals(up: Subject) -> None:
    script = 'trap "echo caught; exit 7" USR1; echo ready; while :; do sleep 0.05; done'
    session = await up.runtime.exec(up.container, ExecSpec(("sh", "-c", script), DEV, HOME))
    output = session.output()
    assert await asyncio.wait_for(anext(output), 10) == (Channel.stdout, b"ready\n")
    await session.signal(signal.SIGUSR1)
    assert await asyncio.wait_for(anext(output), 10) == (Channel.stdout, b"caught\n")
    assert await asyncio.wait_for(session.wait(), 10) == 7
    await session.signal(signal.SIGTERM)  # over: no error
    await session.close()
    for number in (signal.SIGTERM, signal.SIGKILL):
        session = await up.runtime.exec(up.container, ExecSpec(("sleep", "100"), DEV, HOME))
        await session.signal(number)
        assert await asyncio.wait_for(session.wait(), 10) == 128 + number
        await session.close()


async def test_close_ends_the_command(up: Subject) -> None:
    """Also one that blocks on output nobody reads, and its children."""
    for script in ("sleep 1000; true", "yes | cat; true"):
        session = await up.runtime.exec(up.container, ExecSpec(("sh", "-c", f"{script} # {up.ident}"), DEV, HOME))
        begun = time.monotonic()
        await session.close()
        assert time.monotonic() - begun < 5

    async def gone() -> bool:
        listed = (await up.run("ps", "-o", "args") if up.real else await up.run("true")).out
        return b"sleep 1000" not in listed and b"yes" not in listed

    deadline = time.monotonic() + 5
    while not await gone():
        assert time.monotonic() < deadline


async def test_close_while_reading_and_writing(up: Subject) -> None:
    session = await up.runtime.exec(up.container, ExecSpec(("sleep", "100"), DEV, HOME, stdin=True))

    async def read() -> int:
        return sum([len(data) async for _, data in session.output()])

    reading = asyncio.create_task(read())
    writing = asyncio.create_task(session.write(b"x" * (16 * MIB)))
    await asyncio.sleep(0.2)
    await asyncio.wait_for(session.close(), 10)
    assert await asyncio.wait_for(reading, 5) == 0
    await asyncio.wait_for(writing, 5)


async def test_a_daemon_that_keeps_the_pipes(up: Subject) -> None:
    """Output ends a moment after the command, and nothing the command wrote is missing."""
    begun = time.monotonic()
    done = await up.run("sh", "-c", "(sleep 30; echo late) & echo now")
    assert (done.code, done.out) == (0, b"now\n")
    assert time.monotonic() - begun < 10


async def test_environment(up: Subject) -> None:
    done = await up.run("sh", "-c", 'echo "$FROM_IMAGE $OF_CONTAINER $MINE $PATH" | cut -c 1-13', env={"MINE": "a b"})
    assert done.out == b"yes 1 a b /us\n", done
    done = await up.run("sh", "-c", 'echo "$OF_CONTAINER$MULTI"', env={"OF_CONTAINER": "changed", "MULTI": "x\ny"})
    assert done.out == b"changedx\ny\n"
    done = await up.run("sh", "-c", "echo $PATH", env={"PATH": "/nowhere:/bin"})
    assert done.out == b"/nowhere:/bin\n"


async def test_working_directory(up: Subject) -> None:
    assert (await up.run("sh", "-c", "mkdir -p a/b; echo here >a/b/file")).code == 0
    assert (await up.run("cat", "file", cwd=f"{HOME}/a/b")).out == b"here\n"
    if up.real:
        assert (await up.run("pwd", cwd=f"{HOME}/a")).out == f"{HOME}/a\n".encode()
    with pytest.raises(ExecFailed) as caught:
        await up.run("true", cwd=f"{HOME}/none")
    assert "none" in caught.value.message


async def test_users(up: Subject) -> None:
    if not up.real:
        return
    assert (await up.run("sh", "-c", "id -u; id -g; id -G")).out == b"1000\n1000\n1000 2000\n"
    done = await up.run("sh", "-c", "id -u; id -G; touch /etc/by-root && echo can", user=ROOT, cwd="/root")
    assert done.out == b"0\n0\ncan\n"
    assert (await up.run("touch", "/etc/by-dev")).code == 1


async def test_terminal(up: Subject) -> None:
    script = 'test -t 0 && test -t 1 && test -t 2 && echo "term $TERM"; stty size; echo err >&2; exit 5'
    done = await up.run("sh", "-c", script, tty=TerminalSize(101, 33), env={"TERM": "xterm"})
    assert done.out == b"term xterm\r\n33 101\r\nerr\r\n", done
    assert (done.err, done.code) == (b"", 5)


async def test_terminal_resize_and_interrupt(up: Subject) -> None:
    script = 'trap "stty size" WINCH; trap "echo int; exit 9" INT; echo ready; while :; do sleep 0.05; done'
    session = await up.runtime.exec(
        up.container, ExecSpec(("sh", "-c", script), DEV, HOME, {}, TerminalSize(80, 24), stdin=True)
    )
    seen = b""

    async def read_until(wanted: bytes) -> None:
        nonlocal seen
        async with asyncio.timeout(10):
            while wanted not in seen:
                seen += (await anext(output))[1]

    output = session.output()
    await read_until(b"ready\r\n")
    await session.resize(TerminalSize(132, 50))
    await read_until(b"50 132\r\n")
    await session.write(b"\x03")
    await read_until(b"int\r\n")
    assert await asyncio.wait_for(session.wait(), 10) == 9
    await session.close()


async def test_terminal_end_of_stdin(up: Subject) -> None:
    for text in (b"a line\n", b"half a line"):
        done = await asyncio.wait_for(up.run("cat", stdin=text, tty=TerminalSize(80, 24)), 20)
        assert done.code == 0
        assert done.out.replace(b"^D\x08\x08", b"").startswith(text.replace(b"\n", b"\r\n") * 1), done
    done = await asyncio.wait_for(up.run("cat", tty=TerminalSize(80, 24)), 20)  # no stdin: at its end at once
    assert done.code == 0


async def test_terminal_large_output(up: Subject) -> None:
    done = await up.run("sh", "-c", "yes 0123456789abcdef | head -n 200000", tty=TerminalSize(80, 24))
    assert done.out == b"0123456789abcdef\r\n" * 200000


async def test_missing_commands(up: Subject) -> None:
    for argv in (("no-such-command",), ("/no/such/command",), ("",)):
        with pytest.raises(ExecNotFound) as caught:
            await up.run(*argv)
        assert caught.value.exit_code == 127
    with pytest.raises(ExecNotExecutable) as refused:
        await up.run("/etc/passwd")
    assert refused.value.exit_code == 126
    if up.real:
        with pytest.raises(ExecNotExecutable):
            await up.run("/etc")
        # What execve(2) alone finds out, an engine's helper may only say on stderr (runc before 1.2).
        for command, error, words in (
            ("/bin/bad-format", ExecNotExecutable, b"exec format error"),
            ("/bin/bad-interpreter", ExecNotFound, b"no such file"),
        ):
            try:
                done = await up.run(command)
                assert done.code != 0 and words in done.err
            except error:
                pass
    assert (await up.run("echo", "fine")).out == b"fine\n"


async def test_nothing_is_left(up: Subject) -> None:
    """Descriptors and FIFOs after many commands, failed and abandoned ones among them."""
    await up.run("true")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        await up.run("cat", stdin=b"x")
        with pytest.raises(ExecNotFound):
            await up.run("no-such-command")
        starting = asyncio.create_task(run(up.runtime, up.container, "sleep", "100"))
        await asyncio.sleep(0.03)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
    assert len(os.listdir("/proc/self/fd")) <= before
    stats = await up.runtime.stats(up.container)
    assert stats.pids <= 4


async def test_many_at_once(up: Subject) -> None:
    async def one(number: int) -> None:
        done = await up.run("sh", "-c", f"cat; exit {number}", stdin=b"x" * number)
        assert (done.code, len(done.out)) == (number, number)

    await asyncio.wait_for(asyncio.gather(*(one(number) for number in range(20))), 90)
