"""Layers: both digests are true, and equal content gives equal bytes."""

from __future__ import annotations

import gzip
import hashlib
import io

from hypothesis import given
from hypothesis import strategies as st

from roost.oci.layers import LayerWriter, digest_bytes, digest_file


@given(st.lists(st.binary(max_size=5000), max_size=8))
def test_the_digests_are_those_of_blob_and_tar(chunks):
    out = io.BytesIO()
    with LayerWriter(out) as writer:
        for chunk in chunks:
            writer.write(chunk)
    layer, blob, tar = writer.layer, out.getvalue(), b"".join(chunks)
    assert layer is not None
    assert gzip.decompress(blob) == tar
    assert layer.digest == f"sha256:{hashlib.sha256(blob).hexdigest()}"
    assert layer.diff_id == f"sha256:{hashlib.sha256(tar).hexdigest()}"
    assert layer.size_bytes == len(blob) and writer.tar_bytes == len(tar)


def test_equal_content_gives_equal_bytes_whenever_it_is_written():
    blobs = set()
    for _ in range(2):
        out = io.BytesIO()
        with LayerWriter(out) as writer:
            writer.write(b"x" * 100_000)
        blobs.add(out.getvalue())
    (blob,) = blobs
    assert blob[4:8] == bytes(4), "the gzip header carries no time"
    assert blob[3] == 0, "nor a name"


def test_an_interrupted_writer_has_no_layer():
    writer = LayerWriter(io.BytesIO())
    try:
        with writer:
            writer.write(b"half")
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert writer.layer is None


def test_digest_of_a_file(tmp_path):
    data = bytes(range(256)) * 10_000
    (tmp_path / "f").write_bytes(data)
    seen: list[int] = []
    assert digest_file(tmp_path / "f", seen.append) == digest_bytes(data)
    assert seen[-1] == len(data) and seen == sorted(seen)
