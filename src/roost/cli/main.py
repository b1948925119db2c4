"""Where `roost` begins: the list of verbs, and the loading of the one that is asked for.

`roost --help` must take under 200 ms cold and Typer alone takes 95: so this module holds the verbs' help lines itself
and imports a verb's module only to run it, or to print that verb's own help.  tests/unit/test_cli_imports.py holds the
lines equal to those of the modules, and lists what the quick verbs may import.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, MutableMapping, Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_group

from roost import __version__
from roost.cli import frame

SECTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "Workspaces": {
        "up": ("up", "Make a workspace from a repository, or start one, and wait until it is ready."),
        "ls": ("look", "List the workspaces."),
        "show": ("look", "Show one workspace: state, settings, the steps of its last start."),
        "start": ("lifecycle", "Start a workspace."),
        "stop": ("lifecycle", "Stop a workspace; its HOME stays."),
        "restart": ("lifecycle", "Stop a workspace and start it again."),
        "rm": ("lifecycle", "Put workspaces in the trash; `undelete` takes them out again."),
        "undelete": ("lifecycle", "Take a workspace out of the trash."),
    },
    "Inside": {
        "exec": ("execute", "Run a command in a workspace, or a shell."),
        "cp": ("copy", "Copy files between this machine and a workspace."),
        "logs": ("look", "Show the log of a start and the output of the container."),
        "events": ("look", "Show what happened to workspaces."),
    },
    "Host": {
        "doctor": ("host", "Say what this host has and lacks, and how to get it."),
        "server": ("processes", "Run the server, or start, stop and see it in the background."),
        "node": ("processes", "Run the node, or start, stop and see it in the background."),
        "image": ("image", "Build and list images."),
        "config": ("host", "Show the settings, their documentation and where their values come from."),
        "version": ("host", "Show the versions of this command and of the server."),
    },
}
VERBS = {verb: entry for section in SECTIONS.values() for verb, entry in section.items()}


class _Lazy(MutableMapping[str, Any]):
    """The commands by name; a command is made when it is asked for."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getitem__(self, verb: str) -> Any:
        if verb not in self._made:
            module = import_module(f"roost.cli.{VERBS[verb][0]}")
            self._made.update(get_group(module.app).commands)
        return self._made[verb]

    def __setitem__(self, verb: str, command: Any) -> None:
        self._made[verb] = command

    def __delitem__(self, verb: str) -> None:
        del self._made[verb]

    def __iter__(self) -> Iterator[str]:
        return iter(VERBS)

    def __len__(self) -> int:
        return len(VERBS)


class VerbGroup(TyperGroup):
    """Typer's group over commands that are not loaded yet."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        self.commands = _Lazy()

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        width = max(map(len, VERBS))
        for title, verbs in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(verb.ljust(width), text) for verb, (_, text) in verbs.items()])


app = typer.Typer(
    cls=VerbGroup,
    name="roost",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Every verb takes --json. Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 conflict, 5 refused, "
    "6 something is missing, 7 timed out, 130 interrupted.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"roost {__version__}")
        raise typer.Exit


@app.callback()
def roost(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print the trace of an error.")] = False,
) -> None:
    """Development workspaces whose HOME persists."""
    frame.debug = debug


def main(args: Sequence[str] | None = None) -> None:
    """Run one command line and exit."""
    frame.run(typer.main.get_command(app), list(sys.argv[1:] if args is None else args))


if __name__ == "__main__":
    main()
