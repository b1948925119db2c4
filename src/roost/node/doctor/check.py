"""What a check of the doctor says, and the little that checks of several kinds share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from roost.settings import Settings

Status = Literal["have", "lack", "warn"]


@dataclass(frozen=True)
class Check:
    """One thing looked at."""

    name: str
    status: Status
    """have: there; lack: not there; warn: there with a limit, or not to be found out."""
    detail: str
    """What was seen."""
    meaning: str
    """What roost does with it."""
    remedy: str = ""
    """How to get it; empty when there is nothing to do."""
    required: bool = False
    """Without it no workspace starts."""


Probe = Callable[[Settings], Iterable[Check]]


def have(works: bool) -> Status:
    """The status of what is there or not, without a limit."""
    return "have" if works else "lack"


def existing(path: Path) -> Path:
    """The path, or its nearest ancestor that exists."""
    return next((folder for folder in (path, *path.parents) if folder.exists()), Path("/"))
