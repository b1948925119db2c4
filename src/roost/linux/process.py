"""Processes by identity, not by number.

A pid is reused; (pid, start time, boot id) is not: the start time is field 22 of /proc/PID/stat in clock ticks since
boot (proc(5)), and no two processes of one boot share both.  Signals go through a pidfd (Linux 5.3) that is opened
*before* the identity is compared, so that what is signalled is what was compared: a pid that was reused in between
cannot be hit.  A zombie is dead for everybody but its parent, and so it is for `alive`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

PROC = Path("/proc")


@cache
def boot_id() -> str:
    """The kernel's name for this boot (random(4))."""
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def _stat(pid: int) -> tuple[str, int] | None:
    """State letter and start time of a process, None when there is none."""
    try:
        text = (PROC / str(pid) / "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name (field 2) is in parentheses and may hold anything, parentheses and spaces too.
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[19])


@dataclass(frozen=True)
class ProcessId:
    """One process of one boot."""

    pid: int
    start_time: int
    """Clock ticks since boot."""
    boot: str = field(repr=False)

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The process that has this number now; None when there is none, or only a zombie."""
        found = _stat(pid)
        if found is None or found[0] in "ZX":
            return None
        return cls(pid, found[1], boot_id())

    def alive(self) -> bool:
        """Whether this very process runs; a zombie does not."""
        if self.boot != boot_id():
            return False
        found = _stat(self.pid)
        return found is not None and found[0] not in "ZX" and found[1] == self.start_time

    @contextmanager
    def open(self) -> Iterator[int | None]:
        """A pidfd of this very process for the time of the block; None when it is gone."""
        fd = self.pidfd()
        try:
            yield fd
        finally:
            if fd is not None:
                os.close(fd)

    def pidfd(self) -> int | None:
        """A pidfd of this very process, the caller closes it; None when it is gone.

        Readable (poll) from its exit on, before it is reaped.
        """
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        if not self.alive():
            os.close(fd)
            return None
        return fd

    def signal(self, number: int) -> bool:
        """Send a signal to this very process; False when it is gone."""
        with self.open() as fd:
            if fd is None:
                return False
            try:
                signal.pidfd_send_signal(fd, number)
            except ProcessLookupError:
                return False
            return True

    def wait_gone(self, timeout_s: float) -> bool:
        """Wait until it has exited (reaped or not); False when the time ran out first. Blocks."""
        with self.open() as fd:
            if fd is None:
                return True
            poller = select.poll()
            poller.register(fd, select.POLLIN)
            return bool(poller.poll(max(0.0, timeout_s) * 1000))

    def cmdline(self) -> tuple[str, ...]:
        """Its arguments; empty when it is gone."""
        return _strings(self.pid, "cmdline")

    def environ(self) -> dict[str, str]:
        """The environment it was started with; empty when it is gone or not ours to read."""
        return dict(item.partition("=")[::2] for item in _strings(self.pid, "environ"))


def _strings(pid: int, name: str) -> tuple[str, ...]:
    try:
        data = (PROC / str(pid) / name).read_bytes()
    except OSError:
        return ()
    return tuple(os.fsdecode(part) for part in data.removesuffix(b"\0").split(b"\0")) if data else ()


def all_processes() -> Iterator[ProcessId]:
    """Every process of this pid namespace, zombies aside, in no order."""
    for pid in _pids():
        if (process := ProcessId.of(pid)) is not None:
            yield process


def _pids() -> list[int]:
    return [int(entry.name) for entry in PROC.iterdir() if entry.name.isdecimal()]


# --- pid files ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PidFile:
    """What a pid file says: which process, and what it was started as."""

    process: ProcessId
    fingerprint: str = ""
    """Of its configuration; a daemon whose fingerprint is another's is to be restarted."""


def write_pidfile(path: Path, entry: PidFile) -> None:
    """Write atomically (rename): a reader sees the old file or the new one. JSON, mode 0644."""
    document = {
        "pid": entry.process.pid,
        "start_time": entry.process.start_time,
        "boot_id": entry.process.boot,
        "fingerprint": entry.fingerprint,
    }
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(document) + "\n")
    beside.rename(path)


def read_pidfile(path: Path) -> PidFile | None:
    """What the file says, alive or not; None when there is none or it makes no sense."""
    try:
        document = json.loads(path.read_text())
        process = ProcessId(int(document["pid"]), int(document["start_time"]), str(document["boot_id"]))
        return PidFile(process, str(document.get("fingerprint", "")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


# --- who listens --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listener:
    """A listening TCP socket."""

    address: str
    port: int
    pid: int | None
    """None: in another pid namespace, or not ours to see."""
    command: str

    def __str__(self) -> str:
        who = f"{self.command} (pid {self.pid})" if self.pid is not None else "a process that cannot be seen from here"
        return f"{who} listens on {self.address}:{self.port}"


_TCP_LISTEN = "0A"


def listener(port: int) -> Listener | None:
    """Who listens on this TCP port in our network namespace, on whatever address; None: nobody (proc_net(5))."""
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        try:
            lines = (PROC / "net" / name).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            raw, _, raw_port = fields[1].partition(":")
            if fields[3] != _TCP_LISTEN or int(raw_port, 16) != port:
                continue
            # Addresses are printed as host-order 32-bit words.
            words = [int(raw[i : i + 8], 16) for i in range(0, len(raw), 8)]
            address = socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words))
            pid = _socket_owner(int(fields[9]))
            command = " ".join(_strings(pid, "cmdline")[:2]) if pid is not None else ""
            return Listener(f"[{address}]" if ":" in address else address, port, pid, command)
    return None


def _socket_owner(inode: int) -> int | None:
    wanted = f"socket:[{inode}]"
    for pid in _pids():
        with suppress(OSError):
            for descriptor in list((PROC / str(pid) / "fd").iterdir()):
                with suppress(OSError):
                    if str(descriptor.readlink()) == wanted:
                        return pid
    return None
