"""A start as one watches it: its steps as they come, then a table of what took how long.

The steps are the server's events; they are for the eye only.  What a start came to is said by `settled`, so a lost
event stream costs a line on the screen and nothing else.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any

from roost.cli.output import human_ms, note, plain, table
from roost.errors import RoostError

if TYPE_CHECKING:
    from roost.client import AsyncClient, Step, Workspace

START_TIMEOUT_S = 6 * 3600.0
"""Pulls and clones have limits of their own; this one only ends a wait that nobody watches any more."""
AGENT_S = 2.0


def interrupted_start(name: str) -> KeyboardInterrupt:
    """What Ctrl-C during a start says: nothing is taken back."""
    return KeyboardInterrupt(
        f"interrupted; {name} is still wanted and goes on starting. "
        f"`roost up {name}` waits for it again, `roost stop {name}` stops it."
    )


async def follow_start(
    client: AsyncClient, name: str, request: Callable[[], Awaitable[Workspace]], *, quiet: bool
) -> Workspace:
    """Ask for a start and show its steps until it is there. Raises the error it ended in, TimedOut, Superseded."""
    asked = await request()
    async with _agent_lent(client, asked):
        watching = asyncio.create_task(_watch(client, name, asked.start, quiet))
        try:
            workspace = await client.settled(name, asked.generation, START_TIMEOUT_S)
            await _last_steps(watching)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
    return workspace.raise_if_failed()


async def _last_steps(watching: asyncio.Task[None]) -> None:
    """The end is known through another request: give the last events a moment to arrive."""
    await asyncio.wait({watching}, timeout=0.1)


async def _watch(client: AsyncClient, name: str, start: int, quiet: bool) -> None:
    view: _Lines | _Live = _Live() if sys.stderr.isatty() and not quiet else _Lines(quiet)
    with view:
        try:
            async with aclosing(client.events(name, follow=True)) as events:
                async for event in events:
                    if event.start < start:
                        continue
                    if event.step is not None:
                        view.step(event.step)
                    elif event.kind == "note" and event.detail:
                        view.note(event.detail)
                    elif event.kind == "state" and event.to_state in ("running", "error"):
                        return
        except RoostError as error:
            view.note(f"the steps cannot be shown: {error.message}")


class _Lines:
    """One line on stderr for each step that ended."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None

    def step(self, step: Step) -> None:
        if step.status != "running" and not self._quiet:
            note(_line(step))

    def note(self, text: str) -> None:
        if not self._quiet:
            note(f"  {text.rstrip()}")


class _Live:
    """The step at work with a spinner and what it says last; those before it stand above."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.spinner import Spinner
        from rich.text import Text

        self._text = Text
        self._console = Console(stderr=True, highlight=False, no_color=bool(os.environ.get("NO_COLOR")))
        self._spinner = Spinner("dots", text="")
        self._status: Any = None

    def __enter__(self) -> None:
        from rich.live import Live

        self._live = Live(self._spinner, console=self._console, transient=True, refresh_per_second=12)
        self._live.__enter__()
        self._say("waiting")

    def __exit__(self, *error: Any) -> None:
        self._live.__exit__(*error)

    def step(self, step: Step) -> None:
        if step.status == "running":
            self._name = step.step
            self._say(f"{step.step} {step.detail}")
        else:
            style = {"failed": "red", "skipped": "dim"}.get(step.status, "")
            self._live.console.print(self._text(plain(_line(step)), style=style))

    def note(self, text: str) -> None:
        self._say(f"{getattr(self, '_name', '')} {text}")

    def _say(self, text: str) -> None:
        line = plain(text).strip().splitlines()
        self._spinner.update(text=self._text((line[-1] if line else "")[: max(20, self._console.width - 4)]))


def _line(step: Step) -> str:
    marks = {"done": "✓", "failed": "✗", "skipped": "-"}
    detail = f"  {step.detail}" if step.detail else ""
    return f"{marks.get(step.status, ' ')} {step.step:<12} {human_ms(step.ms):>9}{detail}".replace("\n", " ")


def tell_start(workspace: Workspace) -> None:
    """The table of a start, and how to go on."""
    last = workspace.last_start
    if last is not None and last.steps:
        rows = [
            [step.step, human_ms(step.ms), step.status if step.status != "done" else "", step.detail]
            for step in last.steps
        ]
        table(["STEP", "TIME", "", ""], [*rows, ["total", human_ms(last.total_ms), "", ""]], right=(1,))
    where = f" in {workspace.repo.path}" if workspace.repo is not None and workspace.repo.path else ""
    print(f"\n{workspace.name} is ready{where}.")
    print(f"  roost exec {workspace.name}            a shell in it")
    print(f"  roost exec {workspace.name} -- CMD     run a command")
    print(f"  roost stop {workspace.name}            stop it; HOME stays")


# --- ssh-agent ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _agent_lent(client: AsyncClient, workspace: Workspace) -> AsyncIterator[None]:
    """Lend the caller's ssh-agent while a workspace with an ssh repository starts."""
    agent = os.environ.get("SSH_AUTH_SOCK")
    if not agent or workspace.repo is None or not _is_ssh(workspace.repo.url):
        yield
        return
    from roost.client.sockets import lend_agent
    from roost.repos.agent import answer

    ready = asyncio.Event()
    lending = asyncio.create_task(lend_agent(client, workspace.name, lambda body: answer(body, agent), ready))
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait({lending, waiting}, timeout=AGENT_S, return_when=asyncio.FIRST_COMPLETED)
    if not ready.is_set():
        note("the ssh-agent could not be lent to the workspace; ssh may refuse the clone")
    try:
        yield
    finally:
        lending.cancel()
        waiting.cancel()
        await asyncio.gather(lending, waiting, return_exceptions=True)


def _is_ssh(url: str | None) -> bool:
    from roost.errors import InvalidRepository
    from roost.repos.urls import LocalPath, parse

    try:
        parsed = parse(url) if url else None
    except InvalidRepository:
        return False
    return parsed is not None and not isinstance(parsed, LocalPath) and parsed.scheme == "ssh"
