"""Real git servers on loopback for the tests of roost.repos: http(s) with git http-backend, sshd, an ssh-agent."""

from __future__ import annotations

import base64
import contextlib
import http.server
import os
import pwd
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from roost.settings import NetSettings, RepoSettings

NOBODY = (pwd.getpwnam("nobody").pw_uid, pwd.getpwnam("nobody").pw_gid)
LOCAL = NetSettings(allow=["127.0.0.0/8"])
ALL = RepoSettings(allow_protocols=["https", "ssh", "http", "file", "git"], command_timeout_s=60, progress_timeout_s=20)

_IDENTITY = {
    "GIT_AUTHOR_NAME": "t",
    "GIT_AUTHOR_EMAIL": "t@t",
    "GIT_COMMITTER_NAME": "t",
    "GIT_COMMITTER_EMAIL": "t@t",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_COUNT": "3",
    "GIT_CONFIG_KEY_0": "init.defaultBranch",
    "GIT_CONFIG_VALUE_0": "main",
    "GIT_CONFIG_KEY_1": "protocol.file.allow",
    "GIT_CONFIG_VALUE_1": "always",
    "GIT_CONFIG_KEY_2": "gc.auto",  # a gc in the background would outlive the test
    "GIT_CONFIG_VALUE_2": "0",
}


def git(cwd: Path, *args: str | os.PathLike[str], env: dict[str, str] | None = None) -> str:
    """Run git as a person would, without this machine's configuration."""
    done = subprocess.run(
        ["git", *args],
        cwd=cwd,
        env={**os.environ, **_IDENTITY, **(env or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"git {args}: {done.stderr}"
    return done.stdout.rstrip("\n")


def make_repo(path: Path, files: dict[str, str] | None = None) -> Path:
    """A repository with one commit on main."""
    path.mkdir(parents=True)
    git(path, "init", "-q")
    for name, content in (files or {"README.md": "hello\n", "src/a.py": "print(1)\n"}).items():
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content)
    git(path, "add", "-A")
    git(path, "commit", "-q", "-m", "first")
    return path


def wait_for(what, seconds: float = 10.0):
    """Poll until `what()` is true; its value."""
    end = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
    return value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class GitHttp:
    """git http-backend over the repositories below `root`; the fields make it misbehave."""

    root: Path
    tls: ssl.SSLContext | None = None
    auth: tuple[str, str] | None = None
    redirects: dict[str, str] = field(default_factory=dict)
    cut_pack_at: int | None = None
    spoil_pack: bool = False
    hang_after_refs: bool = False
    status: int | None = None
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    port: int = 0
    released: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    @contextlib.contextmanager
    def running(self) -> Iterator[GitHttp]:
        outer = self

        class Handler(_Handler):
            site = outer

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = False
        server.block_on_close = True
        self.port = server.server_address[1]
        if self.tls:
            server.socket = self.tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield self
        finally:
            self.released.set()
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    site: GitHttp
    protocol_version = "HTTP/1.0"
    timeout = 30

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_GET

    def handle(self) -> None:
        with contextlib.suppress(ssl.SSLError, ConnectionError, BrokenPipeError):
            super().handle()

    def finish(self) -> None:
        with contextlib.suppress(ssl.SSLError, ConnectionError, BrokenPipeError, ValueError):
            super().finish()

    def _serve(self) -> None:
        site = self.site
        path, _, query = self.path.partition("?")
        site.requests.append((self.path, self.headers.get("Authorization")))
        for prefix, target in site.redirects.items():
            if path.startswith(prefix):
                self.send_response(301)
                self.send_header("Location", target + self.path.removeprefix(prefix))
                self.end_headers()
                return
        if site.status:
            self.send_response(site.status)
            self.end_headers()
            return
        if site.auth:
            expected = "Basic " + base64.b64encode(":".join(site.auth).encode()).decode()
            if self.headers.get("Authorization") != expected:
                self.send_response(401)
                self.send_header("WWW-Authenticate", 'Basic realm="t"')
                self.end_headers()
                return
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
        else:
            body = self.rfile.read(length)
        if site.hang_after_refs and self.command == "POST":
            site.released.wait(60)
            return
        env = {
            **os.environ,
            "GIT_PROJECT_ROOT": str(site.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "REQUEST_METHOD": self.command,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "safe.directory",
            "GIT_CONFIG_VALUE_0": "*",
        }
        backend = ["git", "http-backend"]
        done = subprocess.run(backend, env=env, input=body, capture_output=True, timeout=30, check=False)
        head, _, content = done.stdout.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n") if line)
        if self.command == "POST" and b"PACK" in content:
            if site.cut_pack_at is not None:
                content = content[: content.index(b"PACK") + site.cut_pack_at]
            if site.spoil_pack:
                middle = len(content) * 2 // 3
                spoilt = bytes(byte ^ 0x55 for byte in content[middle : middle + 40])
                content = content[:middle] + spoilt + content[middle + 40 :]
        self.send_response(int(headers.pop("Status", "200").split()[0]))
        for key, value in headers.items():
            self.send_header(key, value)
        if site.cut_pack_at is None:  # TLS clients want a length, else a close_notify
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@dataclass
class Authority:
    """A CA of our own and a server certificate for 127.0.0.1 and `localhost`."""

    ca: Path
    context: ssl.SSLContext


def make_authority(where: Path) -> Authority:
    where.mkdir(exist_ok=True)

    def openssl(*args: str) -> None:
        subprocess.run(["openssl", *args], cwd=where, check=True, capture_output=True, timeout=30)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=roost test CA")
    openssl("req", *key[:-2], "-keyout", "srv.key", "-out", "srv.csr", "-subj", "/CN=localhost")
    (where / "ext").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost,DNS:git.example.test\n")
    openssl("x509", "-req", "-in", "srv.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
            "-extfile", "ext", "-out", "srv.pem")  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(where / "srv.pem", where / "srv.key")
    return Authority(where / "ca.pem", context)


@dataclass
class Sshd:
    port: int
    host_key: Path
    user_key: Path
    config: Path


@contextlib.contextmanager
def sshd_running(where: Path, *, port: int | None = None) -> Iterator[Sshd]:
    """A real sshd on a loopback port that lets root in with one key."""
    where.mkdir(exist_ok=True)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", where / name], check=True, timeout=30)
    (where / "authorized").write_text((where / "user.pub").read_text())
    port = port or free_port()
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    config = where / "sshd_config"
    config.write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {where}/host\nAuthorizedKeysFile {where}/authorized\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\nUsePAM no\n"
        f"StrictModes no\nPidFile {where}/pid\nLogLevel ERROR\nAllowAgentForwarding no\n"
        "SetEnv GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0=*\n"
    )
    process = subprocess.Popen(["/usr/sbin/sshd", "-D", "-E", where / "log", "-f", config])
    try:
        wait_for(lambda: listens(port))
        yield Sshd(port, where / "host", where / "user", config)
    finally:
        process.terminate()
        process.wait(10)


@contextlib.contextmanager
def agent_running(where: Path, *keys: Path) -> Iterator[Path]:
    """A real ssh-agent that holds these keys; the path of its socket."""
    where.mkdir(exist_ok=True)
    path = where / "agent.sock"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.DEVNULL)
    try:
        wait_for(path.exists)
        for key in keys:
            env = {**os.environ, "SSH_AUTH_SOCK": str(path)}
            subprocess.run(["ssh-add", "-q", key], check=True, env=env, timeout=10, capture_output=True)
        yield path
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def processes_below(path: Path) -> list[str]:
    """Command lines of processes that work below a directory or name it."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            cwd = os.readlink(entry / "cwd")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            if (cwd.startswith(str(path)) or str(path) in command) and state != "Z":
                found.append(f"{entry.name} {command}")
    return found


def remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
