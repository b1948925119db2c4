"""server, node: in the foreground for a supervisor or a terminal, in the background for everybody else."""

from __future__ import annotations

import asyncio
import os
from importlib import import_module
from typing import TYPE_CHECKING, Annotated

import typer

from roost.cli.frame import Json, verb
from roost.cli.output import note, pairs, print_json

if TYPE_CHECKING:
    from roost.cli.background import Part

app = typer.Typer(rich_markup_mode=None)
server_app = typer.Typer(rich_markup_mode=None, invoke_without_command=True)
node_app = typer.Typer(rich_markup_mode=None, invoke_without_command=True)
app.add_typer(server_app, name="server", help="Run the server, or start, stop and see it in the background.")
app.add_typer(node_app, name="node", help="Run the node, or start, stop and see it in the background.")


@server_app.callback()
@verb
def server(context: typer.Context, as_json: Json = False) -> None:
    if context.invoked_subcommand is None:
        # By name: command line and server are floors beside each other; here one process becomes the other.
        import_module("roost.server.main").run()


@node_app.callback()
@verb
def node(context: typer.Context, as_json: Json = False) -> None:
    if context.invoked_subcommand is None:
        import_module("roost.node.main").run()


@server_app.command("start")
@verb
def server_start(as_json: Json = False) -> None:
    """Start the server in the background and wait until it answers."""
    _start("server", as_json)


@node_app.command("start")
@verb
def node_start(as_json: Json = False) -> None:
    """Start the node in the background and wait until it is connected to the server."""
    _start("node", as_json)


@server_app.command("stop")
@verb
def server_stop(as_json: Json = False) -> None:
    """Stop the server; workspaces run on."""
    _stop("server", False, as_json)


@node_app.command("stop")
@verb
def node_stop(
    everything: Annotated[bool, typer.Option("--all", help="Stop the containers and the pool too.")] = False,
    as_json: Json = False,
) -> None:
    """Stop the node and the container engine; containers run on, unless --all."""
    _stop("node", everything, as_json)


@server_app.command("status")
@verb
def server_status(as_json: Json = False) -> None:
    """Say whether the server runs and answers."""
    _status("server", as_json)


@node_app.command("status")
@verb
def node_status(as_json: Json = False) -> None:
    """Say whether the node runs and is connected."""
    _status("node", as_json)


def _start(part: Part, as_json: bool) -> None:
    from roost.cli.background import start
    from roost.errors import NeedsRoot

    if part == "node" and os.geteuid() != 0:
        raise NeedsRoot("the node mounts, makes namespaces and runs the container engine")
    pids = start((part,))
    if as_json:
        print_json({"process": part, "running": True, "pid": pids.get(part)})
    else:
        note(f"the {part} runs (pid {pids.get(part, '?')})")


def _stop(part: Part, everything: bool, as_json: bool) -> None:
    from roost.cli.background import stop

    pid = stop(part, everything=everything)
    if as_json:
        print_json({"process": part, "running": False, "pid": pid})
    else:
        note(f"the {part} did not run" if pid is None else f"the {part} (pid {pid}) has ended")


def _status(part: Part, as_json: bool) -> None:
    from roost.cli.background import running
    from roost.client import AsyncClient, local_paths
    from roost.errors import RoostError

    paths = local_paths()
    process = running(part, paths)
    client = AsyncClient()
    try:
        health = asyncio.run(client.health())
    except RoostError:
        health = None
    document = {
        "process": part,
        "running": process is not None,
        "pid": process.pid if process is not None else None,
        "log": str(paths.logs / f"{part}.log"),
        "server": {
            "address": str(client.address),
            "reachable": health is not None,
            "version": health.version if health is not None else None,
        },
        "node": {"connected": health is not None and health.node_connected},
    }
    if as_json:
        print_json(document)
        return
    pairs(
        [
            (part, f"runs (pid {process.pid})" if process is not None else "does not run"),
            ("address", f"{client.address} ({'answers' if health is not None else 'does not answer'})"),
            ("node", "connected" if health is not None and health.node_connected else "not connected"),
            ("log", str(paths.logs / f"{part}.log")),
        ]
    )
