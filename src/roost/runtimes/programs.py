"""Run a program of ours as a subprocess that cannot outlive its call."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from contextlib import suppress

from roost.errors import EngineTimeout, MissingProgram
from roost.runtimes.protocol import ToolResult

_KILL_S = 5.0


async def run_tool(python: Sequence[str], module: str, args: Sequence[str], timeout_s: float) -> ToolResult:
    """Run a module of ours in a process group of its own; on timeout or cancellation the group is killed.

    Python's `-P` keeps the working directory out of the module path: ours may be a repository somebody sent, and we
    are root.

    Raises EngineTimeout, MissingProgram.
    """
    argv = [*python, "-P", "-m", module, *args]
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise MissingProgram(f"{argv[0]} cannot be run: {error}") from error
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await process.communicate()
    except TimeoutError as error:
        raise EngineTimeout(f"{module} took longer than {timeout_s:g} s") from error
    finally:
        # Whatever it left in its group goes, too: the mounts under it are about to.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if process.returncode is None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_KILL_S):
                    await process.wait()
    assert process.returncode is not None
    code = process.returncode
    return ToolResult(code if code >= 0 else 128 - code, out, err)
