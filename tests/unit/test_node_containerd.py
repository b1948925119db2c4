"""containerd's configuration, for its versions."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from roost.errors import InvalidConfig, MissingFeature
from roost.node.containerd import Containerd, EngineConfig, containerd_version, hosts_toml, render_config
from roost.settings import Settings

CONFIG = EngineConfig(
    root=Path("/s/root"),
    state=Path("/r/state"),
    socket=Path("/r/c.sock"),
    temp=Path("/r/tmp"),
    runc_root=Path("/r/runc"),
    snapshots=Path('/pool/snap "x"'),
    cni_bin=Path("/usr/lib/cni"),
    cni_conf=Path("/s/cni"),
    certs=Path("/s/certs.d"),
    sandbox_image="roost.local/pause:1",
    apparmor=False,
    shim_sockets=Path("/r/s"),
    proxy_snapshotters={"roost": Path("/r/snap.sock")},
)


@pytest.mark.parametrize("version", [(1, 6), (1, 7)])
def test_version_2(version: tuple[int, int]) -> None:
    document = tomllib.loads(render_config(CONFIG, version))
    assert document["version"] == 2
    cri = document["plugins"]["io.containerd.grpc.v1.cri"]
    assert cri["sandbox_image"] == "roost.local/pause:1"
    assert cri["restrict_oom_score_adj"] is True and cri["disable_apparmor"] is True
    assert cri["containerd"]["runtimes"]["runc"]["options"] == {"SystemdCgroup": False, "Root": "/r/runc"}
    assert cri["cni"] == {"bin_dir": "/usr/lib/cni", "conf_dir": "/s/cni", "max_conf_num": 1}
    assert cri["registry"]["config_path"] == "/s/certs.d"
    assert document["plugins"]["io.containerd.snapshotter.v1.overlayfs"]["root_path"] == '/pool/snap "x"'
    assert document["proxy_plugins"]["roost"] == {"type": "snapshot", "address": "/r/snap.sock"}


@pytest.mark.parametrize("version", [(2, 0), (2, 1), (2, 3)])
def test_version_3(version: tuple[int, int]) -> None:
    document = tomllib.loads(render_config(CONFIG, version))
    plugins = document["plugins"]
    assert document["version"] == 3
    assert plugins["io.containerd.cri.v1.images"]["pinned_images"] == {"sandbox": "roost.local/pause:1"}
    assert plugins["io.containerd.cri.v1.images"]["registry"] == {"config_path": "/s/certs.d"}
    runtime = plugins["io.containerd.cri.v1.runtime"]
    assert runtime["containerd"]["runtimes"]["runc"]["options"]["Root"] == "/r/runc"
    assert runtime["netns_mounts_under_state_dir"] is True
    assert set(runtime["cni"]) & {"bin_dir", "bin_dirs"} == {"bin_dirs" if version >= (2, 1) else "bin_dir"}
    assert ("io.containerd.shim.v1.manager" in plugins) is (version >= (2, 3))


@pytest.mark.parametrize("version", [(1, 6), (1, 7), (2, 0), (2, 3)])
def test_nothing_of_the_systems_is_named(version: tuple[int, int]) -> None:
    text = render_config(CONFIG, version)
    for path in ("/run/containerd", "/etc/", "/var/lib/containerd", "/opt/containerd", "/var/run"):
        assert path not in text
    assert "io.containerd.snapshotter.v1.btrfs" in tomllib.loads(text)["disabled_plugins"]


def fake(tmp_path: Path, says: str) -> Path:
    program = tmp_path / "containerd"
    program.write_text(f"#!/bin/sh\necho '{says}'\n")
    program.chmod(0o755)
    return program


@pytest.mark.parametrize(
    ("says", "version"),
    [
        ("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3", (1, 6)),
        ("containerd github.com/containerd/containerd/v2 v2.1.4 75cb2b7193e4e490e9fbdc236c0e811ccaba3376", (2, 1)),
        ("containerd containerd.io 1.7.27 05044ec0a9a75232cad458027ca83437aae3f4da", (1, 7)),
    ],
)
def test_versions(tmp_path: Path, says: str, version: tuple[int, int]) -> None:
    assert containerd_version(fake(tmp_path, says))[1] == version


@pytest.mark.parametrize("says", ["containerd 1.5.9", "hello"])
def test_versions_that_cannot_be_used(tmp_path: Path, says: str) -> None:
    with pytest.raises(MissingFeature):
        containerd_version(fake(tmp_path, says))


async def test_paths_too_long_for_a_socket(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path / "s", run_dir=Path("/nonexistent") / ("x" * 90))
    with pytest.raises(InvalidConfig, match="run_dir"):
        await Containerd(settings, tmp_path / "snap").start()


def test_hosts() -> None:
    document = tomllib.loads(hosts_toml("10.0.0.5:5000"))
    assert document["server"] == "http://10.0.0.5:5000"
    assert document["host"]["http://10.0.0.5:5000"]["capabilities"] == ["pull", "resolve"]
