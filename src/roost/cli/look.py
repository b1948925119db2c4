"""ls, show, logs, events: what there is and what happened."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from roost.cli.frame import Json, JsonLines, Name, verb
from roost.cli.output import age, clock, human_bytes, human_ms, note, pairs, plain, print_json, print_json_line, table

if TYPE_CHECKING:
    from roost.client import Event, LogLine, Workspace

app = typer.Typer(rich_markup_mode=None)

Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes, until interrupted.")]


@app.command()
@verb
def ls(
    everything: Annotated[bool, typer.Option("--all", "-a", help="Those in the trash too.")] = False,
    as_json: Json = False,
) -> None:
    """List the workspaces."""
    import asyncio

    from roost.client import AsyncClient

    found = asyncio.run(AsyncClient().workspaces(deleted=everything))
    if as_json:
        print_json({"items": [workspace.document for workspace in found]})
    elif found or not sys.stdout.isatty():
        headers = ["NAME", "STATE", "REPOSITORY", "IMAGE", "AGE"]
        table(headers, [[w.name, _state(w), _source(w), w.image, age(w.created_at)] for w in found])
    else:
        note("no workspaces; `roost up` in a repository makes one")


def _state(workspace: Workspace) -> str:
    if workspace.settled or workspace.observed == "error":
        return workspace.observed
    return f"{workspace.observed}, to be {workspace.desired}"


def _source(workspace: Workspace) -> str:
    repo = workspace.repo
    return "-" if repo is None else (repo.url or repo.name)


@app.command()
@verb
def show(name: Name, as_json: Json = False) -> None:
    """Show one workspace: state, settings, the steps of its last start."""
    import asyncio

    from roost.client import AsyncClient

    workspace = asyncio.run(AsyncClient().workspace(name))
    if as_json:
        print_json(workspace.document)
        return
    limits, repo, error = workspace.document.get("limits") or {}, workspace.repo, workspace.error
    pairs(
        [
            ("name", workspace.name),
            ("state", _state(workspace)),
            ("reason", workspace.reason),
            ("error", f"{error.message} ({error.code})" if error else None),
            ("what to do", error.hint if error else None),
            ("image", workspace.image),
            ("user", workspace.user),
            ("home", workspace.home),
            ("repository", _source(workspace) if repo else None),
            ("branch", repo.branch if repo else None),
            ("path", repo.path if repo else None),
            ("cpus", f"{limits['cpus']:g}" if limits.get("cpus") else None),
            ("memory", human_bytes(limits["memory_bytes"]) if limits.get("memory_bytes") else None),
            ("disk", _disk(workspace.document.get("usage") or {}, limits.get("disk_bytes") or 0)),
            ("pids", str(limits["pids"]) if limits.get("pids") else None),
            ("owner", workspace.owner),
            ("created", workspace.created_at),
            ("started", workspace.started_at),
            ("trash until", workspace.trash_until),
        ]
    )
    last = workspace.last_start
    if last is not None and last.steps:
        print()
        rows = [[step.step, human_ms(step.ms), step.status, step.detail] for step in last.steps]
        table(["STEP", "TIME", "STATE", ""], [*rows, ["total", human_ms(last.total_ms), "", ""]], right=(1,))


def _disk(usage: dict[str, Any], limit: int) -> str | None:
    used = usage.get("home_bytes")
    parts = [f"{human_bytes(used)} used" if used is not None else "", f"of {human_bytes(limit)}" if limit else ""]
    return " ".join(part for part in parts if part) or None


@app.command()
@verb
def logs(
    name: Name,
    follow: Follow = False,
    previous: Annotated[bool, typer.Option("--previous", "-p", help="Of the start before the last.")] = False,
    as_json: JsonLines = False,
) -> None:
    """Show the log of a start and the output of the container."""
    import asyncio

    from roost.client import AsyncClient

    async def work() -> None:
        async for line in AsyncClient().logs(name, follow=follow, previous=previous):
            print_json_line(line.document) if as_json else _print_line(line)

    asyncio.run(work())


def _print_line(line: LogLine) -> None:
    target = sys.stderr if line.channel == "stderr" else sys.stdout
    text = plain(line.text) if target.isatty() else line.text
    print(text.removesuffix("\n"), file=target, flush=True)


@app.command()
@verb
def events(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Of one workspace only.")] = None,
    follow: Follow = False,
    as_json: JsonLines = False,
) -> None:
    """Show what happened to workspaces."""
    import asyncio

    from roost.client import AsyncClient

    async def work() -> None:
        async for event in AsyncClient().events(name, follow=follow):
            if as_json:
                print_json_line(event.document)
            else:
                print(plain(_event_line(event)), flush=True)

    asyncio.run(work())


def _event_line(event: Event) -> str:
    if event.step is not None:
        took = f" {human_ms(event.step.ms)}" if event.step.status != "running" else ""
        text = f"{event.step.step}: {event.step.status}{took}"
    elif event.to_state is not None:
        text = f"{event.from_state} -> {event.to_state}"
    else:
        text = event.kind
    detail = f"  {event.detail}" if event.detail else ""
    error = f"  {event.error.message}" if event.error is not None else ""
    return f"{clock(event.at)}  {event.name:<20}  {text}{detail}{error}".replace("\n", " ")
