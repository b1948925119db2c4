"""The edge of every verb: errors become one line, a JSON document where asked for, and an exit code."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, ParamSpec

import typer
from typer.exceptions import Abort, Exit, TyperException

from roost.cli.output import note, print_json
from roost.errors import InternalError, RoostError, Usage

P = ParamSpec("P")

INTERRUPTED = 130
BROKEN_PIPE = 141
"""128 + SIGPIPE, as a shell says it of a program that died so."""

debug = False
"""Whether errors print their trace; set once, by --debug."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print JSON, one document a line.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the workspace.", show_default=False)]


def verb(function: Callable[P, None]) -> Callable[P, None]:
    """Wrap a verb; a parameter named `as_json` says how its errors are told, one named `name` goes into their hints."""

    @functools.wraps(function)
    def run_verb(*args: P.args, **kwargs: P.kwargs) -> None:
        name = kwargs.get("name")
        try:
            function(*args, **kwargs)
            sys.stdout.flush()
        except RoostError as error:
            raise Exit(tell(error, bool(kwargs.get("as_json")), name if isinstance(name, str) else None)) from None
        except KeyboardInterrupt as interrupt:
            note(str(interrupt) or "interrupted")
            raise Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise Exit(_hush()) from None
        except (Exit, Abort, TyperException):
            raise
        except Exception as error:  # the edge: whatever has no code of its own is our defect
            defect = InternalError(f"{type(error).__name__}: {error}")
            defect.__cause__ = error
            raise Exit(tell(defect, bool(kwargs.get("as_json")))) from None

    return run_verb


def tell(error: RoostError, as_json: bool, name: str | None = None) -> int:
    """Say an error to people on stderr, to programs on stdout; its exit code."""
    if debug:
        import traceback

        traceback.print_exception(error)
    hint = error.hint if name is None else error.hint.replace("NAME", name)
    note(
        f"roost: {error.message.rstrip('.')}. {hint}"
        if "\n" not in error.message
        else f"roost: {error.message}\n{hint}"
    )
    if as_json:
        print_json({"error": error.to_problem()})
    return error.exit_code


def run(command: Any, args: list[str]) -> None:
    """Run the root command and exit with the code of the interface."""
    try:
        result = command.main(args=args, prog_name="roost", standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except TyperException as error:
        code = _usage(error, args)
    except (Abort, KeyboardInterrupt):
        note("interrupted")
        code = INTERRUPTED
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _hush()
    sys.exit(code)


def _usage(error: TyperException, args: list[str]) -> int:
    show = getattr(error, "show", None)
    if show is not None:
        show(sys.stderr)
    else:
        note(str(error))
    before = args[: args.index("--")] if "--" in args else args
    if "--json" in before:
        print_json({"error": Usage(error.format_message()).to_problem()})
    return error.exit_code


def _hush() -> int:
    """Nobody reads us any more: keep the interpreter from complaining about it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE
