"""The CRI runtime's pure parts: the wire's table, specifications, logs, credentials, the meaning of messages."""

from __future__ import annotations

import base64
import filecmp
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from roost.errors import (
    EngineFailed,
    ExecFailed,
    ExecNotExecutable,
    ExecNotFound,
    HostDiskFull,
    ImageAuth,
    ImageInvalid,
    ImageNotFound,
    InvalidReference,
    PoolFull,
    RegistryUnreachable,
    RoostError,
)
from roost.runtimes.cri import CriConfig, docker_auth, methods
from roost.runtimes.cri.auth import registry_host
from roost.runtimes.cri.execs import exec_error, process_spec
from roost.runtimes.cri.images import pull_error
from roost.runtimes.cri.logs import LogParser
from roost.runtimes.cri.podspec import container_config, own_labels, sandbox_config
from roost.runtimes.cri.proto import (
    containers_pb2,
    content_pb2,
    cri_pb2,
    events_pb2,
    leases_pb2,
    snapshots_pb2,
    tasks_pb2,
)
from roost.runtimes.protocol import (
    LABEL_START,
    Channel,
    ContainerId,
    ContainerSpec,
    ContainerUser,
    ExecSpec,
    ImageDigest,
    ImageInfo,
    ImageRef,
    Limits,
    RegistryAuth,
    TerminalSize,
    VolumeMount,
    VolumeName,
)
from tests.conformance.volumes import DirectoryVolumes

ROOT = Path(__file__).parents[2]
PROTO = ROOT / "src/roost/runtimes/cri/proto"
DEV = ContainerUser(1000, 1000, "dev", "/home/dev", groups=(2000, 2001))
IMAGE = ImageInfo(ImageRef("example.org/tiny:1"), ImageDigest("sha256:" + "a" * 64), 1)


# --- the wire


def test_the_table_of_methods_is_the_protos() -> None:
    files = (containers_pb2, content_pb2, cri_pb2, events_pb2, leases_pb2, snapshots_pb2, tasks_pb2)
    described = {
        f"/{service.full_name}/{method.name}": (method.input_type.full_name, method.output_type.full_name)
        for file in files
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    ours = [value for value in vars(methods).values() if isinstance(value, methods.Method)]
    assert len(ours) > 25
    for method in ours:
        found = (method.request.DESCRIPTOR.full_name, method.response.DESCRIPTOR.full_name)
        assert described[method.path] == found, method.path


def test_the_generated_files_are_those_of_the_protos(tmp_path: Path) -> None:
    if importlib.util.find_spec("grpc_tools") is None:
        pytest.skip("grpcio-tools is not installed")
    env = {**os.environ, "PYTHON": sys.executable}
    subprocess.run([ROOT / "scripts/protos.sh", str(tmp_path)], check=True, env=env, timeout=60)
    made = sorted((tmp_path / "roost/runtimes/cri/proto").iterdir())
    assert [path.name for path in made] == sorted(path.name for path in PROTO.glob("*_pb2.py*"))
    different = [path.name for path in made if not filecmp.cmp(path, PROTO / path.name, shallow=False)]
    assert different == [], "run scripts/protos.sh"


# --- specifications


def config(tmp_path: Path, **more: object) -> CriConfig:
    values: dict[str, object] = {
        "socket": tmp_path / "s", "run_dir": tmp_path / "run", "log_dir": tmp_path / "log",
        "tools_dir": Path("/tools"), "volumes": DirectoryVolumes(tmp_path / "volumes"), **more,
    }  # fmt: skip
    return CriConfig(**values)  # type: ignore[arg-type]


def spec(**changes: object) -> ContainerSpec:
    values: dict[str, object] = {
        "container": ContainerId("roost-a"), "image": IMAGE, "user": DEV, "hostname": "a",
        "env": {"HOME": "/home/dev"}, "working_dir": "/home/dev",
        "mounts": (VolumeMount(VolumeName("roost-a-home"), "/home/dev"),),
        "limits": Limits(1.5, 1 << 30, 100), "labels": {LABEL_START: "7", "mine": "x"}, **changes,
    }  # fmt: skip
    return ContainerSpec(**values)  # type: ignore[arg-type]


def test_a_sandbox(tmp_path: Path) -> None:
    pod = sandbox_config(config(tmp_path, dns_servers=("192.0.2.1",), cgroup_parent="/roost-x"), spec())
    assert (pod.metadata.name, pod.metadata.attempt) == ("roost-a", 7)
    assert pod.linux.cgroup_parent == "/roost-x/roost-a"
    assert pod.log_directory == str(tmp_path / "log/roost-a")
    assert list(pod.dns_config.servers) == ["192.0.2.1"]
    assert own_labels(pod.labels) == {LABEL_START: "7", "mine": "x"}
    assert sandbox_config(config(tmp_path), spec(labels={LABEL_START: "odd"})).metadata.attempt == 0


def test_a_container(tmp_path: Path) -> None:
    home = VolumeName("roost-a-home")
    made = container_config(config(tmp_path), spec(), {home: Path("/pool/a")})
    assert made.image.image == IMAGE.digest and made.log_path == "7.log"
    assert made.command[0].endswith("/tini") and not made.args
    assert [(m.host_path, m.container_path, m.readonly) for m in made.mounts] == [
        ("/tools", "/opt/roost", True),
        (str(tmp_path / "run/hosts/roost-a"), "/etc/hosts", False),
        ("/pool/a", "/home/dev", False),
    ]
    limits, security = made.linux.resources, made.linux.security_context
    assert (limits.cpu_quota, limits.cpu_period, limits.memory_limit_in_bytes) == (150_000, 100_000, 1 << 30)
    assert security.run_as_user.value == 1000 and security.run_as_group.value == 1000
    assert list(security.supplemental_groups) == [2000, 2001]
    assert not security.no_new_privs and not security.capabilities.drop_capabilities
    assert "/proc/kcore" in security.masked_paths and "/proc/sys" in security.readonly_paths
    assert security.HasField("seccomp") and not security.privileged


def test_no_sudo_no_limits_root(tmp_path: Path) -> None:
    root = ContainerUser(0, 0, "root", "/root")
    strict = spec(allow_sudo=False, limits=Limits(), user=root, mounts=())
    made = container_config(config(tmp_path), strict, {})
    security = made.linux.security_context
    assert security.no_new_privs and list(security.capabilities.drop_capabilities) == ["ALL"]
    assert security.HasField("run_as_user"), "root must be said: an unset user is the image's"
    assert made.linux.resources.cpu_quota == 0 and made.linux.resources.memory_limit_in_bytes == 0


def test_a_process() -> None:
    of_container = {
        "args": ["tini"], "cwd": "/", "env": ["PATH=/bin", "A=1", "B=x=y"], "user": {"uid": 5, "umask": 1},
        "capabilities": {"bounding": ["CAP_CHOWN"]}, "noNewPrivileges": True, "rlimits": [{"type": "RLIMIT_NOFILE"}],
    }  # fmt: skip
    made = process_spec(of_container, ExecSpec(("id",), DEV, "/home/dev", {"A": "2", "C": "3"}))
    assert made["args"] == ["id"] and made["cwd"] == "/home/dev" and made["terminal"] is False
    assert made["env"] == ["PATH=/bin", "A=2", "B=x=y", "C=3"]
    assert made["user"] == {"uid": 1000, "gid": 1000, "additionalGids": [2000, 2001]}
    assert made["noNewPrivileges"] is True and made["capabilities"] and made["rlimits"]
    tty = process_spec({}, ExecSpec(("sh",), DEV, "/", {}, TerminalSize(80, 24)))
    assert tty["consoleSize"] == {"height": 24, "width": 80} and tty["terminal"] is True
    assert any(item.startswith("PATH=") for item in tty["env"]) and any(i.startswith("TERM=") for i in tty["env"])
    assert of_container["args"] == ["tini"], "the container's own stays"


# --- messages


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('failed to resolve reference "h/x:1": h/x:1: not found', ImageNotFound),
        ("pull access denied, repository does not exist or may require authorization: authorization failed: "
         "no basic auth credentials", ImageAuth),
        ("pull access denied, repository does not exist or may require authorization: server message: "
         "insufficient_scope: authorization failed", ImageNotFound),
        ("unexpected status from HEAD request to http://h/v2/x/manifests/1: 403 Forbidden", ImageAuth),
        ('failed to do request: Head "https://h/v2/": dial tcp 127.0.0.1:5: connect: connection refused',
         RegistryUnreachable),
        ("dial tcp: lookup h on 192.0.2.1:53: no such host", RegistryUnreachable),
        ("http: server gave HTTP response to HTTPS client", RegistryUnreachable),
        ("x509: certificate signed by unknown authority", RegistryUnreachable),
        ("dial tcp 192.0.2.1:443: i/o timeout", RegistryUnreachable),
        ("unexpected status code 500", RegistryUnreachable),
        ('failed to extract layer sha256:0: write /x: no space left on device', PoolFull),
        ('failed to copy: write /x: no space left on device', HostDiskFull),
        ('failed to extract layer sha256:0: archive/tar: invalid tar header', ImageInvalid),
        ("no match for platform in manifest sha256:0: not found", ImageInvalid),
        ("failed to parse image reference: invalid reference format", InvalidReference),
        ("something nobody thought of", EngineFailed),
    ],
)  # fmt: skip
def test_pull_messages(text: str, error: type[RoostError]) -> None:
    found = pull_error("h.example:5000/x:1", text)
    assert type(found) is error
    assert found.hint


def test_denied_with_credentials_is_about_them() -> None:
    text = "pull access denied: insufficient_scope: authorization failed"
    assert type(pull_error("h/x:1", text, authenticated=True)) is ImageAuth


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('OCI runtime exec failed: exec failed: unable to start container process: exec: "x": executable file not '
         "found in $PATH: unknown", ExecNotFound),
        ('OCI runtime exec failed: exec failed: unable to start container process: exec: "/x": stat /x: '
         "no such file or directory: unknown", ExecNotFound),
        ('exec failed: unable to start container process: exec: "/etc": permission denied: unknown', ExecNotExecutable),
        ("exec failed: unable to start container process: exec /x: exec format error: unknown", ExecNotExecutable),
        ('unable to start container process: chdir to cwd ("/cwd") set in config.json failed: no such file or '
         "directory: unknown", ExecFailed),
        ("something nobody thought of", ExecFailed),
    ],
)  # fmt: skip
def test_exec_messages(text: str, error: type[RoostError]) -> None:
    found = exec_error(ExecSpec(("x",), DEV, "/cwd"), text)
    assert type(found) is error
    assert "OCI runtime" not in found.message


# --- logs


def test_log_lines() -> None:
    parser = LogParser()
    text = (
        b"2026-01-02T03:04:05.123456789Z stdout F one\n"
        b"2026-01-02T03:04:06.5+01:00 stderr F zwei \xc3\xa4 \xff\n"
        b"not a log line\n"
        b"2026-01-02T03:04:07Z stdout P par\n"
        b"2026-01-02T03:04:07Z stderr F between\n"
        b"2026-01-02T03:04:08Z stdout P t\n"
        b"2026-01-02T03:04:09Z stdout F ial\r\n"
        b"2026-01-02T03:04:10Z stdout F \n"
    )
    lines = [line for at in range(0, len(text), 7) for line in parser.feed(text[at : at + 7])]
    assert [(line.channel, line.text) for line in lines] == [
        (Channel.stdout, "one"),
        (Channel.stderr, "zwei ä �"),
        (Channel.stderr, "between"),
        (Channel.stdout, "partial"),
        (Channel.stdout, ""),
    ]
    assert lines[0].at == pytest.approx(1767323045.123456, abs=1e-5)
    assert lines[1].at == pytest.approx(lines[0].at - 3600 + 1.376544, abs=1e-4)
    assert parser.end() == []
    parser.feed(b"2026-01-02T03:04:07Z stdout P unfinished\n")
    assert [line.text for line in parser.end()] == ["unfinished"]


def test_a_line_without_end_does_not_fill_memory() -> None:
    parser = LogParser()
    part = b"2026-01-02T03:04:07Z stdout P " + b"x" * 16384 + b"\n"
    lines = [line for _ in range(200) for line in parser.feed(part)]
    assert 2 <= len(lines) <= 4


# --- credentials


@pytest.mark.parametrize(
    ("ref", "host"),
    [
        ("debian", "docker.io"), ("library/debian:12", "docker.io"), ("docker.io/library/debian:12", "docker.io"),
        ("localhost/x:1", "localhost"), ("127.0.0.1:5000/a/b@sha256:0", "127.0.0.1:5000"), ("h.example/x", "h.example"),
    ],
)  # fmt: skip
def test_registry_of_a_reference(ref: str, host: str) -> None:
    assert registry_host(ref) == host


def test_docker_auth(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    ref = ImageRef("h.example:5000/x:1")
    assert docker_auth(ref, file) is None

    def auths(entries: object) -> RegistryAuth | None:
        file.write_text(json.dumps({"auths": entries}))
        return docker_auth(ref, file)

    encoded = base64.b64encode(b"me:p:w").decode()
    assert auths({"h.example:5000": {"auth": encoded}}) == RegistryAuth("me", "p:w")
    assert auths({"https://h.example:5000": {"username": "me", "password": "pw"}}) == RegistryAuth("me", "pw")
    assert auths({"h.example": {"auth": encoded}}) is None
    assert auths({"h.example:5000": {"auth": "%%%"}}) is None
    assert auths({"h.example:5000": {}}) is None
    assert auths([]) is None
    file.write_text("{")
    assert docker_auth(ref, file) is None
    hub = json.dumps({"auths": {"https://index.docker.io/v1/": {"auth": encoded}}})
    file.write_text(hub)
    assert docker_auth(ImageRef("docker.io/library/debian:12"), file) == RegistryAuth("me", "p:w")
