"""A tree of files as a tar stream, for a container whose only tool may be busybox.

GNU format, not pax: busybox's tar skips pax headers, so long names would arrive cut; it reads GNU's, and those carry
names of any bytes.  Sorted, owned by 0:0 in numbers, names relative to the tree; links are stored, not followed.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

from roost.errors import CopyFailed, MissingProgram

_CHUNK = 1 << 20


async def stream_tar(path: Path, *, stall_s: float = 120.0) -> AsyncIterator[bytes]:
    """The tree below `path` in chunks of at most 1 MiB; CopyFailed when a file cannot be read or tar stalls.

    Time in which the consumer does not ask for the next chunk does not count.
    """
    program = shutil.which("tar")
    if program is None:
        raise MissingProgram("tar is not installed", next_step="Install the package `tar`.")
    options = ("--format=gnu", "--owner=0", "--group=0", "--numeric-owner", "--sort=name", "--no-acls", "--no-xattrs")
    process = await asyncio.create_subprocess_exec(
        program,
        *options,
        "-C",
        os.fspath(path),
        "-cf",
        "-",
        ".",
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=2 * _CHUNK,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stderr is not None
    _widen(process)
    errors = asyncio.ensure_future(process.stderr.read(16 << 10))
    try:
        while True:
            async with asyncio.timeout(stall_s):
                chunk = await process.stdout.read(_CHUNK)
            if not chunk:
                break
            yield chunk
        async with asyncio.timeout(stall_s):
            text = (await errors).decode("utf-8", "replace").strip()
            if await process.wait() != 0:
                raise CopyFailed(f"the repository could not be read: {text[-400:]}")
    except TimeoutError as error:
        raise CopyFailed(f"tar gave nothing for {stall_s:g} s") from error
    finally:
        errors.cancel()
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def _widen(process: asyncio.subprocess.Process) -> None:
    """A larger pipe: fewer switches between tar and us (64 KiB by default)."""
    # asyncio hides the pipe behind transports; the transport of fd 1 has it, closed when tar was quick to end.
    transport = process._transport.get_pipe_transport(1)  # type: ignore[attr-defined]
    with contextlib.suppress(OSError, AttributeError, ValueError):
        fcntl.fcntl(transport.get_extra_info("pipe"), fcntl.F_SETPIPE_SZ, _CHUNK)
