"""Running mmdebstrap so that whatever happens to us, nothing of it stays.

It mounts /proc, /sys and /dev in its root and starts many programs.  So it runs in a mount and a pid namespace of its
own (unshare(1)) that dies with us: `--pdeathsig` ends unshare when our *thread* ends (prctl(2)), `--kill-child` ends
the namespace's first process with unshare, and the kernel ends the rest of the namespace with that.  The mounts go with
the mount namespace; what is left is a directory, which is the caller's.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from roost.errors import ImageBuildFailed
from roost.oci.layers import CHUNK_BYTES

Progress = Callable[[str, float | None], None]
"""What is being done, and the part of it that is done (0..1), where known."""

TIMEOUT_S = 1800.0
_ALONE = (
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
)
_KEPT = ("http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR")


def run(arguments: Sequence[str], work: Path, take: Callable[[bytes], object], progress: Progress) -> None:
    """Run `mmdebstrap ARGUMENTS` with its temporary files in `work`, handing what it prints on stdout to `take`.

    Blocks, TIMEOUT_S at most. Raises ImageBuildFailed, the end of its log in the details; what `take` raises ends it.
    """
    environment = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LC_ALL": "C.UTF-8",
        "HOME": "/root",
        "TMPDIR": str(work),
        "DEBIAN_FRONTEND": "noninteractive",
        # mmdebstrap clamps the times in the tar to it: equal inputs give equal layers. 1980: zip knows none before.
        "SOURCE_DATE_EPOCH": "315532800",
        **{name: os.environ[name] for name in _KEPT if name in os.environ},
    }
    process = subprocess.Popen(
        [*_ALONE, "mmdebstrap", *arguments],
        env=environment,
        cwd=work,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stderr is not None
    tail: deque[str] = deque(maxlen=200)
    reader = threading.Thread(target=_read_log, args=(process.stderr, tail, progress), daemon=True)
    reader.start()
    late = threading.Event()

    def end_it() -> None:
        late.set()
        _kill(process)

    clock = threading.Timer(TIMEOUT_S, end_it)
    clock.start()
    try:
        while data := os.read(process.stdout.fileno(), CHUNK_BYTES):
            take(data)
        code = process.wait()
    except BaseException:
        _kill(process)
        raise
    finally:
        clock.cancel()
        process.stdout.close()
        reader.join(5.0)
        process.stderr.close()
    if code != 0:
        lines = _telling_lines(tail)
        why = f"stopped after {TIMEOUT_S:g} s" if late.is_set() else lines[-1] if lines else f"ended with {code}"
        raise ImageBuildFailed(
            f"mmdebstrap: {why}",
            next_step="Check the package names and the host's apt sources; the end of the log is in the details.",
            details={"log": lines[-20:]},
        )


_STEPS = (
    ("running apt-get update", "reading package lists", 0.05),
    ("downloading packages with apt", "downloading packages", 0.1),
    ("extracting archives", "extracting the base system", 0.35),
    ("installing essential packages", "installing the base system", 0.45),
    ("installing remaining packages", "installing packages", 0.6),
    ("running --customize-hook", "making the user", 0.9),
    ("creating tarball", "writing the layer", 0.95),
)


def _read_log(stream: IO[bytes], tail: deque[str], progress: Progress) -> None:
    for raw in stream:
        line = raw.decode(errors="replace").rstrip()
        tail.append(line)
        for text, said, part in _STEPS:
            if text in line:
                progress(said, part)


def _telling_lines(tail: deque[str]) -> list[str]:
    """The log without progress bars and mmdebstrap's parting words; the reason comes last."""
    lines = [
        line for line in tail if line.strip() and not re.match(r"^(I: |\(Reading database|done$|Get:\d|Hit:\d)", line)
    ]
    reasons = [line for line in lines if re.match(r"^(E|Err|W):", line) and "run mmdebstrap" not in line]
    causes = [line for line in reasons if line.startswith("E: ") and not re.search(r"failed to run|exited with", line)]
    return [*lines, causes[0]] if causes else lines


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End mmdebstrap and all it started: its pid namespace ends with `unshare`, the group's leader."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10.0)
