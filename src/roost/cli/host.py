"""doctor, config, version: what this host and this installation are."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from roost import __version__
from roost.cli.frame import Json, verb
from roost.cli.output import note, pairs, print_json, table

app = typer.Typer(rich_markup_mode=None)


@app.command()
@verb
def doctor(as_json: Json = False) -> None:
    """Say what this host has and lacks, and how to get it."""
    from dataclasses import asdict

    from roost.node.doctor import checks, missing
    from roost.settings import load

    found = checks(load())
    lacking = missing(found)
    if as_json:
        print_json({"ok": not lacking, "items": [asdict(check) for check in found]})
    else:
        table(["", "CHECK", "SEEN", "MEANS"], [[c.status, c.name, c.detail, c.meaning] for c in found])
        for check in found:
            if check.remedy and check.status != "have":
                print(f"\n{check.name}: {check.remedy}")
    if lacking:
        from roost.errors import MissingFeature

        if not as_json:
            note(f"\nworkspaces cannot start here: {', '.join(check.name for check in lacking)}")
        raise typer.Exit(MissingFeature.exit_code)


@app.command()
@verb
def version(as_json: Json = False) -> None:
    """Show the versions of this command and of the server."""
    import asyncio

    from roost.client import AsyncClient
    from roost.errors import RoostError

    try:
        served = asyncio.run(AsyncClient().health(timeout_s=2.0)).version
    except RoostError:
        served = None
    python = ".".join(map(str, sys.version_info[:3]))
    if as_json:
        print_json({"version": __version__, "server_version": served, "python": python})
    else:
        pairs([("roost", __version__), ("server", served or "does not answer"), ("python", python)])


# --- config -------------------------------------------------------------------------------------------------------


@app.command()
@verb
def config(
    key: Annotated[str | None, typer.Argument(metavar="[KEY]", help="As server.port, or a section.")] = None,
    as_json: Json = False,
) -> None:
    """Show the settings, their documentation and where their values come from."""
    from roost.errors import InvalidRequest
    from roost.settings import config_file

    items = _settings()
    if key is not None:
        items = [item for item in items if item["key"] == key or item["key"].startswith(f"{key}.")]
        if not items:
            raise InvalidRequest(f"there is no setting {key!r}", next_step="`roost config` lists them all.")
    if as_json:
        exact = key is not None and items[0]["key"] == key
        print_json(items[0] if exact else {"file": str(config_file()), "items": items})
        return
    print(f"# settings file: {config_file()}{'' if config_file().is_file() else ' (not there)'}")
    for item in items:
        print(f"\n# {item['doc']}")
        print(f"# {item['source']}; environment: {item['env']}; default: {_toml(item['default'])}")
        print(f"{item['key']} = {_toml(item['value'])}")


def _settings() -> list[dict[str, Any]]:
    """Every setting with its value, documentation and source."""
    from roost.settings import config_file, load

    path = config_file()
    table: dict[str, Any] = {}
    if path.is_file():
        import tomllib

        table = tomllib.loads(path.read_text())
    set_names = {name.upper() for name in os.environ}
    items: list[dict[str, Any]] = []

    def walk(model: Any, given: dict[str, Any], prefix: tuple[str, ...]) -> None:
        for name, info in type(model).model_fields.items():
            value, keys = getattr(model, name), (*prefix, name)
            if hasattr(type(value), "model_fields"):
                inner = given.get(name)
                walk(value, inner if isinstance(inner, dict) else {}, keys)
                continue
            env = "ROOST_" + "__".join(part.upper() for part in keys)
            source = "environment" if env in set_names else f"file {path}" if name in given else "default"
            default = info.get_default(call_default_factory=True)
            items.append(
                {
                    "key": ".".join(keys),
                    "value": _plain(value),
                    "default": _plain(default),
                    "source": source,
                    "env": env,
                    "doc": " ".join((info.description or "").split()),
                }
            )

    walk(load(), table, ())
    return items


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | list) or value is None else str(value)


def _toml(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)
