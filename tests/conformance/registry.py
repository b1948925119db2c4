"""Registries on loopback: a real docker-registry, and servers that are none."""

from __future__ import annotations

import asyncio
import base64
import ctypes
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conformance.images import BuiltImage

USER, PASSWORD = "somebody", "a secret"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def bcrypt(password: str) -> str:
    """What `htpasswd -B` makes, by the C library's own crypt(3)."""
    crypt = ctypes.CDLL("libcrypt.so.1").crypt
    crypt.restype = ctypes.c_char_p
    hashed: bytes = crypt(password.encode(), b"$2y$05$roosttestroosttestroos")
    return hashed.decode()


class TestRegistry:
    __test__ = False

    def __init__(self, root: Path, port: int) -> None:
        self.root = root
        self.host = f"127.0.0.1:{port}"
        self._auth: str | None = None

    def push(self, name: str, tag: str, image: BuiltImage) -> str:
        """Upload an image; its reference."""
        for digest, data in image.blobs.items():
            place = self._send("POST", f"/v2/{name}/blobs/uploads/", b"")
            self._send("PUT", f"{place}&digest={digest}", data, "application/octet-stream")
        self._send("PUT", f"/v2/{name}/manifests/{tag}", image.manifest, "application/vnd.oci.image.manifest.v1+json")
        return f"{self.host}/{name}:{tag}"

    def login(self, user: str, password: str) -> None:
        self._auth = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()

    def _send(self, method: str, path: str, data: bytes, kind: str = "") -> str:
        url = path if path.startswith("http") else f"http://{self.host}{path}"
        request = urllib.request.Request(url, data=data, method=method)
        if kind:
            request.add_header("Content-Type", kind)
        if self._auth:
            request.add_header("Authorization", self._auth)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return str(answer.headers.get("Location", ""))

    def blob_file(self, digest: str) -> Path:
        digest = digest.removeprefix("sha256:")
        return self.root / f"docker/registry/v2/blobs/sha256/{digest[:2]}/{digest}/data"


@contextmanager
def registry(folder: Path, *, auth: bool = False) -> Iterator[TestRegistry]:
    """A docker-registry for the time of the block; with `auth`, only USER with PASSWORD may use it."""
    program = shutil.which("docker-registry")
    assert program, "docker-registry is not installed"
    port = free_port()
    config: dict[str, object] = {
        "version": "0.1",
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}, "delete": {"enabled": True}},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    if auth:
        (folder / "htpasswd").write_text(f"{USER}:{bcrypt(PASSWORD)}\n")
        config["auth"] = {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}}
    (folder / "config.yml").write_text(json.dumps(config))
    env = {"PATH": os.environ["PATH"], "OTEL_TRACES_EXPORTER": "none"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, "serve", str(folder / "config.yml")], stdout=subprocess.DEVNULL, stderr=log, env=env
        )
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/", timeout=2).close()
                break
            except urllib.error.HTTPError as error:
                error.close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.02)
        yield TestRegistry(folder / "data", port)
    finally:
        process.kill()
        process.wait()


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def liar(handler: Handler) -> tuple[asyncio.Server, str]:
    """A server on loopback that answers each connection so; the caller closes it."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    return server, f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


def answering(status: str, *headers: str, body: str = "") -> Handler:
    """Every request gets this answer."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        lines = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}", "Connection: close", "", body]
        writer.write("\r\n".join(lines).encode())
        await writer.drain()

    return handler
