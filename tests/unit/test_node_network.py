"""What the network writes and reads, as text."""

from __future__ import annotations

import json
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from roost.errors import InvalidConfig
from roost.node.network import Network, conflist, name_servers, parse_subnet, routed_interfaces
from roost.settings import NetworkSettings, Settings

SUBNET = IPv4Network("10.208.0.0/16")


def test_conflist() -> None:
    document = json.loads(conflist("roost-t", SUBNET, Path("/s/cni"), 0))
    (plugin,) = document["plugins"]
    assert plugin["type"] == "ptp" and plugin["ipMasq"] is False and "mtu" not in plugin
    assert plugin["ipam"]["dataDir"] == "/s/cni"
    assert json.loads(conflist("roost-t", SUBNET, Path("/s/cni"), 1400))["plugins"][0]["mtu"] == 1400


def test_routed_interfaces() -> None:
    routes = (
        "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
        "eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
        "veth1\t0500D00A\t00000000\t0005\t0\t0\t0\tFFFFFFFF\t0\t0\t0\n"
        "veth2\t0500D10A\t00000000\t0005\t0\t0\t0\tFFFFFFFF\t0\t0\t0\n"
        "br0\t0000D00A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n"
    )
    assert routed_interfaces(SUBNET, routes) == {"veth1"}


def test_name_servers(tmp_path: Path) -> None:
    stub, real = tmp_path / "stub", tmp_path / "real"
    stub.write_text("# nameserver 9.9.9.9\nnameserver 127.0.0.53\nnameserver ::1\noptions edns0\n")
    real.write_text("nameserver 192.0.2.53\nnameserver fd00::1\nnameserver 192.0.2.53\nnameserver 192.0.2.54\n")
    assert name_servers((stub, real)) == ("192.0.2.53", "192.0.2.54")
    assert name_servers((real, stub)) == ("192.0.2.53", "192.0.2.54")
    assert name_servers((stub, tmp_path / "absent")) == ()


@pytest.mark.parametrize("text", ["", "x", "10.0.0.1/16", "10.0.0.0/30", "fd00::/64"])
def test_bad_subnets(text: str) -> None:
    with pytest.raises(InvalidConfig, match=r"\[network\] subnet"):
        parse_subnet(text)


async def test_bad_values_are_named(tmp_path: Path) -> None:
    network = Network(Settings(state_dir=tmp_path, network=NetworkSettings(dns=["x"])), tmp_path)
    with pytest.raises(InvalidConfig, match=r"\[network\] dns"):
        network.dns_servers()
    network = Network(Settings(state_dir=tmp_path, network=NetworkSettings(allow=["10.0.0.0/99"])), tmp_path)
    with pytest.raises(InvalidConfig, match=r"\[network\] allow"):
        await network.apply_policy()
