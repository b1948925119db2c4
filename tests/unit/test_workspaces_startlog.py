"""The logs of starts: what is read while it is written, after a crash, and what a sweep leaves."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

from roost.workspaces.startlog import StartLog, StartLogs


def texts(logs: StartLogs, workspace: str = "w", *, previous: bool = False) -> list[str]:
    path = logs.path(workspace, previous=previous)
    return [entry["text"] for entry in logs.read(path)[0]] if path else []


def test_what_is_written_is_read_line_by_line(tmp_path: Path) -> None:
    logs = StartLogs(tmp_path)
    log = logs.open("w", 1)
    log.write("one\ntwo")
    log.write("ümlaut \x1b[31m \udcff")
    log.close()
    log.write("after the end")
    log.close()
    assert texts(logs) == ["one", "two", "ümlaut \x1b[31m \udcff"]


def test_the_newest_and_the_one_before_go_by_number(tmp_path: Path) -> None:
    logs = StartLogs(tmp_path)
    for start in (2, 9, 10):
        log = logs.open("w", start)
        log.write(str(start))
        log.close()
    (tmp_path / "w" / "notes.jsonl").write_text("not a start")
    assert (texts(logs), texts(logs, previous=True)) == (["10"], ["9"])
    assert logs.path("other") is None


def test_reading_on_takes_up_where_it_left_and_waits_for_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "1.jsonl"
    logs = StartLogs(tmp_path)
    line = json.dumps({"at": 1.0, "channel": "start", "text": "x"}) + "\n"
    path.write_text(line + line[:10])
    entries, offset = logs.read(path)
    assert (len(entries), offset) == (1, len(line))
    with path.open("a") as file:
        file.write(line[10:])
    entries, offset = logs.read(path, offset)
    assert (len(entries), offset) == (1, 2 * len(line))
    assert logs.read(tmp_path / "gone.jsonl", 5) == ([], 5)


def test_a_line_torn_by_a_crash_is_left_out(tmp_path: Path) -> None:
    logs = StartLogs(tmp_path)
    log = logs.open("w", 1)
    log.write("before")
    log.close()
    path = logs.path("w")
    assert path is not None
    with path.open("a") as file:
        file.write('{"at": 1, "chan\n[1]\n{}\n\n')
    log = logs.open("w", 1)
    log.write("after")
    log.close()
    assert texts(logs) == ["before", "after"]


def test_a_full_disk_loses_lines_and_not_the_start() -> None:
    log = StartLog(Path("/dev/full").open("a", encoding="utf-8"))  # noqa: SIM115 - it is the log's to close
    log.write("x" * 100)
    log.write("y")
    log.close()


def test_a_directory_that_cannot_be_made_loses_the_log(tmp_path: Path) -> None:
    (tmp_path / "w").write_text("in the way")
    log = StartLogs(tmp_path).open("w", 1)
    log.write("x")
    log.close()


def test_a_sweep_drops_old_logs_but_the_newest_two(tmp_path: Path) -> None:
    logs = StartLogs(tmp_path)
    for start in range(1, 6):
        logs.open("w", start).close()
        if start != 3:
            os.utime(tmp_path / "w" / f"{start}.jsonl", (1.0, 1.0))
    logs.sweep(3600)
    assert sorted(path.name for path in (tmp_path / "w").iterdir()) == ["3.jsonl", "4.jsonl", "5.jsonl"]


def test_a_sweep_beside_a_workspace_that_is_destroyed(tmp_path: Path) -> None:
    """The folder may vanish between any two looks at it."""
    logs = StartLogs(tmp_path)
    failures: list[BaseException] = []
    over = threading.Event()

    def sweeping() -> None:
        try:
            while not over.is_set():
                logs.sweep(-1)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=sweeping)
    thread.start()
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        for start in range(8):
            logs.open("w", start).close()
        logs.forget("w")
    over.set()
    thread.join()
    assert failures == []
