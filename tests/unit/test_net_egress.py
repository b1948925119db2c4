"""Which addresses are open Internet, and what policy allows beside them."""

from __future__ import annotations

import ipaddress

import pytest

from roost.errors import AddressNotAllowed
from roost.net import egress


@pytest.mark.parametrize(
    "address, public",
    [
        ("8.8.8.8", True), ("1.1.1.1", True), ("2606:4700::1111", True), ("64:ff9b::808:808", True),
        ("2002:808:808::1", True), ("127.0.0.1", False), ("10.1.2.3", False), ("172.16.0.1", False),
        ("192.168.1.1", False), ("169.254.169.254", False), ("100.64.0.1", False), ("0.0.0.0", False),
        ("224.0.0.1", False), ("255.255.255.255", False), ("240.0.0.1", False), ("::1", False),
        ("::", False), ("fe80::1", False), ("fd00::1", False), ("ff02::1", False),
        ("2001:db8::1", False), ("::ffff:127.0.0.1", False), ("::ffff:10.0.0.1", False), ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::1", False),
    ],
)  # fmt: skip
def test_public(address, public):
    assert egress.is_public(ipaddress.ip_address(address)) is public


@pytest.mark.parametrize(
    "host, address, allow, allowed",
    [
        ("git.corp", "10.0.0.5", ["git.corp"], True),
        ("Git.Corp.", "10.0.0.5", ["git.corp"], True),
        ("a.git.corp", "10.0.0.5", ["*.git.corp"], True),
        ("git.corp", "10.0.0.5", ["*.git.corp"], False),
        ("evilgit.corp", "10.0.0.5", ["git.corp", "*.it.corp"], False),
        ("x", "10.0.0.5", ["10.0.0.0/8"], True),
        ("x", "::ffff:10.0.0.5", ["10.0.0.0/8"], True),
        ("x", "10.0.0.5", ["10.0.0.5"], True),
        ("x", "11.0.0.5", ["10.0.0.0/8", "not a network"], False),
        ("x", "10.0.0.5", [], False),
    ],
)
def test_policy(host, address, allow, allowed):
    assert egress.allowed_by(host, ipaddress.ip_address(address), allow) is allowed


async def test_resolve():
    with pytest.raises(AddressNotAllowed):
        await egress.resolve("localhost", 80, allow=[])
    assert "127.0.0.1" in (await egress.resolve("localhost", 80, allow=[], trusted=True)).addresses
    found = await egress.resolve("127.0.0.1", 80, allow=["127.0.0.0/8"])
    assert found.curl_resolve == "127.0.0.1:80:127.0.0.1"
    assert egress.Endpoint("h", 1, ("::1", "1.2.3.4")).curl_resolve == "h:1:[::1],1.2.3.4"


async def test_first_reachable(unused_tcp_port):
    import asyncio

    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", unused_tcp_port)
    async with server:
        found = await egress.first_reachable(egress.Endpoint("h", unused_tcp_port, ("127.0.0.2", "127.0.0.1")))
        assert found.addresses == ("127.0.0.1", "127.0.0.2")
    with pytest.raises(OSError):
        await egress.first_reachable(egress.Endpoint("h", unused_tcp_port, ("127.0.0.1",)))
