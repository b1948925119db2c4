"""Values as people write them on a command line."""

from __future__ import annotations

import re

import typer

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgtp]?)(i?b?)", re.IGNORECASE)
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}


def parse_size(text: str) -> int:
    """Bytes from `512M`, `4G`, `1.5GiB`, `1073741824`; units are powers of 1024."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[3].lower() == "i":
        raise typer.BadParameter(f"{text!r} is not a size; write 512M, 4G or a number of bytes")
    return int(float(match[1]) * 1024 ** _UNITS[match[2].lower()])


def parse_cpus(text: str) -> float:
    """Cores, as `2` or `0.5`; 0: no limit."""
    try:
        cpus = float(text)
    except ValueError:
        cpus = -1.0
    if not 0 <= cpus < 1e6:
        raise typer.BadParameter(f"{text!r} is not a number of cores")
    return cpus


def parse_assignment(text: str) -> str:
    """`NAME=VALUE`, checked."""
    name, equals, _ = text.partition("=")
    if not equals or not name or "\0" in text:
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE")
    return text
