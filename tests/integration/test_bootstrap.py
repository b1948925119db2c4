"""The registry client and `image bootstrap`, against a real docker-registry and the host's own Debian mirrors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from roost.errors import (
    ImageAuth,
    ImageBuildFailed,
    ImageInvalid,
    ImageNotFound,
    InvalidRequest,
    MissingProgram,
    RegistryUnreachable,
)
from roost.images import bootstrap as module
from roost.images.bootstrap import bootstrap
from roost.oci.layers import IMAGE_MANIFEST, digest_bytes, digest_file
from roost.oci.registry import RegistryClient

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """On a disk, not in memory; apt's own user must be able to come through."""
    path = Path(tempfile.mkdtemp(prefix="roost-test-bootstrap-", dir="/var/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def start_registry(folder: Path, extra: str = "") -> tuple[subprocess.Popen[bytes], str]:
    port = free_port()
    folder.mkdir(exist_ok=True)
    (folder / "config.yml").write_text(
        f"version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n"
        f"storage: {{filesystem: {{rootdirectory: {folder}/data}}, delete: {{enabled: true}}}}\n"
        f'http: {{addr: "127.0.0.1:{port}"}}\n{extra}'
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(["docker-registry", "serve", folder / "config.yml"], stdout=log, stderr=log)
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 0.2).close()
            return process, f"127.0.0.1:{port}"
        except OSError:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture(scope="module")
def registry(folder: Path) -> Iterator[str]:
    process, host = start_registry(folder / "registry")
    yield host
    process.terminate()
    process.wait(10)


@pytest.fixture
def client(registry: str) -> Iterator[RegistryClient]:
    with RegistryClient(registry, plain_http=True) as found:
        yield found


# --- the client ---------------------------------------------------------------------------------------------------


def test_blobs_and_manifests_come_back_as_they_went(client, tmp_path):
    data = os.urandom(3_500_000)
    (tmp_path / "blob").write_bytes(data)
    digest = digest_file(tmp_path / "blob")
    seen: list[tuple[int, int]] = []
    assert client.upload_file("a/b", digest, tmp_path / "blob", lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(data), len(data)) and len(seen) > 2
    assert client.blob_size("a/b", digest) == len(data)
    assert client.blob("a/b", digest, limit_bytes=10 << 20) == data
    assert not client.upload_file("a/b", digest, tmp_path / "blob"), "what is there is not sent again"

    config = client.upload_bytes("a/b", b"{}")
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": IMAGE_MANIFEST,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": 2},
            "layers": [],
        }
    ).encode()
    stored = client.put_manifest("a/b", "v1", manifest)
    assert stored == digest_bytes(manifest) == client.manifest_digest("a/b", "v1")
    assert client.manifest("a/b", "v1").content == manifest
    assert client.manifest("a/b", stored).media_type == IMAGE_MANIFEST
    assert client.tags("a/b") == ["v1"]


def test_a_blob_is_mounted_from_another_repository(client):
    digest = client.upload_bytes("one/x", b"shared between two")
    assert client.blob_size("two/x", digest) is None
    assert client.mount_blob("two/x", digest, "one/x")
    assert client.blob_size("two/x", digest) == len(b"shared between two")
    assert not client.mount_blob("two/x", digest_bytes(b"nowhere"), "one/x")


def test_what_is_not_there(client):
    with pytest.raises(ImageNotFound):
        client.manifest("no/such", "v1")
    assert client.manifest_digest("no/such", "v1") is None
    assert client.blob_size("no/such", digest_bytes(b"x")) is None
    assert client.tags("no/such") == []


def test_a_manifest_whose_blobs_are_missing_is_refused(client):
    manifest = {
        "schemaVersion": 2,
        "mediaType": IMAGE_MANIFEST,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest_bytes(b"gone"), "size": 4},
        "layers": [],
    }
    with pytest.raises(ImageInvalid, match="BLOB_UNKNOWN"):
        client.put_manifest("a/b", "bad", json.dumps(manifest).encode())


def test_a_registry_that_wants_a_password(folder, tmp_path):
    if shutil.which("htpasswd"):
        line = subprocess.run(["htpasswd", "-Bbn", "me", "secret"], capture_output=True, text=True, check=True).stdout
    else:
        # bcrypt of "secret", cost 4: the registry takes nothing else, and the standard library has no bcrypt.
        line = "me:$2y$04$OQIfbl4Yb.SMo7pWyYjlmuRhTFeJpxzUmLsd9gEmVjSyGnOPNVr4i\n"
    (tmp_path / "passwords").write_text(line)
    extra = f"auth: {{htpasswd: {{realm: test, path: {tmp_path}/passwords}}}}\n"
    process, host = start_registry(folder / "private", extra)
    try:
        with RegistryClient(host, plain_http=True) as nobody, pytest.raises(ImageAuth, match="credentials"):
            nobody.ping()
        with RegistryClient(host, plain_http=True, auth=("me", "wrong")) as wrong, pytest.raises(ImageAuth):
            wrong.ping()
    finally:
        process.terminate()
        process.wait(10)


class Scripted(BaseHTTPRequestHandler):
    """A registry that fails as it is told: one (status, headers, body) after the other, the last for ever."""

    replies: list[tuple[int, dict[str, str], bytes]]
    seen: list[tuple[str, str, str]]

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.rfile.read(length)
        self.seen.append((self.command, self.path, self.headers.get("Authorization", "")))
        status, headers, body = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if status == 0:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def scripted() -> Iterator[type[Scripted]]:
    class Own(Scripted):
        replies = []
        seen = []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    Own.host = f"127.0.0.1:{server.server_address[1]}"  # type: ignore[attr-defined]
    yield Own
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_busy_registry_is_asked_again(scripted):
    scripted.replies += [(503, {"Retry-After": "0"}, b""), (0, {}, b""), (200, {}, b"{}")]
    with RegistryClient(scripted.host, plain_http=True) as client:
        client.ping()
    assert len(scripted.seen) == 3


def test_one_that_stays_busy_is_unreachable(scripted):
    scripted.replies += [(503, {"Retry-After": "0"}, b"")]
    with RegistryClient(scripted.host, plain_http=True) as client, pytest.raises(RegistryUnreachable, match="503"):
        client.ping()
    assert len(scripted.seen) == 3


def test_a_token_is_fetched_and_sent(scripted):
    realm = f"http://{scripted.host}/token"
    scripted.replies += [
        (401, {"WWW-Authenticate": f'Bearer realm="{realm}",service="it",scope="x"'}, b""),
        (200, {"Content-Type": "application/json"}, b'{"token": "t0k"}'),
        (200, {}, b'{"schemaVersion": 2}'),
    ]
    with RegistryClient(scripted.host, plain_http=True, auth=("me", "secret")) as client:
        client.manifest("a/b", "v1")
    token = scripted.seen[1]
    assert token[1] == "/token?service=it&scope=repository%3Aa%2Fb%3Apull" and token[2].startswith("Basic ")
    assert scripted.seen[2][2] == "Bearer t0k"


def test_credentials_do_not_go_where_a_registry_says_in_the_clear(scripted):
    scripted.replies += [(401, {"WWW-Authenticate": 'Bearer realm="ftp://127.0.0.1/token"'}, b"")]
    with RegistryClient(scripted.host, plain_http=True, auth=("me", "secret")) as client:
        with pytest.raises(ImageAuth, match="not https"):
            client.ping()


def test_a_manifest_that_is_not_what_was_asked_for(scripted):
    scripted.replies += [(200, {}, b"something else")]
    with RegistryClient(scripted.host, plain_http=True) as client, pytest.raises(ImageInvalid, match="something else"):
        client.manifest("a/b", digest_bytes(b"this"))


def test_nobody_there():
    with RegistryClient(f"127.0.0.1:{free_port()}", plain_http=True) as client, pytest.raises(RegistryUnreachable):
        client.ping()


def test_tls_where_there_is_none(registry):
    with RegistryClient(registry, plain_http=False, attempts=1) as client:
        with pytest.raises(RegistryUnreachable) as caught:
            client.ping()
    assert "plain_http" in caught.value.hint


# --- bootstrap ----------------------------------------------------------------------------------------------------


def run_elsewhere(registry: str, cache: Path, **environment: str) -> subprocess.Popen[bytes]:
    program = (
        "import sys, pathlib; from roost.images.bootstrap import bootstrap\n"
        "bootstrap('default', registry=sys.argv[1], cache_dir=pathlib.Path(sys.argv[2]))"
    )
    sources = str(Path(module.__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", program, registry, cache],
        env={**os.environ, "PYTHONPATH": sources, **environment},
        stderr=subprocess.DEVNULL,
    )


def builders(cache: Path) -> list[int]:
    """Processes that work below the cache directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                where = os.readlink(entry / "root") + os.readlink(entry / "cwd")
            except OSError:
                continue
            if (str(cache) in where or f"TMPDIR={cache}".encode() in text) and b"mmdebstrap" in text + where.encode():
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_build_leaves_no_process_and_no_mount(registry, folder, number):
    cache = folder / "interrupted"
    child = run_elsewhere(registry, cache)
    deadline = time.monotonic() + 60
    while not list(cache.glob("images/*.building-*/mmdebstrap.*/var/lib/dpkg/*")):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    assert builders(cache)
    child.send_signal(number)
    child.wait(20)
    deadline = time.monotonic() + 10
    while builders(cache):
        assert time.monotonic() < deadline, builders(cache)
        time.sleep(0.02)
    assert str(cache) not in Path("/proc/self/mountinfo").read_text()
    if number == signal.SIGINT:
        assert not list(cache.glob("images/*.building-*"))
    else:
        key = next(cache.glob("images/*.building-*")).name.partition(".")[0]
        module._sweep(cache / "images", key)
        assert not list(cache.glob("images/*.building-*"))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_real_image_is_built_once_and_survives_kills(registry, folder, client, tmp_path):
    cache = folder / "cache"
    steps: list[str] = []
    first = bootstrap("default", registry=registry, cache_dir=cache, progress=lambda text, part: steps.append(text))
    assert not first.cached and first.ref == f"{registry}/default:latest"
    assert "installing packages" in steps and steps[-1] == "pushing the image"
    assert client.manifest_digest("default", "latest") == first.digest

    second = bootstrap("default", registry=registry, cache_dir=cache)
    assert second.cached and second.digest == first.digest and second.seconds < 15

    # Another registry and deaths on the way there: the tag is whole or absent.
    process, host = start_registry(folder / "another")
    try:
        with RegistryClient(host, plain_http=True) as other:
            for point in ("bootstrap.built", "bootstrap.blobs-pushed"):
                assert run_elsewhere(host, cache, ROOST_CRASH_AT=point).wait(60) == -signal.SIGKILL
                assert other.manifest_digest("default", "latest") is None
            assert run_elsewhere(host, cache).wait(60) == 0
            assert other.manifest_digest("default", "latest") == first.digest
    finally:
        process.terminate()
        process.wait(10)

    # As engines see it.
    manifest = json.loads(client.manifest("default", "latest").content)
    config = json.loads(client.blob("default", manifest["config"]["digest"]))
    assert config["config"]["User"] == "vscode"
    assert "LANG=C.UTF-8" in config["config"]["Env"]
    seen = subprocess.run(
        ["skopeo", "inspect", "--tls-verify=false", f"docker://{first.ref}"], capture_output=True, text=True, check=True
    )
    assert json.loads(seen.stdout)["Digest"] == first.digest

    # As somebody inside sees it.
    (blob,) = cache.glob("images/*.tar.gz")
    assert digest_file(blob) == manifest["layers"][0]["digest"]
    root = folder / "root"
    root.mkdir()
    with tarfile.open(blob) as tar:
        names = {member.name: member for member in tar}
    assert names["./home/vscode/.bashrc"].uid == 1000
    assert names["./etc/sudoers.d/vscode"].mode == 0o440
    subprocess.run(["tar", "-xpzf", blob, "-C", root], check=True)
    script = "git --version; curl --version; python3 -V; ssh -V; getent passwd vscode; sudo -n id -u; test -w ~vscode"
    inside = subprocess.run(
        ["chroot", "--userspec=vscode:vscode", root, "/bin/sh", "-ec", script],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/home/vscode"},
    )
    assert inside.returncode == 0, inside.stderr
    assert "vscode:x:1000:1000::/home/vscode:/bin/bash" in inside.stdout
    assert inside.stdout.rstrip().endswith("\n0")


def test_a_layer_that_was_cut_short_is_not_one(tmp_path):
    (tmp_path / "k.tar.gz").write_bytes(b"12345")
    described = {"digest": "sha256:x", "diff_id": "sha256:y", "size_bytes": 5, "media_type": "m"}
    (tmp_path / "k.json").write_text(json.dumps({"layer": described}))
    assert module._cached_layer(tmp_path, "k") is not None
    (tmp_path / "k.tar.gz").write_bytes(b"1234")
    assert module._cached_layer(tmp_path, "k") is None
    (tmp_path / "k.json").write_text('{"layer": {"digest"')
    assert module._cached_layer(tmp_path, "k") is None


def test_a_package_that_does_not_exist_is_named(registry, folder):
    with pytest.raises(ImageBuildFailed, match="no-such-package-of-roost") as caught:
        bootstrap("x", packages=["no-such-package-of-roost"], registry=registry, cache_dir=folder / "bad")
    assert caught.value.details["log"]
    assert not list((folder / "bad").glob("images/*.building-*")) and not list((folder / "bad").glob("images/*.tar.gz"))


def test_a_dead_registry_is_seen_before_the_work(tmp_path):
    began = time.monotonic()
    with pytest.raises(RegistryUnreachable):
        bootstrap("x", registry=f"127.0.0.1:{free_port()}", cache_dir=tmp_path)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("name", "packages", "suite"),
    [("Default", [], None), ("a b", [], None), ("x", ["--foo"], None), ("x", ["a,b"], None), ("x", [], "--help")],
)
def test_what_makes_no_sense_is_refused_at_once(tmp_path, name, packages, suite):
    with pytest.raises(InvalidRequest):
        bootstrap(name, packages=packages, suite=suite, registry="127.0.0.1:1", cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_mmdebstrap_the_program_is_named(registry, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(MissingProgram, match="mmdebstrap"):
        bootstrap("x", registry=registry, cache_dir=tmp_path)
