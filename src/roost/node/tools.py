"""The read-only tools tree of every container, and the pause image of every sandbox.

Both are addressed by their content: a tree or image that is there is right, an upgrade of busybox or tini makes another
beside it, and running containers keep theirs.  The tree appears by one rename; the image has a name that ends in the
hash of what it holds, made of bytes that depend on the programs alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import platform
import shutil
import struct
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import structlog

from roost import faults
from roost.errors import EngineFailed, EngineTimeout, MissingProgram

log = structlog.get_logger()

TINI = Path("/usr/bin/tini-static")
BUSYBOX = (Path("/bin/busybox"), Path("/usr/bin/busybox"), Path("/usr/lib/roost/busybox"))
"""The last is where set-up lays the static one on a host that has the dynamic package."""

# PID 1 is tini, this is its only child, run by busybox sh with whatever PATH, environment and uid the image chose; it
# uses nothing but the shell and busybox' own applets.
#
# tini passes TERM on to us alone, so we tell the rest: everybody we may signal.  Interactive shells ignore TERM and end
# at HUP; who handles TERM is left alone, as HUP would cut its orderly end short.  Those of other users (sudo) cannot be
# told and are not waited for: the kernel kills them when PID 1 ends.  Nobody there: no fork, no pause, so a stop costs
# milliseconds.
KEEPALIVE = """\
trap stop TERM INT

left() {
  for entry in /proc/[0-9]*; do
    pid=${entry#/proc/}
    [ "$pid" = 1 ] || [ "$pid" = $$ ] && continue
    kill -0 "$pid" 2>/dev/null && return 0
  done
  return 1
}

hang_up() {
  for entry in /proc/[0-9]*; do
    pid=${entry#/proc/}
    [ "$pid" = 1 ] || [ "$pid" = $$ ] && continue
    while read -r key value; do
      if [ "$key" = SigIgn: ]; then
        [ $((0x$value & 0x4000)) = 0 ] || kill -HUP "$pid" 2>/dev/null
        break
      fi
    done 2>/dev/null <"$entry/status"
  done
}

stop() {
  trap '' TERM INT
  exec 2>/dev/null
  kill "$sleeper"
  wait "$sleeper"
  if left; then
    kill -TERM -1
    hang_up
    tries=0
    while [ "$tries" -lt 180 ] && left; do
      if [ "$tries" -lt 20 ]; then sleep 0.01; else sleep 0.05; fi
      tries=$((tries + 1))
    done
  fi
  exit 0
}

while :; do
  sleep 2147483647 &
  sleeper=$!
  wait "$sleeper"
done
"""


def _interpreter(path: Path) -> bool:
    """Whether an ELF file names a dynamic loader (PT_INTERP, elf(5)). Raises ValueError if it is no ELF file."""
    with path.open("rb") as file:
        head = file.read(64)
        if head[:4] != b"\x7fELF" or head[4] != 2 or head[5] != 1:
            raise ValueError("not a 64-bit little-endian ELF file")
        (offset,) = struct.unpack_from("<Q", head, 32)
        size, count = struct.unpack_from("<HH", head, 54)
        file.seek(offset)
        table = file.read(size * count)
    return any(struct.unpack_from("<I", table, i * size)[0] == 3 for i in range(count))


def _static_program(candidates: tuple[Path, ...], package: str) -> Path:
    for path in candidates:
        try:
            if not _interpreter(path):
                return path
        except (OSError, ValueError):
            continue
    names = ", ".join(str(path) for path in candidates)
    raise MissingProgram(
        f"no statically linked program at {names} (Debian package {package})",
        next_step=f"Run `make setup`, or `apt-get install {package}`.",
        details={"package": package},
    )


def ensure_tools(folder: Path) -> Path:
    """Make `<folder>/<hash>` with bin/{tini,busybox,keepalive}, read-only; return its path. Blocks.

    Raises MissingProgram, naming the package, when tini or busybox is not there or not static.
    """
    tini = _static_program((TINI,), "tini")
    busybox = _static_program(BUSYBOX, "busybox-static")
    files = {"tini": tini.read_bytes(), "busybox": busybox.read_bytes(), "keepalive": KEEPALIVE.encode()}
    digest = hashlib.sha256()
    for name, data in sorted(files.items()):
        digest.update(f"{name} {len(data)}\n".encode() + data)
    tree = folder / digest.hexdigest()[:16]
    if tree.is_dir():
        return tree
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".new-*"):  # of a run that was killed here
        shutil.rmtree(stale, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
    (staging / "bin").mkdir()
    for name, data in files.items():
        path = staging / "bin" / name
        path.write_bytes(data)
        path.chmod(0o555)
    (staging / "bin").chmod(0o555)
    staging.chmod(0o555)
    os.sync()  # once in the life of a tree; a rename before its data would leave empty programs after a power cut
    faults.point("tools.staged")
    try:
        staging.rename(tree)
    except OSError:
        shutil.rmtree(staging, ignore_errors=True)
        if not tree.is_dir():
            raise
    log.info("tools.made", tree=str(tree))
    return tree


# --- the pause image ----------------------------------------------------------------------------------------------

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_ENTRYPOINT = ["/tini", "--", "/busybox", "sleep", "2147483647"]


@dataclass(frozen=True)
class PauseImage:
    """The image of sandbox processes: tini (ends at once at TERM, reaps) over a busybox that sleeps."""

    ref: str
    archive: bytes
    """An OCI archive (tar) that holds it under this name."""


def _tar(files: list[tuple[str, bytes, int]]) -> bytes:
    """A tar that depends on nothing but its arguments."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data, mode in files:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), mode
            tar.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def pause_image(tools: Path) -> PauseImage:
    """The pause image of a tools tree; the same bytes for the same programs."""
    programs = (("tini", "tini"), ("busybox", "busybox"))
    layer = _tar([(name, (tools / "bin" / program).read_bytes(), 0o755) for name, program in programs])
    blobs: list[tuple[str, bytes, int]] = []

    def blob(media_type: str, data: bytes) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        blobs.append((f"blobs/sha256/{digest}", data, 0o644))
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    layer_descriptor = blob("application/vnd.oci.image.layer.v1.tar", layer)
    architecture = _ARCHITECTURES.get(platform.machine(), platform.machine())
    config = {
        "architecture": architecture,
        "os": "linux",
        "created": "1970-01-01T00:00:00Z",
        "config": {"Entrypoint": _ENTRYPOINT, "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [layer_descriptor["digest"]]},
    }
    config_descriptor = blob("application/vnd.oci.image.config.v1+json", json.dumps(config).encode())
    manifest = {"schemaVersion": 2, "config": config_descriptor, "layers": [layer_descriptor]}
    top = blob("application/vnd.oci.image.manifest.v1+json", json.dumps(manifest).encode())
    ref = f"roost.local/pause:{str(top['digest']).removeprefix('sha256:')[:12]}"
    top["platform"] = {"architecture": architecture, "os": "linux"}
    # The name containerd takes for an imported image (images/archive in its sources).
    top["annotations"] = {"io.containerd.image.name": ref, "org.opencontainers.image.ref.name": ref.rpartition(":")[2]}
    index = {"schemaVersion": 2, "manifests": [top]}
    layout = json.dumps({"imageLayoutVersion": "1.0.0"}).encode()
    head = [("oci-layout", layout, 0o644), ("index.json", json.dumps(index).encode(), 0o644)]
    return PauseImage(ref, _tar(head + blobs))


async def ctr(socket: Path, *args: str, stdin: bytes = b"", timeout_s: float = 60.0) -> str:
    """Run containerd's client in CRI's namespace; its stdout. Raises EngineFailed, EngineTimeout, MissingProgram."""
    program = shutil.which("ctr")
    if program is None:
        raise MissingProgram("ctr is not installed (it comes with containerd)")
    process = await asyncio.create_subprocess_exec(
        program, "--address", str(socket), "--namespace", "k8s.io", *args,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = await asyncio.wait_for(process.communicate(stdin), timeout_s)
    except TimeoutError as error:
        raise EngineTimeout(f"ctr {' '.join(args[:2])} took longer than {timeout_s:g} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise EngineFailed(f"ctr {' '.join(args[:2])}: {err.decode(errors='replace').strip()}")
    return out.decode(errors="replace")


async def import_pause_image(socket: Path, image: PauseImage) -> None:
    """Put the image into containerd's store, unpacked and labelled as one that nothing collects (CRI's pinned).

    Doing it again changes nothing. Raises EngineFailed, EngineTimeout, MissingProgram.
    """
    await ctr(socket, "images", "import", "-", stdin=image.archive)
    faults.point("pause.imported")
    await ctr(
        socket, "images", "label", image.ref,
        "io.cri-containerd.image=managed", "io.cri-containerd.pinned=pinned",
    )  # fmt: skip
