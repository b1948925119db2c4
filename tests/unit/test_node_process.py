"""Processes by identity."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

from roost.linux.process import PidFile, ProcessId, listener, read_pidfile, write_pidfile


def test_life_and_death() -> None:
    child = subprocess.Popen(["sleep", "60"])
    process = ProcessId.of(child.pid)
    assert process is not None and process.alive()
    assert not process.wait_gone(0.01)
    assert process.signal(signal.SIGTERM)
    assert process.wait_gone(5)
    assert not process.alive(), "a zombie is dead, though its parent has not waited for it"
    assert ProcessId.of(child.pid) is None
    assert not process.signal(signal.SIGTERM)
    assert child.wait() == -signal.SIGTERM


def test_a_reused_pid_is_another_process() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        process = ProcessId.of(child.pid)
        assert process is not None
        before = replace(process, start_time=process.start_time - 1)
        assert not before.alive()
        assert not before.signal(signal.SIGKILL), "whoever has the number now is not hit"
        assert not replace(process, boot="another").alive()
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()


def test_names_may_hold_anything(tmp_path: Path) -> None:
    program = tmp_path / "a) R 1 (b"
    program.symlink_to("/bin/sleep")
    child = subprocess.Popen([program, "60"])
    try:
        process = ProcessId.of(child.pid)
        assert process is not None and process.alive()
    finally:
        child.kill()
        child.wait()


def test_pidfile(tmp_path: Path) -> None:
    path = tmp_path / "x.pid"
    assert read_pidfile(path) is None
    process = ProcessId.of(os.getpid())
    assert process is not None
    write_pidfile(path, PidFile(process, "abc"))
    assert read_pidfile(path) == PidFile(process, "abc")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.pid"]
    for nonsense in ("", "{}", "[1]", '{"pid": "x"}', "12"):
        path.write_text(nonsense)
        assert read_pidfile(path) is None


def test_who_listens() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        assert listener(port) is None, "bound, not listening"
        server.listen()
        found = listener(port)
        assert found is not None and found.pid == os.getpid() and found.address == "127.0.0.1"
        assert f"(pid {os.getpid()}) listens on 127.0.0.1:{port}" in str(found)
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        found = listener(server.getsockname()[1])
        assert found is not None and found.address == "[::1]"
