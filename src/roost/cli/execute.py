"""exec: a command in a workspace, as if it ran here."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from roost.cli.frame import INTERRUPTED, Json, Name, verb
from roost.cli.output import note, print_json
from roost.cli.values import parse_assignment
from roost.errors import ExecFailed, InvalidRequest

if TYPE_CHECKING:
    from roost.client.sockets import Exec, ExecRequest

app = typer.Typer(rich_markup_mode=None)

CAPTURE_MAX = 64 << 20
"""Bytes of output that `--json` holds in memory."""
PATIENCE = 3
"""So many Ctrl-C end us, even when the command ignores them."""


class ExecCommand(TyperCommand):
    """Options stand before or after NAME; the command begins at `--` or at the first word after NAME."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self._reordered(args))

    def _reordered(self, args: list[str]) -> list[str]:
        takes_value: dict[str, bool] = {
            option: not getattr(parameter, "is_flag", False)
            for parameter in self.params
            if parameter.param_type_name == "option"
            for option in parameter.opts
        }
        options: list[str] = []
        name: list[str] = []
        rest = list(args)
        while rest:
            word = rest[0]
            if word == "--":
                rest.pop(0)
                if name:
                    break
                name, rest = rest[:1], rest[1:]
            elif word.startswith("-") and word != "-":
                options.append(rest.pop(0))
                if takes_value.get(word) and rest:
                    options.append(rest.pop(0))
            elif not name:
                name = [rest.pop(0)]
            else:
                break
        return [*options, "--", *name, *rest]


@app.command("exec", cls=ExecCommand)
@verb
def execute(
    name: Name,
    command: Annotated[
        list[str] | None, typer.Argument(metavar="[-- CMD...]", help="Command; none: a shell.", show_default=False)
    ] = None,
    tty: Annotated[bool, typer.Option("-t", "--tty", help="Give it a terminal.")] = False,
    user: Annotated[str | None, typer.Option("-u", "--user", help="Run as this user of the image, or uid.")] = None,
    workdir: Annotated[str | None, typer.Option("-w", "--workdir", help="Run in this directory, not in HOME.")] = None,
    env: Annotated[
        list[str] | None, typer.Option("-e", "--env", metavar="K=V", parser=parse_assignment, help="Set a variable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a command in a workspace, or a shell."""
    import asyncio

    from roost.client.sockets import ExecRequest

    argv = tuple(command or ())
    if as_json and (tty or not argv):
        raise InvalidRequest("--json captures the output of a command; it takes CMD and no -t")
    tty = tty or (not argv and sys.stdin.isatty())
    variables = dict(item.partition("=")[::2] for item in env or ())
    if tty and "TERM" in os.environ:
        variables.setdefault("TERM", os.environ["TERM"])
    request = ExecRequest(argv, user, workdir, variables, _size() if tty else None, stdin=True)
    if as_json:
        code = asyncio.run(_captured(name, request))
    else:
        code = asyncio.run(_joined(name, request))
    raise typer.Exit(code)


def _size() -> tuple[int, int]:
    for stream in (sys.stdout, sys.stdin, sys.stderr):
        try:
            columns, rows = os.get_terminal_size(stream.fileno())
        except (OSError, ValueError):
            continue
        if columns > 0 and rows > 0:
            return columns, rows
    return 80, 24


async def _joined(name: str, request: ExecRequest) -> int:
    from roost.cli.pump import join
    from roost.client import AsyncClient
    from roost.client.sockets import execute

    async with execute(AsyncClient(), name, request) as running:
        with _raw_terminal(request.tty is not None) as raw, _signals(running, raw):
            return await join(running, 0, 1, 2)


@contextmanager
def _raw_terminal(wanted: bool) -> Iterator[bool]:
    """The terminal passes keys on unread meanwhile; whether there is one."""
    if not wanted or not sys.stdin.isatty():
        yield False
        return
    import termios
    import tty

    before = termios.tcgetattr(0)
    tty.setraw(0, termios.TCSADRAIN)  # by default it throws away what was typed ahead
    try:
        yield True
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


@contextmanager
def _signals(running: Exec, raw: bool) -> Iterator[None]:
    """Pass signals on to the command; with a raw terminal keys do that, and a signal ends us and restores it."""
    import asyncio
    import signal

    loop = asyncio.get_running_loop()
    this = asyncio.current_task()
    assert this is not None
    pending: set[asyncio.Task[None]] = set()
    interrupts = 0

    def send(what: Any) -> None:
        task = loop.create_task(what)
        pending.add(task)
        task.add_done_callback(_done)

    def _done(task: asyncio.Task[None]) -> None:
        pending.discard(task)
        if not task.cancelled():
            task.exception()  # the connection is gone: the output says so

    def pass_on(number: int) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        if interrupts >= PATIENCE:
            note("interrupted; the command may still run")
            os._exit(INTERRUPTED)  # a thread may hang in a write that nobody reads
        send(running.signal(number))

    handled = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT]
    if raw:
        loop.add_signal_handler(signal.SIGWINCH, lambda: send(running.resize(*_size())))
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, this.cancel)
    else:
        for number in handled:
            loop.add_signal_handler(number, pass_on, number)
    try:
        yield
    except asyncio.CancelledError:
        raise typer.Exit(128 + signal.SIGTERM) from None
    finally:
        for number in [*handled, signal.SIGWINCH]:
            loop.remove_signal_handler(number)
        for task in pending:
            task.cancel()


async def _captured(name: str, request: ExecRequest) -> int:
    """Run it and print what it wrote as one document."""
    import asyncio
    import time

    from roost.cli.pump import send_all
    from roost.client import AsyncClient
    from roost.client.sockets import Channel, execute

    began = time.monotonic()
    kept = {Channel.stdout: bytearray(), Channel.stderr: bytearray()}
    async with execute(AsyncClient(), name, request) as running:
        with _signals(running, False):
            sending = asyncio.create_task(send_all(running, 0))
            try:
                async for channel, data in running.output():
                    kept[channel] += data
                    if sum(map(len, kept.values())) > CAPTURE_MAX:
                        raise ExecFailed(
                            f"the command wrote more than {CAPTURE_MAX} bytes",
                            next_step="Run it without --json: then its output is streamed.",
                        )
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
    assert running.exit_code is not None
    print_json(
        {
            "exit_code": running.exit_code,
            **_text("stdout", kept[Channel.stdout]),
            **_text("stderr", kept[Channel.stderr]),
            "duration_ms": round((time.monotonic() - began) * 1000, 3),
        }
    )
    return running.exit_code


def _text(key: str, data: bytearray) -> dict[str, str]:
    try:
        return {key: data.decode()}
    except UnicodeDecodeError:
        import base64

        return {f"{key}_base64": base64.b64encode(data).decode()}
