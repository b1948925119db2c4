"""`roost image bootstrap`: a real Debian image from the host's own package mirrors, in the node's private registry.

For a host that has no registry to pull from.  mmdebstrap makes the root file system, a tar stream of which becomes one
layer; nothing is pulled.  The steps and what a kill leaves of them:

1. The layer is built into the cache as `<key>.building-*` and renamed with its description (`<key>.json`) written last:
   a description that is there names a layer that is complete.  The key covers suite, architecture, packages and RECIPE.
2. Blobs, then the manifest, go to the registry, each only if it is not there.  A tag points to a complete image or to
   what it pointed to before.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from roost import faults
from roost.errors import HostDiskFull, InvalidRequest, MissingProgram, NeedsRoot
from roost.images import apt_sources, mmdebstrap
from roost.images.mmdebstrap import Progress
from roost.oci.layers import IMAGE_CONFIG, IMAGE_MANIFEST, Layer, LayerWriter, digest_bytes
from roost.oci.references import Digest, Reference, is_plain_http, parse_remote
from roost.oci.registry import RegistryClient

RECIPE = 1
"""Raise when the recipe below changes what an image holds."""

BASE_PACKAGES = ("ca-certificates", "curl", "git", "less", "openssh-client", "procps", "python3", "sudo")
USER, UID = "vscode", 1000
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
    Blocks, for minutes. Raises InvalidRequest, NeedsRoot, MissingProgram, HostDiskFull, ImageBuildFailed
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
    chosen = suite or apt_sources.host_suite()
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
                layer = _build(folder, key, chosen, wanted, progress)
            faults.point("bootstrap.built")
            digest = _push(client, reference, folder / f"{key}.tar.gz", layer, chosen, architecture, wanted, progress)
    return BootstrapResult(str(reference), digest, layer.size_bytes, round(time.monotonic() - started, 3), cached)


# --- the layer ----------------------------------------------------------------------------------------------------


@contextmanager
def _locked(folder: Path, key: str, progress: Progress) -> Iterator[None]:
    """One build of a key at a time; the second waits and finds it done."""
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


def _build(folder: Path, key: str, suite: str, packages: tuple[str, ...], progress: Progress) -> Layer:
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
        layer = _run_mmdebstrap(work, blob, suite, packages, progress)
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


def _run_mmdebstrap(work: Path, blob: Path, suite: str, packages: tuple[str, ...], progress: Progress) -> Layer:
    customize = work / "customize"
    customize.write_text(f"#!/bin/sh{_CUSTOMIZE}")
    customize.chmod(0o755)
    options = [
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
    ]
    lines = apt_sources.for_suite(suite)
    source_list = work / "sources.list"
    source_list.write_text("\n".join(lines) + "\n")
    # Without lines mmdebstrap takes Debian's own mirror.
    what = [suite, "-", *([str(source_list)] if lines else [])]
    progress(f"Debian packages ({suite})", 0.0)
    if set(packages) - set(BASE_PACKAGES):
        # A name that does not exist is found by apt's simulation in seconds, else after the base system is installed.
        mmdebstrap.run(["--simulate", *options, *what], work, lambda data: None, lambda text, part: None)
    with blob.open("wb") as out, LayerWriter(out) as writer:
        mmdebstrap.run([*options, *what], work, writer.write, progress)
    return writer.close()


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
