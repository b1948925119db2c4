"""exec: bytes, exit codes, signals, terminals, and half a gigabyte both ways."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pty
import select
import signal
import struct
import subprocess
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.cli_server import Served, serve


@pytest.fixture
def served() -> Iterator[Served]:
    with tempfile.TemporaryDirectory(prefix="roost-t") as root, serve(Path(root)) as running:
        running.fake.add("web")
        running.fake.add("idle", desired="stopped", observed="stopped")
        yield running


def test_output_error_and_exit_code(served: Served) -> None:
    done = served.run("exec", "web", "--", "sh", "-c", "printf 'a\\000b'; printf err >&2; exit 42")
    assert (done.returncode, done.stdout, done.stderr) == (42, b"a\0b", b"err")


def test_stdin_to_its_end(served: Served) -> None:
    data = bytes(range(256)) * 5000
    assert served.run("exec", "web", "--", "cat", stdin=data).stdout == data


def test_stdin_from_a_file_and_from_dev_null(served: Served, tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(b"x" * 700_000)
    for source, expected in ((str(path), b"700000"), ("/dev/null", b"0")):
        with open(source, "rb") as file:
            process = served.popen("exec", "web", "--", "wc", "-c", stdin=file, stdout=subprocess.PIPE)
            assert process.communicate(timeout=20)[0].strip() == expected


def test_a_command_that_does_not_read_its_input(served: Served) -> None:
    done = served.run("exec", "web", "--", "sh", "-c", "exit 3", stdin=b"x" * (20 << 20))
    assert done.returncode == 3


@pytest.mark.parametrize(
    "args",
    [
        ("web", "-u", "root", "-w", "/", "-e", "A=1", "-e", "B=x=y", "--", "env", "-0"),
        ("-u", "root", "web", "-w", "/", "--env", "A=1", "-e", "B=x=y", "env", "-0"),
        ("-u", "root", "-w", "/", "-e", "A=1", "-e", "B=x=y", "--", "web", "env", "-0"),
    ],
    ids=["after", "mixed", "before"],
)
def test_options_before_and_after_the_name(served: Served, args: tuple[str, ...]) -> None:
    done = served.run("exec", *args)
    assert done.returncode == 0, done.stderr
    asked = served.fake.execs[-1]
    assert (asked["user"], asked["cwd"], asked["env"]) == ("root", "/", {"A": "1", "B": "x=y"})
    assert (asked["argv"], asked["tty"], asked["stdin"]) == (["env", "-0"], None, True)


def test_everything_after_the_command_is_the_commands(served: Served) -> None:
    done = served.run("exec", "web", "--", "echo", "-n", "--json", "--", "-t")
    assert done.stdout == b"--json -- -t"


def test_errors_before_the_start(served: Served) -> None:
    assert served.run("exec", "idle", "--", "true").returncode == 4
    assert served.run("exec", "nosuch", "--", "true").returncode == 3
    missing = served.run("exec", "web", "--", "/no/such/program")
    assert missing.returncode == 127 and b"/no/such/program" in missing.stderr
    assert served.run("exec").returncode == 2
    assert served.run("exec", "web", "-e", "novalue", "--", "true").returncode == 2


def test_json_has_the_output_in_it(served: Served) -> None:
    done = served.run("exec", "web", "--json", "--", "sh", "-c", "echo out; echo err >&2; exit 5")
    told = json.loads(done.stdout)
    assert done.returncode == told["exit_code"] == 5
    assert (told["stdout"], told["stderr"]) == ("out\n", "err\n")
    assert isinstance(told["duration_ms"], float)
    raw = json.loads(served.run("exec", "web", "--json", "--", "printf", "\\377").stdout)
    assert raw["stdout_base64"] == "/w=="
    assert served.run("exec", "web", "--json", "-t", "--", "true").returncode == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on(served: Served, number: signal.Signals) -> None:
    script = f"trap 'echo caught; exit 9' {number.name[3:]}; echo ready; while :; do sleep 0.05; done"
    process = served.popen("exec", "web", "--", "sh", "-c", script, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=10)[0] == b"caught\n"
    assert process.returncode == 9
    assert served.fake.signals == [number]


def test_three_interrupts_end_us(served: Served) -> None:
    script = "trap '' INT; echo ready; exec sleep 30"
    process = served.popen("exec", "web", "--", "sh", "-c", script, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.readline()
    for count in (1, 2, 3):
        process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + 5
        while count < 3 and len(served.fake.signals) < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert process.wait(10) == 130
    process.stdout.close()


def test_a_server_that_dies_is_an_error(served: Served) -> None:
    process = served.popen("exec", "web", "--", "sh", "-c", "echo ready; exec sleep 30", stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    # The fake has no way to crash in a thread: its closing of the socket looks the same from here.
    served.fake.execs[-1]["close"]()
    assert process.wait(10) == 6
    process.stdout.close()


def test_nobody_reads_our_output(served: Served) -> None:
    process = served.popen("exec", "web", "--", "yes", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(10) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


# --- terminals ----------------------------------------------------------------------------------------------------


class Terminal:
    """A person at a terminal."""

    def __init__(self, served: Served, *args: str, columns: int = 81, rows: int = 25) -> None:
        self.master, slave = pty.openpty()
        self.resize(columns, rows)
        self.slave = slave
        self.before = termios.tcgetattr(slave)
        env = served.env(TERM="xterm-test")
        self.process = served.popen(*args, stdin=slave, stdout=slave, stderr=slave, env=env, preexec_fn=_control)
        self.seen = b""

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    def expect(self, wanted: bytes, timeout_s: float = 10.0) -> None:
        deadline = time.monotonic() + timeout_s
        while wanted not in self.seen:
            assert time.monotonic() < deadline, f"{wanted!r} is not in {self.seen!r}"
            if select.select([self.master], [], [], 0.05)[0]:
                self.seen += os.read(self.master, 65536)
        self.seen = self.seen.partition(wanted)[2]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


def _control() -> None:
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_terminal(served: Served) -> None:
    terminal = Terminal(served, "exec", "-t", "web", "--", "sh", "-c", "echo term=$TERM; stty size; cat")
    try:
        terminal.expect(b"term=xterm-test")
        terminal.expect(b"25 81")
        terminal.type(b"hello\r")
        terminal.expect(b"hello")
        terminal.expect(b"hello")  # the echo, then cat's
        assert not termios.tcgetattr(terminal.slave)[3] & (termios.ICANON | termios.ISIG), "our side is raw"
        terminal.type(b"\x03")  # Ctrl-C is a key: the terminal over there makes the signal
        assert terminal.process.wait(10) == 130
        assert served.fake.signals == []
        assert termios.tcgetattr(terminal.slave) == terminal.before, "the terminal is as it was"
    finally:
        terminal.close()


def test_a_terminal_that_changes_its_size(served: Served) -> None:
    script = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.05; done"
    terminal = Terminal(served, "exec", "web", "-t", "--", "sh", "-c", script)
    try:
        terminal.expect(b"ready")
        terminal.resize(100, 40)
        terminal.expect(b"40 100")
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.process.wait(10) == 143
        assert termios.tcgetattr(terminal.slave) == terminal.before
    finally:
        terminal.close()


def test_no_command_is_a_shell_with_a_terminal(served: Served) -> None:
    terminal = Terminal(served, "exec", "web")
    try:
        terminal.type(b"echo $((6*7)); exit 4\r")
        terminal.expect(b"42")
        assert terminal.process.wait(10) == 4
        assert served.fake.execs[-1]["argv"] == []
    finally:
        terminal.close()


def test_rm_asks_on_a_terminal_only(served: Served) -> None:
    terminal = Terminal(served, "rm", "web")
    try:
        terminal.expect(b"Delete web?")
        terminal.type(b"n\r")
        assert terminal.process.wait(10) == 130
        assert served.fake.workspaces["web"]["observed"] == "running"
    finally:
        terminal.close()
    assert served.run("rm", "web").returncode == 0


def test_up_on_a_terminal_shows_steps_and_a_table(served: Served) -> None:
    terminal = Terminal(served, "up", "https://example.com/a/b", columns=120)
    try:
        terminal.expect(b"STEP")
        terminal.expect(b"1.23 s")
        terminal.expect(b"roost exec b")
        assert terminal.process.wait(10) == 0
    finally:
        terminal.close()


# --- much ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_half_a_gigabyte_both_ways(served: Served, tmp_path: Path) -> None:
    size = 500 << 20
    block = os.urandom(1 << 20)
    source, target = tmp_path / "in", tmp_path / "out"
    digest = hashlib.blake2b()
    with source.open("wb") as file:
        for _ in range(size >> 20):
            file.write(block)
            digest.update(block)
    feed = subprocess.Popen(["cat", str(source)], stdout=subprocess.PIPE)
    with target.open("wb") as out:
        process = served.popen("exec", "web", "--", "cat", stdin=feed.stdout, stdout=out)
        assert feed.stdout is not None
        feed.stdout.close()
        assert process.wait(110) == 0
        assert feed.wait() == 0
    assert target.stat().st_size == size
    with target.open("rb") as file:
        assert hashlib.file_digest(file, hashlib.blake2b).digest() == digest.digest()
