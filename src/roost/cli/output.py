"""How things look: JSON for programs on stdout, tables for people, notes on stderr.

On a terminal tables are Rich's; in a pipe they are plain columns, never cut to a width that a pipe does not have.
What comes from workspaces (details of steps, messages) is printed without control characters: it must not steer a
terminal.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any


def print_json(document: Any) -> None:
    """The one document of a command; indented for people on a terminal."""
    print(json.dumps(document, indent=2 if sys.stdout.isatty() else None, ensure_ascii=False), flush=True)


def print_json_line(document: Any) -> None:
    """One of a stream of documents."""
    print(json.dumps(document, ensure_ascii=False), flush=True)


def note(text: str) -> None:
    """A line for people on stderr."""
    try:
        print(plain(text), file=sys.stderr, flush=True)
    except BrokenPipeError:
        return


def plain(text: str) -> str:
    """Without what would steer a terminal; line breaks and tabs stay."""
    return "".join(char if char in "\n\t" or char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def colour() -> bool:
    """Whether stdout may be coloured (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


STATE_STYLES = {"running": "green", "done": "green", "ok": "green", "error": "red", "failed": "red", "lack": "red"}


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """A table on stdout; `right` names the columns that are aligned to the right."""
    cells = [[plain(cell).replace("\n", " ") for cell in row] for row in rows]
    if sys.stdout.isatty():
        _rich_table(headers, cells, right)
        return
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    for row in [list(headers), *cells]:
        padded = (
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(padded).rstrip())


def _rich_table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for index, header in enumerate(headers):
        made.add_column(header, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell, style=STATE_STYLES.get(cell, "")) for cell in row))
    Console(highlight=False, no_color=not colour()).print(made)


def pairs(items: Sequence[tuple[str, str | None]]) -> None:
    """Names and values, one a line; what has no value is left out."""
    shown = [(name, plain(value)) for name, value in items if value]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        print(f"{name.ljust(width)}  {value}")


# --- quantities ---------------------------------------------------------------------------------------------------


def human_bytes(size: int | None) -> str:
    """As `4.0 GiB`; `-` when it is not known."""
    if size is None:
        return "-"
    number, unit = float(size), "B"
    for bigger in ("KiB", "MiB", "GiB", "TiB"):
        if number < 1024:
            break
        number, unit = number / 1024, bigger
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"


def human_ms(ms: float | None) -> str:
    """As `12 ms`, `1.25 s`, `3 min 20 s`."""
    if ms is None:
        return "-"
    if ms < 1000:
        return f"{ms:.0f} ms"
    if ms < 60_000:
        return f"{ms / 1000:.2f} s"
    return f"{int(ms // 60_000)} min {ms % 60_000 / 1000:.0f} s"


def age(moment: str | None) -> str:
    """How long ago an RFC 3339 time was, in its largest unit."""
    then = instant(moment)
    if then is None:
        return "-"
    seconds = max(0.0, (datetime.now(UTC) - then).total_seconds())
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds)} s"


def clock(moment: str | None) -> str:
    """An RFC 3339 time as the local time of day."""
    then = instant(moment)
    return then.astimezone().strftime("%H:%M:%S.%f")[:-3] if then is not None else "-"


def instant(moment: str | None) -> datetime | None:
    """The time in an RFC 3339 string; None when there is none."""
    if not moment:
        return None
    try:
        found = datetime.fromisoformat(moment)
    except ValueError:
        return None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)
