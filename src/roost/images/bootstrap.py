"""`roost image bootstrap`: a real Debian image from the host's own package mirrors, in the node's private registry.

For a host that has no registry to pull from.  mmdebstrap makes the root file system, a tar stream of which becomes one
layer; nothing is pulled.  The steps and what a kill leaves of them:

1. The layer is built into the cache as `<key>.building-*` and renamed with its description (`<key>.json`) written last:
   a description that is there names a layer that is complete.  The key covers suite, architecture, packages and RECIPE.
2. Blobs, then the manifest, go to the registry, each only if it is not there.  A tag points to a complete image or to
   what it pointed to before.

mmdebstrap mounts /proc, /sys and /dev in its root and starts many programs.  It runs in a mount and a pid namespace of
its own (unshare(1)) that dies with us (`--pdeathsig`, `--kill-child`), so that neither an interrupt nor a kill leaves a
mount or a process behind; the directory it worked in is removed at once or by the next build.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from roost import faults
from roost.errors import HostDiskFull, ImageBuildFailed, InvalidRequest, MissingProgram, NeedsRoot
from roost.oci.layers import CHUNK_BYTES, IMAGE_CONFIG, IMAGE_MANIFEST, Layer, LayerWriter, digest_bytes
from roost.oci.references import Digest, Reference, is_plain_http, parse_remote
from roost.oci.registry import RegistryClient

Progress = Callable[[str, float | None], None]
"""What is being done, and the part of it that is done (0..1), where known."""

RECIPE = 1
"""Raise when the recipe below changes what an image holds."""

BASE_PACKAGES = ("ca-certificates", "curl", "git", "less", "openssh-client", "procps", "python3", "sudo")
USER, UID = "vscode", 1000
BUILD_TIMEOUT_S = 1800.0
_FREE_BYTES = 2 << 30
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+(:[a-z0-9]+)?([=/][A-Za-z0-9.+:~-]+)?")
_SUITE = re.compile(r"[a-z][a-z0-9.-]*")
_NAME = re.compile(r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*")
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

# Run by mmdebstrap in the finished root ($1).  HOME gets the contents of /etc/skel; nothing here depends on the time or
# the host.
_CUSTOMIZE = rf"""
set -eu
chroot "$1" groupadd --gid {UID} {USER}
chroot "$1" useradd --uid {UID} --gid {UID} --create-home --shell /bin/bash --comment "" {USER}
mkdir -p "$1/etc/sudoers.d"
printf '%s ALL=(ALL:ALL) NOPASSWD: ALL\n' {USER} >"$1/etc/sudoers.d/{USER}"
chmod 0440 "$1/etc/sudoers.d/{USER}"
: >"$1/etc/machine-id"
rm -f "$1/etc/hostname" "$1/etc/resolv.conf" "$1/var/log/apt/"* "$1/var/log/dpkg.log" "$1/var/log/alternatives.log" \
      "$1/var/log/bootstrap.log" "$1/var/cache/ldconfig/aux-cache" "$1/etc/passwd-" "$1/etc/group-" "$1/etc/shadow-" \
      "$1/etc/gshadow-" "$1/etc/subuid-" "$1/etc/subgid-"
: >"$1/etc/resolv.conf"
"""


@dataclass(frozen=True)
class BootstrapResult:
    """A bootstrapped image, in the registry."""

    ref: str
    """What `roost up --image` takes."""
    digest: Digest
    """Of the manifest."""
    size_bytes: int
    """Of the compressed layer."""
    seconds: float
    cached: bool
    """The layer was built earlier."""


def bootstrap(
    name: str,
    *,
    packages: Sequence[str] = (),
    registry: str,
    cache_dir: Path,
    suite: str | None = None,
    progress: Progress = lambda text, part: None,
) -> BootstrapResult:
    """Build a Debian image with `packages` beside the usual and push it to `registry` as `name:latest`.

    `registry` is `host:port`; `suite` a Debian or Ubuntu release that the host's mirrors have, None: the host's own.
    Blocks, for up to BUILD_TIMEOUT_S. Raises InvalidRequest, NeedsRoot, MissingProgram, HostDiskFull, ImageBuildFailed
    with the end of mmdebstrap's log, RegistryUnreachable.
    """
    started = time.monotonic()
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{name!r} is not an image name", next_step="Use a-z, 0-9, dots and dashes, such as `default`."
        )
    wanted = tuple(sorted({*BASE_PACKAGES, *packages}))
    for package in wanted:
        if not _PACKAGE.fullmatch(package):
            raise InvalidRequest(f"{package!r} is not the name of a Debian package")
    host_suite = _host_suite()
    chosen = suite or host_suite
    if not _SUITE.fullmatch(chosen):
        raise InvalidRequest(f"{chosen!r} is not the name of a Debian or Ubuntu release")
    architecture = _ARCHITECTURES.get(platform.machine(), platform.machine())
    reference = parse_remote(f"{registry}/{name}:latest")
    folder = cache_dir / "images"
    key = hashlib.sha256(json.dumps([RECIPE, chosen, architecture, wanted]).encode()).hexdigest()[:24]

    with RegistryClient(reference.api_host, plain_http=is_plain_http(reference.host)) as client:
        client.ping()  # before minutes of work
        with _locked(folder, key, progress):
            layer = _cached_layer(folder, key)
            cached = layer is not None
            if layer is None:
                layer = _build(folder, key, chosen, host_suite, wanted, progress)
            faults.point("bootstrap.built")
            digest = _push(client, reference, folder / f"{key}.tar.gz", layer, chosen, architecture, wanted, progress)
    return BootstrapResult(str(reference), digest, layer.size_bytes, round(time.monotonic() - started, 3), cached)


# --- the layer ----------------------------------------------------------------------------------------------------


def _host_suite() -> str:
    values = {}
    for line in Path("/etc/os-release").read_text().splitlines():
        name, _, value = line.partition("=")
        values[name] = value.strip('"')
    return values.get("VERSION_CODENAME") or "bookworm"


@contextmanager
def _locked(folder: Path, key: str, progress: Progress) -> Iterator[None]:
    """One build of a key at a time; the second waits and finds it done."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{key}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("another build of the same image runs; waiting for it", None)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _cached_layer(folder: Path, key: str) -> Layer | None:
    """The layer of an earlier build; a file that was cut short or touched since is not one."""
    try:
        document = json.loads((folder / f"{key}.json").read_text())
        layer = Layer(**document["layer"])
        if (folder / f"{key}.tar.gz").stat().st_size == layer.size_bytes:
            return layer
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _build(folder: Path, key: str, suite: str, host_suite: str, packages: tuple[str, ...], progress: Progress) -> Layer:
    if os.geteuid() != 0:
        raise NeedsRoot("building an image needs root")
    if shutil.which("mmdebstrap") is None:
        raise MissingProgram(
            "mmdebstrap is not installed", next_step="Run `make setup`, or `apt-get install mmdebstrap`."
        )
    free = shutil.disk_usage(folder).free
    if free < _FREE_BYTES:
        raise HostDiskFull(f"{folder} has {free >> 20} MiB free, a build needs {_FREE_BYTES >> 20}")
    _sweep(folder, key)
    with tempfile.TemporaryDirectory(prefix=f"{key}.building-", dir=folder, ignore_cleanup_errors=True) as scratch:
        work = Path(scratch)
        work.chmod(0o755)  # apt's own user reads what is in it
        blob = work / "layer.tar.gz"
        layer = _run_mmdebstrap(work, blob, suite, host_suite, packages, progress)
        with blob.open("rb") as file:
            os.fsync(file.fileno())
        faults.point("bootstrap.layer-written")
        (folder / f"{key}.json").unlink(missing_ok=True)
        blob.replace(folder / f"{key}.tar.gz")
        faults.point("bootstrap.layer-renamed")
        description = work / "layer.json"
        description.write_text(json.dumps({"layer": asdict(layer), "suite": suite, "packages": packages}, indent=1))
        description.replace(folder / f"{key}.json")
    return layer


def _sweep(folder: Path, key: str) -> None:
    """Remove what builds of this key left that were killed; their lock is ours now, so none is alive."""
    for left in folder.glob(f"{key}.building-*"):
        shutil.rmtree(left, ignore_errors=True)


def _run_mmdebstrap(
    work: Path, blob: Path, suite: str, host_suite: str, packages: tuple[str, ...], progress: Progress
) -> Layer:
    customize = work / "customize"
    customize.write_text(f"#!/bin/sh{_CUSTOMIZE}")
    customize.chmod(0o755)
    argv = [
        *("setpriv", "--pdeathsig", "KILL"),
        *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
        "mmdebstrap",
        "--mode=root",
        "--variant=minbase",
        "--format=tar",
        f"--include={','.join(packages)}",
        "--aptopt=Acquire::Languages none",
        "--aptopt=APT::Install-Recommends false",
        "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-include=/usr/share/doc/*/copyright",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
        f"--customize-hook={customize}",
        suite,
        "-",
        *_sources(work, suite, host_suite),
    ]
    environment = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LC_ALL": "C.UTF-8",
        "HOME": "/root",
        "TMPDIR": str(work),
        "DEBIAN_FRONTEND": "noninteractive",
        # mmdebstrap clamps the times in the tar to it: equal inputs give equal layers. 1980: zip knows none before.
        "SOURCE_DATE_EPOCH": "315532800",
    }
    for name in ("http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        if name in os.environ:
            environment[name] = os.environ[name]
    progress(f"Debian packages ({suite})", 0.0)
    process = subprocess.Popen(
        argv,
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
    overdue = threading.Timer(BUILD_TIMEOUT_S, _kill, [process])
    overdue.start()
    try:
        with blob.open("wb") as out, LayerWriter(out) as writer:
            while data := process.stdout.read1(CHUNK_BYTES):  # type: ignore[attr-defined]
                if writer.tar_bytes == 0:
                    progress("compressing the layer", None)
                writer.write(data)
        code = process.wait()
    except BaseException:
        _kill(process)
        raise
    finally:
        overdue.cancel()
        process.stdout.close()
        reader.join(5.0)
        process.stderr.close()
    if code != 0:
        if not overdue.is_alive() and code == -signal.SIGKILL:
            tail.append(f"(killed after {BUILD_TIMEOUT_S:g} s)")
        lines = _telling_lines(tail)
        raise ImageBuildFailed(
            f"mmdebstrap ended with {code}: {lines[-1] if lines else 'no output'}",
            next_step="Check the package names and the host's apt sources; the end of the log is in the details.",
            details={"log": lines[-20:]},
        )
    return writer.close()


def _sources(work: Path, suite: str, host_suite: str) -> list[str]:
    """What mmdebstrap takes the packages from: the host's own apt sources for the host's release, so that local mirrors
    work; for another release the host's first mirror, with that suite."""
    lines = list(_host_sources())
    own = [line for line in lines if _suite_of(line).split("-")[0].split("/")[0] == host_suite]
    distribution = [line for line in own if _is_distribution(line)]
    if suite == host_suite:
        chosen = distribution or own
    else:
        mirrors = [line for line in distribution if _suite_of(line) == host_suite]
        chosen = [line.replace(f" {host_suite} ", f" {suite} ", 1) for line in mirrors[:1]]
    if not chosen:
        return []  # mmdebstrap's own default: Debian's
    file = work / "sources.list"
    file.write_text("\n".join(chosen) + "\n")
    return [str(file)]


def _host_sources() -> Iterator[str]:
    """Every enabled binary source of the host, as one-line entries (sources.list(5)), deb822 files too."""
    root = Path("/etc/apt")
    for file in (root / "sources.list", *sorted((root / "sources.list.d").glob("*.list"))):
        if file.is_file():
            for line in file.read_text(errors="replace").splitlines():
                text = line.partition("#")[0].strip()
                if text.startswith(("deb ", "deb\t")):
                    yield re.sub(r"\s+", " ", text)
    for file in sorted((root / "sources.list.d").glob("*.sources")):
        for block in re.split(r"\n\s*\n", file.read_text(errors="replace")):
            fields: dict[str, str] = {}
            last = ""
            for line in block.splitlines():
                if line.startswith("#"):
                    continue
                if line[:1].isspace():
                    fields[last] = f"{fields.get(last, '')}\n{line.strip()}"
                elif ":" in line:
                    last, _, value = line.partition(":")
                    last = last.strip().lower()
                    fields[last] = value.strip()
            if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() in ("no", "false"):
                continue
            key = fields.get("signed-by", "")
            options = f"[signed-by={key}] " if key.startswith("/") else ""
            for uri in fields.get("uris", "").split():
                for suite in fields.get("suites", "").split():
                    yield f"deb {options}{uri} {suite} {' '.join(fields.get('components', '').split())}".strip()


def _suite_of(line: str) -> str:
    words = re.sub(r"\[[^]]*\]", "", line).split()
    return words[2] if len(words) > 2 else ""


def _is_distribution(line: str) -> bool:
    """Whether a source is the distribution itself: a third party's has no component `main` of a release of its name
    that we could tell apart, but does not end in /debian, /debian-security or /ubuntu."""
    words = re.sub(r"\[[^]]*\]", "", line).split()
    path = words[1].rstrip("/")
    return "main" in words[3:] and re.search(r"/(debian|debian-security|ubuntu|ubuntu-ports)$", path) is not None


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


# --- the image ----------------------------------------------------------------------------------------------------


def _push(
    client: RegistryClient,
    reference: Reference,
    blob: Path,
    layer: Layer,
    suite: str,
    architecture: str,
    packages: tuple[str, ...],
    progress: Progress,
) -> Digest:
    progress("pushing the image", 0.0)
    client.upload_file(
        reference.path, layer.digest, blob, lambda sent, total: progress("pushing the image", sent / max(1, total))
    )
    config = _dump(
        {
            "architecture": architecture,
            "os": "linux",
            "created": "1970-01-01T00:00:00Z",
            "config": {
                "User": USER,
                "Env": [
                    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                    "LANG=C.UTF-8",
                ],
                "Cmd": ["/bin/bash"],
                "WorkingDir": f"/home/{USER}",
                "Labels": {
                    "org.opencontainers.image.title": f"roost {suite}",
                    "roost.dev/bootstrap": str(RECIPE),
                    "roost.dev/bootstrap-suite": suite,
                    "roost.dev/bootstrap-packages": " ".join(packages),
                },
            },
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id]},
            "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "roost image bootstrap"}],
        }
    )
    client.upload_bytes(reference.path, config)
    manifest = _dump(
        {
            "schemaVersion": 2,
            "mediaType": IMAGE_MANIFEST,
            "config": {"mediaType": IMAGE_CONFIG, "digest": digest_bytes(config), "size": len(config)},
            "layers": [{"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size_bytes}],
        }
    )
    faults.point("bootstrap.blobs-pushed")
    return client.put_manifest(reference.path, reference.tag, manifest)


def _dump(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":"), sort_keys=True).encode()
