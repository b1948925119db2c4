"""image: build one where there is no registry, list those that are here."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from roost.cli.frame import Json, verb
from roost.cli.output import human_bytes, note, print_json, table

app = typer.Typer(rich_markup_mode=None)
image_app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)
app.add_typer(image_app, name="image", help="Build and list images.")


@image_app.command()
@verb
def ls(as_json: Json = False) -> None:
    """List the images on the node."""
    from roost.client import AsyncClient

    found = asyncio.run(AsyncClient().images())
    if as_json:
        print_json({"items": found})
        return
    rows = [[str(i.get("ref")), str(i.get("digest"))[:19], human_bytes(i.get("size_bytes"))] for i in found]
    table(["IMAGE", "DIGEST", "SIZE"], rows, right=(2,))


@image_app.command()
@verb
def pull(
    ref: Annotated[str, typer.Argument(metavar="IMAGE", help="As docker writes it.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Fetch an image to the node before a workspace needs it."""
    from roost.client import AsyncClient

    document = asyncio.run(AsyncClient().pull_image(ref))
    if as_json:
        print_json(document)
    else:
        note(f"{document.get('ref', ref)} is on the node")


@image_app.command()
@verb
def bootstrap(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the image.", show_default=False)],
    packages: Annotated[
        list[str] | None, typer.Option("--packages", metavar="A,B", help="Further Debian packages.")
    ] = None,
    suite: Annotated[
        str | None, typer.Option("--suite", help="Release of Debian or Ubuntu; default: the host's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Build a Debian image from the host's package mirrors, into the node's private registry."""
    from roost.cli.background import ensure
    from roost.client import AsyncClient
    from roost.images import bootstrap as builder
    from roost.settings import load

    settings = load()
    asyncio.run(ensure(AsyncClient()))
    said = [""]

    def progress(text: str, _part: float | None) -> None:
        if text != said[0]:
            said[0] = text
            note(text)

    chosen = [word for item in packages or () for word in item.replace(",", " ").split()]
    result = builder.bootstrap(
        name,
        packages=chosen,
        registry=f"127.0.0.1:{settings.registry.port}",
        cache_dir=settings.cache_dir,
        suite=suite,
        progress=progress,
    )
    if as_json:
        print_json(
            {
                "ref": result.ref,
                "digest": str(result.digest),
                "size_bytes": result.size_bytes,
                "cached": result.cached,
                "total_ms": round(result.seconds * 1000, 3),
            }
        )
    else:
        print(f"{result.ref}  {human_bytes(result.size_bytes)}")
        note(f"`roost up --image {result.ref}` uses it")
