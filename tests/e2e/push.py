"""Push a folder as a one-layer image to a registry on loopback, with our own registry client."""

from __future__ import annotations

import json
import tarfile
import tempfile
from pathlib import Path

from roost.oci.layers import LayerWriter, digest_bytes
from roost.oci.references import parse_remote
from roost.oci.registry import RegistryClient

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"


def push_root(root: Path, ref: str, *, user: str = "", env: tuple[str, ...] = ("PATH=/bin",)) -> str:
    """Push; returns the manifest's digest."""
    reference = parse_remote(ref)
    with (
        tempfile.NamedTemporaryFile() as blob,
        RegistryClient(reference.api_host, plain_http=True) as client,
    ):
        with LayerWriter(blob) as writer, tarfile.open(fileobj=writer, mode="w|") as tar:  # type: ignore[call-overload]
            tar.add(root, ".")
        layer = writer.layer
        assert layer is not None
        blob.flush()
        client.upload_file(reference.path, layer.digest, Path(blob.name))
        config = {
            "architecture": "amd64",
            "os": "linux",
            "config": {"User": user, "Env": list(env), "Labels": {"made-by": "a test"}},
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id]},
        }
        raw = json.dumps(config).encode()
        client.upload_bytes(reference.path, raw)
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": CONFIG, "digest": digest_bytes(raw), "size": len(raw)},
            "layers": [{"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size_bytes}],
        }
        return str(client.put_manifest(reference.path, reference.tag, json.dumps(manifest).encode()))
