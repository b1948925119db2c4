"""cp: files to and from a workspace, as tar streams through exec, so on every runtime.

In the workspace busybox of the tools tree packs and unpacks as the workspace's user: whatever the names, it can do only
what that user can.  Here, what comes is unpacked by `untar`, which trusts nothing; what goes is packed with no owner,
so that it belongs to the workspace's user.
"""

from __future__ import annotations

import asyncio
import os
import posixpath
import re
import tarfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from roost.cli.frame import Json, verb
from roost.cli.output import human_bytes, note, plain, print_json
from roost.errors import CopyFailed, InvalidRequest

if TYPE_CHECKING:
    from roost.cli.untar import Unpacked
    from roost.client import AsyncClient

app = typer.Typer(rich_markup_mode=None)
T = TypeVar("T")

_REMOTE = re.compile(r"([a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?):(.*)", re.DOTALL)
BUSYBOX = "/opt/roost/bin/busybox"
_STDERR_MAX = 64 << 10
# What stands at a path, by the shell's own tests.
_LOOK = (
    'if [ -d "$1" ]; then echo directory; elif [ -e "$1" ] || [ -L "$1" ]; then echo file; else echo nothing; fi; '
    'if [ -L "$1" ]; then echo link; fi'
)


@dataclass(frozen=True)
class Place:
    """One side of a copy."""

    workspace: str | None
    path: str

    @classmethod
    def of(cls, text: str) -> Place:
        """`NAME:path`, else a local path; `./a:b` is local, as with docker."""
        match = _REMOTE.fullmatch(text)
        return cls(match[1], match[2] or ".") if match else cls(None, text)


@app.command()
@verb
def cp(
    source: Annotated[str, typer.Argument(metavar="SRC", help="PATH, NAME:PATH, or - for a tar stream on stdin.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="NAME:PATH, PATH, or - for a tar stream on stdout.")],
    as_json: Json = False,
) -> None:
    """Copy files between this machine and a workspace."""
    src, dst = Place.of(source), Place.of(target)
    if (src.workspace is None) == (dst.workspace is None):
        raise InvalidRequest("one side of a copy is NAME:PATH, the other a path here or -")
    if as_json and target == "-":
        raise InvalidRequest("stdout carries the tar stream; --json has no place there")
    from roost.client import AsyncClient

    client = AsyncClient()
    if dst.workspace is not None:
        files, size = asyncio.run(_copy_in(client, source, dst.workspace, dst.path))
    else:
        assert src.workspace is not None
        files, size = asyncio.run(_copy_out(client, src.workspace, src.path, target))
    if as_json:
        print_json({"source": source, "target": target, "files": files, "size_bytes": size})
    elif target != "-" and source != "-":
        note(f"copied {files} file{'s' if files != 1 else ''}, {human_bytes(size)}")


# --- into a workspace ---------------------------------------------------------------------------------------------


async def _copy_in(client: AsyncClient, source: str, name: str, target: str) -> tuple[int, int]:
    kind, _ = await _look(client, name, target)
    if source == "-":
        if kind != "directory":
            raise CopyFailed(f"{target} is not a directory of {name}", next_step="A tar stream needs a directory.")
        await _tar(client, name, ["-x", "-o", "-f", "-", "-C", _safe(target)], stdin=0, stdout=2)
        return 0, 0
    local = Path(source)
    if not local.exists() and not local.is_symlink():
        raise CopyFailed(f"{source} does not exist", next_step="Check the path.")
    content_only = source.endswith("/.") or source == "."
    into, called = _destination(kind, target, "" if content_only else _name_of(local), local.is_dir())
    if content_only and kind == "nothing":
        into, called = _destination(kind, target, _name_of(local), True)
    counts = [0, 0]
    read_end, write_end = os.pipe()

    def pack() -> None:
        with os.fdopen(write_end, "wb", buffering=0) as pipe:
            # GNU: busybox knows its long names; pax headers it skips.
            with tarfile.open(fileobj=pipe, mode="w|", format=tarfile.GNU_FORMAT, bufsize=1 << 18) as archive:
                archive.add(local, called or ".", filter=lambda member: _unowned(member, counts))

    packing = _thread(pack)
    try:
        await _tar(client, name, ["-x", "-o", "-f", "-", "-C", _safe(into)], stdin=read_end, stdout=2)
    finally:
        os.close(read_end)  # the packing thread ends with EPIPE, if it has not ended
        try:
            await packing
        except BrokenPipeError:
            pass
        except OSError as error:
            raise CopyFailed(f"{error.filename or source}: {error.strerror or error}") from error
    return counts[0], counts[1]


def _name_of(path: Path) -> str:
    return path.name if path.name not in ("", "..") else path.resolve().name


def _destination(kind: str, target: str, name: str, is_directory: bool) -> tuple[str, str]:
    """Where to unpack and under which name, by the rules of `docker cp`."""
    if kind == "directory":
        return target, name
    if kind == "file" and (is_directory or target.endswith("/")):
        raise CopyFailed(f"{target} is a file in the workspace", next_step="Name a directory, or another path.")
    if kind == "nothing" and target.endswith("/") and not is_directory:
        raise CopyFailed(f"{target} does not exist in the workspace", next_step="Make it, or leave the slash out.")
    trimmed = target.rstrip("/") or "/"
    return posixpath.dirname(trimmed) or ".", posixpath.basename(trimmed)


def _unowned(member: tarfile.TarInfo, counts: list[int]) -> tarfile.TarInfo | None:
    if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
        note(f"left out {member.name}: neither file, directory nor link")
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    if not member.isdir():
        counts[0] += 1
        counts[1] += member.size
    return member


# --- out of a workspace -------------------------------------------------------------------------------------------


async def _copy_out(client: AsyncClient, name: str, source: str, target: str) -> tuple[int, int]:
    kind, real = await _look(client, name, source)
    if kind == "nothing":
        raise CopyFailed(f"{source} does not exist in {name}", next_step="Check the path.")
    content_only = source == "." or source.endswith("/.")
    trimmed = source.removesuffix("/.").rstrip("/") or ("/" if source.startswith("/") else ".")
    whole = content_only or trimmed in ("/", ".", "..") or trimmed.endswith("/..")
    arguments = ["-C", _safe(trimmed), "."] if whole else ["-C", _safe(posixpath.dirname(trimmed) or ".")]
    root = "" if whole else posixpath.basename(trimmed)
    called = root
    if root and real is not None:  # a symlink that is named itself is followed, as cp(1) does
        arguments, root = ["-C", posixpath.dirname(real)], posixpath.basename(real)
    if root:
        arguments.append(_safe(root))
    if target == "-":
        await _tar(client, name, ["-c", "-f", "-", *arguments], stdin=None, stdout=1)
        return 0, 0
    into, called = _local_destination(Path(target), called, kind == "directory", target.endswith("/"))
    from roost.cli.untar import unpack

    read_end, write_end = os.pipe()

    def take() -> Unpacked:
        with os.fdopen(read_end, "rb", buffering=1 << 18) as pipe:
            result = unpack(pipe, str(into), root, called)
            while pipe.read(1 << 18):  # padding after the end, so that the other side is not cut off
                pass
            return result

    taking = _thread(take)
    failure: BaseException | None = None
    try:
        await _tar(client, name, ["-c", "-f", "-", *arguments], stdin=None, stdout=write_end)
    except BrokenPipeError:
        pass  # our side gave up, and says why below
    except BaseException as error:
        failure = error
    finally:
        os.close(write_end)
    if failure is not None:
        await asyncio.wait({taking})
        taking.exception()
        raise failure
    result = await taking
    for sentence in result.left_out:
        note(f"left out {plain(sentence)}")
    if result.left_out_count:
        raise CopyFailed(
            f"{result.left_out_count} entries were left out, {result.files} files were copied",
            next_step="What was left out is listed above; `roost cp NAME:PATH -` gives the tar stream as it is.",
            details={"left_out": result.left_out, "files": result.files, "size_bytes": result.bytes},
        )
    return result.files, result.bytes


def _local_destination(target: Path, root: str, is_directory: bool, slash: bool) -> tuple[Path, str]:
    if target.is_dir():
        return target, root
    if target.exists() and is_directory:
        raise CopyFailed(f"{target} is a file here", next_step="Name a directory, or another path.")
    if slash and not is_directory:
        raise CopyFailed(f"{target} is not a directory here", next_step="Make it, or leave the slash out.")
    if not target.parent.is_dir():
        raise CopyFailed(f"{target.parent} is not a directory here", next_step="Make it first.")
    return target.parent, target.name


# --- through exec -------------------------------------------------------------------------------------------------


def _safe(path: str) -> str:
    """A path that busybox does not take for an option."""
    return f"./{path}" if path.startswith("-") else path


async def _look(client: AsyncClient, name: str, path: str) -> tuple[str, str | None]:
    """`directory`, `file` or `nothing`, as the workspace's user sees it; for a symlink where it leads."""
    kind, *link = (await _run(client, name, [BUSYBOX, "sh", "-c", _LOOK, "sh", _safe(path)])).decode().split()
    if not link:
        return kind, None
    real = os.fsdecode(await _run(client, name, [BUSYBOX, "readlink", "-f", _safe(path)])).removesuffix("\n")
    return kind, real if real != "/" else None


async def _run(client: AsyncClient, name: str, argv: list[str]) -> bytes:
    from roost.client.sockets import Channel, ExecRequest, execute

    kept = {Channel.stdout: bytearray(), Channel.stderr: bytearray()}
    async with execute(client, name, ExecRequest(tuple(argv))) as running:
        async for channel, data in running.output():
            if len(kept[channel]) < _STDERR_MAX:
                kept[channel] += data
    if running.exit_code != 0:
        raise CopyFailed(_words(bytes(kept[Channel.stderr])) or f"exit code {running.exit_code}")
    return bytes(kept[Channel.stdout])


async def _tar(client: AsyncClient, name: str, arguments: list[str], stdin: int | None, stdout: int) -> None:
    """Run busybox tar in the workspace; CopyFailed with its words when it fails."""
    from roost.cli.pump import join
    from roost.client.sockets import ExecRequest, execute

    request = ExecRequest((BUSYBOX, "tar", *arguments), stdin=stdin is not None)
    errors_read, errors_write = os.pipe()
    collected = bytearray()

    def collect() -> None:
        with os.fdopen(errors_read, "rb") as pipe:
            while piece := pipe.read1(1 << 16):
                if len(collected) < _STDERR_MAX:
                    collected.extend(piece)

    collecting = _thread(collect)
    try:
        async with execute(client, name, request) as running:
            code = await join(running, stdin, stdout, errors_write)
    finally:
        os.close(errors_write)
        await asyncio.wait({collecting})
    if code != 0:
        raise CopyFailed(f"tar in {name}: {_words(bytes(collected)) or f'exit code {code}'}")


def _words(stderr: bytes) -> str:
    lines = plain(stderr.decode(errors="replace")).strip().splitlines()
    return lines[-1].removeprefix("tar: ") if lines else ""


def _thread(work: Callable[[], T]) -> asyncio.Future[T]:
    """Run in a thread that does not hold up our end (asyncio's own would)."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def finish(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # one of the two is there

    def run() -> None:
        result: T | None = None
        problem: BaseException | None = None
        try:
            result = work()
        except BaseException as error:  # carried over to whoever awaits it
            problem = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(finish, result, problem)

    threading.Thread(target=run, daemon=True, name="roost-cp").start()
    return future
