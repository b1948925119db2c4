"""Tiny real images: a static busybox as root file system, made without any image tool."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import platform
import shutil
import subprocess
import tarfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

PASSWD = """\
root:x:0:0:root:/root:/bin/sh
dev:x:1000:1000:dev:/home/dev:/bin/sh
other:x:1001:1001:other:/home/other:/bin/sh
"""
GROUP = "root:x:0:\ndev:x:1000:\nextra:x:2000:dev\nother:x:1001:\n"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@cache
def _busybox() -> tuple[bytes, tuple[str, ...]]:
    program = shutil.which("busybox")
    assert program, "busybox-static is not installed"
    listed = subprocess.run([program, "--list"], check=True, capture_output=True, text=True).stdout.split()
    return Path(program).read_bytes(), tuple(listed)


@dataclass
class Layer:
    files: dict[str, tuple[bytes, int, int]] = field(default_factory=dict)
    """Path -> content, mode, owner."""
    links: dict[str, str] = field(default_factory=dict)
    folders: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Path -> mode, owner."""

    def tar(self) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for name, (mode, owner) in self.folders.items():
                entry = tarfile.TarInfo(name)
                entry.type, entry.mode, entry.uid, entry.gid = tarfile.DIRTYPE, mode, owner, owner
                tar.addfile(entry)
            for name, (data, mode, owner) in self.files.items():
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode, entry.uid, entry.gid = len(data), mode, owner, owner
                tar.addfile(entry, io.BytesIO(data))
            for name, target in self.links.items():
                entry = tarfile.TarInfo(name)
                entry.type, entry.linkname = tarfile.SYMTYPE, target
                tar.addfile(entry)
        return out.getvalue()


def base_layer() -> Layer:
    program, applets = _busybox()
    return Layer(
        folders={
            "bin": (0o755, 0), "etc": (0o755, 0), "root": (0o700, 0), "home": (0o755, 0), "home/dev": (0o755, 1000),
            "tmp": (0o1777, 0), "proc": (0o555, 0), "sys": (0o555, 0), "dev": (0o755, 0), "locked": (0o700, 0),
        },
        files={
            "bin/busybox": (program, 0o755, 0),
            "etc/passwd": (PASSWD.encode(), 0o644, 0),
            "etc/group": (GROUP.encode(), 0o644, 0),
            "etc/not-executable": (b"#!/bin/sh\n", 0o644, 0),
            "bin/bad-format": (b"\x00\x01\x02 no program\n" * 8, 0o755, 0),
            "bin/bad-interpreter": (b"#!/no/such/interpreter\n", 0o755, 0),
            "home/dev/.profile": (b"# from the image\n", 0o644, 1000),
        },
        links={f"bin/{name}": "busybox" for name in applets if name != "busybox"},
    )  # fmt: skip


@dataclass(frozen=True)
class BuiltImage:
    """An OCI image: blobs by digest, the manifest's digest, and its parts."""

    blobs: dict[str, bytes]
    manifest: bytes
    config_digest: str

    @property
    def digest(self) -> str:
        return sha256(self.manifest)

    def archive(self, ref: str) -> bytes:
        """An OCI archive (tar) that holds it under this name, as `ctr images import` reads it."""
        descriptor = {
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": self.digest,
            "size": len(self.manifest),
            "annotations": {"io.containerd.image.name": ref},
        }
        index = json.dumps({"schemaVersion": 2, "manifests": [descriptor]}).encode()
        files = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}', "index.json": index}
        for digest, data in {**self.blobs, self.digest: self.manifest}.items():
            files[f"blobs/sha256/{digest.removeprefix('sha256:')}"] = data
        return Layer(files={name: (data, 0o644, 0) for name, data in files.items()}).tar()


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def build(
    *layers: Layer, user: str = "dev", env: tuple[str, ...] = ("FROM_IMAGE=yes",), compress: bool = False
) -> BuiltImage:
    """An image of the base layer and these above it."""
    tars = [layer.tar() for layer in (base_layer(), *layers)]
    blobs = [gzip.compress(tar, 1, mtime=0) if compress else tar for tar in tars]
    config = json.dumps(
        {
            "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
            "os": "linux",
            "config": {
                "User": user,
                "Env": ["PATH=/usr/local/bin:/bin:/usr/bin", *env],
                "WorkingDir": "/",
                "Labels": {"made-by": "roost-test"},
                "Cmd": ["/bin/false"],
            },
            "rootfs": {"type": "layers", "diff_ids": [sha256(tar) for tar in tars]},
        }
    ).encode()
    kind = "application/vnd.oci.image.layer.v1.tar" + ("+gzip" if compress else "")
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": sha256(config),
                "size": len(config),
            },
            "layers": [{"mediaType": kind, "digest": sha256(blob), "size": len(blob)} for blob in blobs],
        }
    ).encode()
    return BuiltImage({sha256(config): config, **{sha256(blob): blob for blob in blobs}}, manifest, sha256(config))
