"""start, stop, restart, rm, undelete: say what is wanted, return when it is so."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from roost.cli.frame import Json, Name, tell, verb
from roost.cli.output import note, print_json
from roost.errors import RoostError

if TYPE_CHECKING:
    from roost.client import Workspace

app = typer.Typer(rich_markup_mode=None)

STOP_TIMEOUT_S = 300.0
"""A stop has a grace of ten seconds by default; what takes longer than this hangs."""
_DONE = {"stop": "stopped", "delete": "in the trash", "undelete": "out of the trash"}


@app.command()
@verb
def start(name: Name, as_json: Json = False) -> None:
    """Start a workspace."""
    _start(name, "start", as_json)


@app.command()
@verb
def restart(name: Name, as_json: Json = False) -> None:
    """Stop a workspace and start it again."""
    _start(name, "restart", as_json)


@app.command()
@verb
def stop(name: Name, as_json: Json = False) -> None:
    """Stop a workspace; its HOME stays."""
    _tell(_apply(name, "stop"), "stop", as_json)


@app.command()
@verb
def undelete(name: Name, as_json: Json = False) -> None:
    """Take a workspace out of the trash."""
    _tell(_apply(name, "undelete"), "undelete", as_json)


@app.command()
@verb
def rm(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of workspaces.", show_default=False)],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Put workspaces in the trash; `undelete` takes them out again."""
    if not yes and sys.stdin.isatty() and sys.stderr.isatty():
        typer.confirm(f"Delete {', '.join(names)}?", abort=True, err=True)
    removed: list[Workspace] = []
    failures: list[RoostError] = []
    for name in dict.fromkeys(names):
        try:
            removed.append(_apply(name, "delete"))
        except RoostError as error:
            failures.append(error)
            if len(names) > 1:
                tell(error, False, name)
            continue
        if not as_json:
            until = removed[-1].trash_until
            note(f"{name} is in the trash{f' until {until}' if until else ''}; `roost undelete {name}` takes it out")
    if failures and len(names) == 1:
        raise failures[0]
    if as_json:
        document: dict[str, object] = {"items": [workspace.document for workspace in removed]}
        print_json(document | ({"error": failures[0].to_problem()} if failures else {}))
    if failures:
        raise typer.Exit(failures[0].exit_code)


def _start(name: str, request: str, as_json: bool) -> None:
    import asyncio

    from roost.cli.progress import follow_start, interrupted_start, tell_start
    from roost.client import AsyncClient

    async def work() -> Workspace:
        client = AsyncClient()
        return await follow_start(client, name, lambda: client.request(name, request), quiet=as_json)

    try:
        workspace = asyncio.run(work())
    except KeyboardInterrupt:
        raise interrupted_start(name) from None
    if as_json:
        print_json(workspace.document)
    else:
        tell_start(workspace)


def _apply(name: str, request: str) -> Workspace:
    import asyncio

    from roost.client import AsyncClient

    async def work() -> Workspace:
        client = AsyncClient()
        asked = await client.request(name, request)
        return (await client.settled(name, asked.generation, STOP_TIMEOUT_S)).raise_if_failed()

    return asyncio.run(work())


def _tell(workspace: Workspace, request: str, as_json: bool) -> None:
    if as_json:
        print_json(workspace.document)
    else:
        note(f"{workspace.name} is {_DONE[request]}")
