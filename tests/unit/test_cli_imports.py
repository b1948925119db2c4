"""What the quick verbs import, and how long they take."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import pytest
from typer.main import get_group

from roost.cli.main import VERBS
from tests.unit.cli_server import serve

HEAVY = ("pydantic", "pydantic_settings", "fastapi", "starlette", "sqlalchemy", "alembic", "grpc", "structlog", "httpx")
NOT_FOR_HELP = (*HEAVY, "asyncio", "h11", "websockets", "rich", "ssl", "roost.client", "roost.repos", "roost.linux")
NOT_FOR_LS = (
    *HEAVY,
    "websockets",
    "rich",
    "roost.settings",
    "roost.repos",
    "roost.linux",
    "roost.server",
    "roost.node",
)


def imported(code: str, *, env: dict[str, str] | None = None) -> set[str]:
    probe = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nsys.stderr.write(chr(10).join(sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", probe], env=env, capture_output=True, timeout=30, check=True)
    return set(done.stderr.decode().splitlines())


def found(modules: set[str], forbidden: tuple[str, ...]) -> list[str]:
    return sorted(m for m in modules if any(m == name or m.startswith(f"{name}.") for name in forbidden))


def test_help_and_ls_import_little() -> None:
    with tempfile.TemporaryDirectory(prefix="roost-t") as root, serve(Path(root)) as served:
        served.fake.add("web")
        run = "from roost.cli.main import main; main"
        assert found(imported(f"{run}(['--help'])", env=served.env()), NOT_FOR_HELP) == []
        modules = imported(f"{run}(['ls'])", env=served.env())
        assert "roost.client.http" in modules, "the probe looked at something else"
        assert found(modules, NOT_FOR_LS) == []


@pytest.mark.parametrize(("args", "limit_s"), [(["--help"], 0.2), (["ls"], 0.4)], ids=["help", "ls"])
def test_cold_speed(args: list[str], limit_s: float) -> None:
    # Processor time, the best of several: on a machine that is busy with other tests it is what stays of the wall time.
    with tempfile.TemporaryDirectory(prefix="roost-t") as root, serve(Path(root)) as served:
        served.fake.add("web")
        best = 9.0
        for _ in range(8):
            process = served.popen(*args, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            assert process.returncode == 0
            best = min(best, usage.ru_utime + usage.ru_stime)
        assert best < limit_s, f"roost {' '.join(args)} takes {best * 1000:.0f} ms"


@pytest.mark.parametrize("verb", VERBS)
def test_help_lines_are_those_of_the_modules(verb: str) -> None:
    module, text = VERBS[verb]
    command = get_group(import_module(f"roost.cli.{module}").app).commands[verb]
    assert command.help is not None and " ".join(command.help.split()) == text


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_json(verb: str) -> None:
    command = get_group(import_module(f"roost.cli.{VERBS[verb][0]}").app).commands[verb]
    commands = [command, *getattr(command, "commands", {}).values()]
    for each in commands:
        if each.name == "image":
            continue
        assert any("--json" in parameter.opts for parameter in each.params), each.name
