"""Pulls from real and broken registries on loopback: what comes, and which error says what is wrong."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from roost.errors import (
    EngineTimeout,
    ImageAuth,
    ImageInvalid,
    ImageNotFound,
    InvalidReference,
    RegistryUnreachable,
    RoostError,
)
from roost.runtimes.cri import CriRuntime, docker_auth
from roost.runtimes.protocol import ImageRef, RegistryAuth
from tests.conformance.conftest import cri_engine
from tests.conformance.engine import TestEngine
from tests.conformance.images import BuiltImage, Layer, build
from tests.conformance.registry import PASSWORD, USER, Handler, answering, free_port, liar, registry

__all__ = ["cri_engine"]


@pytest.fixture
async def runtime(cri_engine: TestEngine) -> AsyncIterator[CriRuntime]:
    made = cri_engine.runtime(pull_progress_timeout_s=3.0, pull_timeout_s=60.0)
    try:
        yield made
    finally:
        await made.close()


def fresh(tag: str) -> BuiltImage:
    """An image that no test has pulled before; its second layer is the largest of all blobs."""
    layer = Layer(files={"etc/made": (os.urandom(3 << 20), 0o644, 0)})
    return build(layer, env=(f"TAG={tag}",), compress=True)


async def refused(
    runtime: CriRuntime, ref: str, error: type[RoostError], auth: RegistryAuth | None = None
) -> RoostError:
    with pytest.raises(error) as caught:
        await runtime.pull(ImageRef(ref), auth)
    assert caught.value.message and caught.value.hint
    return caught.value


async def test_pull(runtime: CriRuntime, tmp_path: Path) -> None:
    with registry(tmp_path) as source:
        image = fresh("one")
        ref = ImageRef(source.push("some/image", "1", image))
        assert await runtime.image(ref) is None
        info = await runtime.pull(ref)
        assert info.ref == ref and info.digest == image.config_digest
        assert info.user == "dev" and "TAG=one" in info.env
        assert await runtime.image(ref) == info
        assert ref in {found.ref for found in await runtime.images()}
        assert await runtime.pull(ref) == info
        newer = fresh("two")
        source.push("some/image", "1", newer)
        assert (await runtime.pull(ref)).digest == newer.config_digest
        pinned = ImageRef(f"{source.host}/some/image@{image.digest}")
        assert (await runtime.pull(pinned)).digest == image.config_digest


async def test_unknown(runtime: CriRuntime, tmp_path: Path) -> None:
    with registry(tmp_path) as source:
        source.push("some/image", "1", fresh("one"))
        await refused(runtime, f"{source.host}/no/such:1", ImageNotFound)
        error = await refused(runtime, f"{source.host}/some/image:2", ImageNotFound)
        assert "some/image:2" in error.message
        await refused(runtime, f"{source.host}/some/image@sha256:{'0' * 64}", ImageNotFound)
        await refused(runtime, f"{source.host}/Not/Valid:1", InvalidReference)


async def test_nobody_there(runtime: CriRuntime) -> None:
    error = await refused(runtime, f"127.0.0.1:{free_port()}/some/image:1", RegistryUnreachable)
    assert "127.0.0.1" in error.message
    await refused(runtime, "registry.invalid/some/image:1", RegistryUnreachable)


async def test_credentials(runtime: CriRuntime, tmp_path: Path) -> None:
    with registry(tmp_path, auth=True) as source:
        source.login(USER, PASSWORD)
        ref = source.push("some/private", "1", fresh("private"))
        await refused(runtime, ref, ImageAuth)
        await refused(runtime, ref, ImageAuth, RegistryAuth(USER, "wrong"))
        config = tmp_path / "config.json"
        auth = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        config.write_text(json.dumps({"auths": {source.host: {"auth": auth}}}))
        found = docker_auth(ImageRef(ref), config)
        assert found == RegistryAuth(USER, PASSWORD) and PASSWORD not in repr(found)
        assert (await runtime.pull(ImageRef(ref), found)).ref == ref


@pytest.mark.parametrize(
    ("handler", "error"),
    [
        (answering("401 Unauthorized"), ImageAuth),
        (answering("403 Forbidden"), ImageAuth),
        (answering("404 Not Found"), ImageNotFound),
        (answering("500 Internal Server Error"), RegistryUnreachable),
        (answering("503 Service Unavailable"), RegistryUnreachable),
        (answering("200 OK", "Content-Type: text/html", body="<h1>It works</h1>"), (ImageNotFound, ImageInvalid)),
    ],
)
async def test_liars(runtime: CriRuntime, handler: Handler, error: type[RoostError]) -> None:
    server, host = await liar(handler)
    async with server:
        await refused(runtime, f"{host}/some/image:1", error)


async def test_a_registry_that_says_nothing(runtime: CriRuntime) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    server, host = await liar(silent)
    async with server:
        begun = time.monotonic()
        error = await refused(runtime, f"{host}/some/image:1", RegistryUnreachable)
        assert 2.5 < time.monotonic() - begun < 10
        assert "3 s" in error.message


async def test_a_registry_that_stops_in_the_middle(runtime: CriRuntime, tmp_path: Path) -> None:
    """Half of a layer, then nothing: given up; and the same image can be pulled when the registry is well again."""
    with registry(tmp_path) as source:
        image = fresh("half")
        source.push("some/image", "1", image)
        stopped = True

        async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            request = await reader.readuntil(b"\r\n\r\n")
            host, port = source.host.split(":")
            up_reader, up_writer = await asyncio.open_connection(host, int(port))
            up_writer.write(request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            try:
                left = 300_000 if stopped and b"/blobs/" in request else 1 << 40
                while left > 0 and (data := await up_reader.read(min(left, 65536))):
                    left -= len(data)
                    writer.write(data)
                    await writer.drain()
                if left <= 0:
                    await reader.read()
            finally:
                up_writer.close()

        server, host = await liar(proxy)
        async with server:
            await refused(runtime, f"{host}/some/image:1", RegistryUnreachable)
            stopped = False
            assert (await runtime.pull(ImageRef(f"{host}/some/image:1"))).digest == image.config_digest


async def test_a_slow_registry_is_not_a_dead_one(cri_engine: TestEngine, tmp_path: Path) -> None:
    """Bytes keep coming, the whole takes longer than the progress timeout; the bound of the whole holds."""
    image = fresh("slow")
    layer = max(image.blobs, key=lambda digest: len(image.blobs[digest]))

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = (await reader.readuntil(b"\r\n\r\n")).split(b" ")
        path = request[1].decode()
        digest = path.rpartition("/")[2]
        data = image.blobs.get(digest, image.manifest)
        kind = "application/vnd.oci.image.manifest.v1+json" if "/manifests/" in path else "application/octet-stream"
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\nConnection: close\r\n"
        if "/manifests/" in path:
            head += f"Docker-Content-Digest: {image.digest}\r\n"
        writer.write(head.encode() + b"\r\n")
        if request[0] != b"HEAD":
            step = len(data) // 12 if digest == layer else len(data)
            for at in range(0, len(data), max(1, step)):
                writer.write(data[at : at + step])
                await writer.drain()
                await asyncio.sleep(0.3 if digest == layer else 0)

    server, host = await liar(slow)
    async with server:
        hurried = cri_engine.runtime(pull_progress_timeout_s=30.0, pull_timeout_s=1.0)
        try:
            await refused(hurried, f"{host}/some/image:1", EngineTimeout)
        finally:
            await hurried.close()
        patient = cri_engine.runtime(pull_progress_timeout_s=2.0, pull_timeout_s=60.0)
        try:
            assert (await patient.pull(ImageRef(f"{host}/some/image:1"))).digest == image.config_digest
        finally:
            await patient.close()


async def test_damaged_images(runtime: CriRuntime, tmp_path: Path) -> None:
    with registry(tmp_path) as source:
        image = fresh("damaged")
        ref = source.push("some/damaged", "1", image)
        layer = max(image.blobs, key=lambda digest: len(image.blobs[digest]))
        file = source.blob_file(layer)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 0xFF
        file.write_bytes(data)
        await refused(runtime, ref, ImageInvalid)
        assert await runtime.image(ImageRef(ref)) is None


async def test_cancelled(runtime: CriRuntime, tmp_path: Path) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    server, host = await liar(silent)
    async with server:
        pulling = asyncio.create_task(runtime.pull(ImageRef(f"{host}/some/image:1")))
        await asyncio.sleep(0.3)
        pulling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(pulling, 5)
