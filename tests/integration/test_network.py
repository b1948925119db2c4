"""The network policy with real TCP: a whole host in network namespaces of its own.

The test's main thread moves into a fresh namespace, "the host"; workspaces and the world outside are further ones, held
by a sleeping process each.  Workspaces are connected by the real CNI plugin with our configuration.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from roost.errors import InvalidConfig
from roost.node.containerd import CNI_BIN_DIRS
from roost.node.network import IP_FORWARD, Network, foreign_drops
from roost.settings import NetworkSettings, NodeSettings, Settings

CNI_BIN = next((d for d in CNI_BIN_DIRS if (d / "ptp").exists()), None)
pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or CNI_BIN is None or shutil.which("nft") is None, reason="needs root, nft and the CNI plugins"
)

SUBNET = "10.231.7.0/24"
PUBLIC, PRIVATE, ALLOWED, METADATA = "198.51.100.2", "192.168.77.2", "10.99.0.2", "169.254.169.254"
PORT = 8080
CLONE_NEWNET = 0x40000000
libc = ctypes.CDLL(None, use_errno=True)

SERVER = f"""
import socket, sys, threading
def serve(address, port, kind):
    s = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind((address, port))
    if kind == socket.SOCK_STREAM: s.listen()
    sys.stdout.write("ready\\n"); sys.stdout.flush()
    while True:
        if kind == socket.SOCK_STREAM:
            c, peer = s.accept(); c.sendall(peer[0].encode()); c.close()
        else:
            data, peer = s.recvfrom(100); s.sendto(peer[0].encode(), peer)
for port, kind in (({PORT}, socket.SOCK_STREAM), (53, socket.SOCK_DGRAM)):
    threading.Thread(target=serve, args=("::", port, kind)).start()
"""

CLIENT = """
import socket, sys
host, port = sys.argv[1], int(sys.argv[2])
family = socket.AF_INET6 if ":" in host else socket.AF_INET
s = socket.socket(family, socket.SOCK_DGRAM if port == 53 else socket.SOCK_STREAM)
s.settimeout(1.0)
try:
    s.connect(socket.getaddrinfo(host, port, family)[0][4])
    if port == 53: s.send(b"?")
    print(s.recv(100).decode(), end="")
except OSError as error:
    print("blocked", type(error).__name__, error, end="")
"""


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True)


@dataclass
class Space:
    """A network namespace, alive as long as its process."""

    holder: subprocess.Popen[bytes]

    @property
    def path(self) -> str:
        return f"/proc/{self.holder.pid}/ns/net"

    def run(self, *argv: str) -> str:
        command = ["nsenter", f"--net={self.path}", *argv]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout

    def connect(self, host: str, port: int = PORT) -> str:
        """The peer address as the server saw it, or `blocked …`."""
        return self.run(sys.executable, "-c", CLIENT, host, str(port)).removeprefix("::ffff:")


class World:
    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        self.processes: list[subprocess.Popen[bytes]] = []

    def settings(self, **network: object) -> Settings:
        section = NetworkSettings.model_validate({"subnet": SUBNET, "dns": [PRIVATE], **network})
        node = NodeSettings(instance="roost-tnet")
        return Settings(state_dir=self.tmp_path / "state", run_dir=self.tmp_path / "run", network=section, node=node)

    def network(self, **network: object) -> Network:
        return Network(self.settings(**network), self.tmp_path / "conf")

    def space(self) -> Space:
        holder = subprocess.Popen(["unshare", "--net", "sh", "-c", "ip link set lo up; echo; exec sleep 600"],
                                  stdout=subprocess.PIPE)  # fmt: skip
        assert holder.stdout is not None
        holder.stdout.readline()
        holder.stdout.close()
        self.processes.append(holder)
        return Space(holder)

    def serve(self, space: Space | None) -> None:
        prefix = ["nsenter", f"--net={space.path}"] if space else []
        server = subprocess.Popen([*prefix, sys.executable, "-c", SERVER], stdout=subprocess.PIPE)
        self.processes.append(server)
        assert server.stdout is not None
        assert server.stdout.readline() + server.stdout.readline() == b"ready\nready\n"
        server.stdout.close()

    def outside(self) -> Space:
        """Another machine, which has the addresses of the internet and of the private network."""
        space = self.space()
        ip("link", "add", "uplink", "type", "veth", "peer", "name", "eth0", "netns", str(space.holder.pid))
        for address in ("198.51.100.1/24", "192.168.77.1/24", "10.99.0.1/24"):
            ip("addr", "add", address, "dev", "uplink")
        ip("link", "set", "uplink", "up")
        ip("route", "add", "169.254.169.254", "dev", "uplink")
        for address in (f"{PUBLIC}/24", f"{PRIVATE}/24", f"{ALLOWED}/24", f"{METADATA}/32"):
            space.run("ip", "addr", "add", address, "dev", "eth0")
        space.run("ip", "link", "set", "eth0", "up")
        self.serve(space)
        return space

    def workspace(self, name: str) -> tuple[Space, str]:
        """A namespace connected as the engine does it: by the CNI plugin of our conflist."""
        space = self.space()
        document = json.loads(next((self.tmp_path / "conf").glob("*.conflist")).read_text())
        (plugin,) = document["plugins"]
        config = {"cniVersion": document["cniVersion"], "name": document["name"], **plugin}
        assert CNI_BIN is not None
        environment = {
            "CNI_COMMAND": "ADD", "CNI_CONTAINERID": name, "CNI_NETNS": space.path, "CNI_IFNAME": "eth0",
            "CNI_PATH": str(CNI_BIN), "PATH": os.environ["PATH"],
        }  # fmt: skip
        done = subprocess.run([CNI_BIN / plugin["type"]], input=json.dumps(config).encode(), env=environment,
                              capture_output=True, timeout=20)  # fmt: skip
        assert done.returncode == 0, done.stdout
        return space, json.loads(done.stdout)["ips"][0]["address"].partition("/")[0]

    def close(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
            process.wait()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    before = os.open("/proc/self/ns/net", os.O_RDONLY)
    assert libc.unshare(CLONE_NEWNET) == 0
    world = World(tmp_path)
    try:
        ip("link", "set", "lo", "up")
        yield world
    finally:
        world.close()
        assert libc.setns(before, CLONE_NEWNET) == 0
        os.close(before)


@pytest.fixture
async def policy(world: World) -> AsyncIterator[Network]:
    network = world.network(allow=[f"{ALLOWED}/32"])
    await network.start()
    yield network
    await network.remove_policy()


def passes(answer: str) -> bool:
    return "blocked" not in answer and answer != ""


async def test_what_passes_and_what_does_not(world: World, policy: Network) -> None:
    world.outside()
    world.serve(None)
    one, _ = world.workspace("one")
    two, two_ip = world.workspace("two")
    world.serve(two)
    await policy.guard()

    assert one.connect(PUBLIC) == "198.51.100.1", "the internet is reached, behind the host's address"
    assert passes(one.connect(ALLOWED)), "a private range of the settings"
    for what, address in {
        "another workspace": two_ip,
        "the private network": PRIVATE,
        "the metadata service": METADATA,
        "the host at its gateway address": "10.231.7.1",
        "the host at its public address": "198.51.100.1",
        "the host at its private address": "192.168.77.1",
    }.items():
        assert one.connect(address).startswith("blocked"), what
    assert passes(one.connect(PRIVATE, 53)), "DNS at the server that workspaces are given"
    assert one.connect(METADATA, 53).startswith("blocked"), "DNS elsewhere"
    local = subprocess.run([sys.executable, "-c", CLIENT, two_ip, str(PORT)], capture_output=True, text=True)
    assert passes(local.stdout), "the host (our gateway) reaches a workspace"


async def test_without_the_policy_all_would_pass(world: World, policy: Network) -> None:
    """The proof that the tests above see the policy, and that it goes without a trace."""
    world.outside()
    world.serve(None)
    one, _ = world.workspace("one")
    two, two_ip = world.workspace("two")
    world.serve(two)
    assert one.connect(two_ip).startswith("blocked")
    await policy.remove_policy()
    assert passes(one.connect(two_ip))
    assert passes(one.connect("192.168.77.1"))
    assert subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=True).stdout == ""


async def test_from_outside_nobody_comes_in(world: World, policy: Network) -> None:
    outside = world.outside()
    one, one_ip = world.workspace("one")
    world.serve(one)
    outside.run("ip", "route", "add", SUBNET, "via", "198.51.100.1")
    assert outside.connect(one_ip).startswith("blocked")
    await policy.remove_policy()
    assert passes(outside.connect(one_ip))


async def test_lies_about_the_source(world: World, policy: Network) -> None:
    """UDP with the address of a neighbour, of the host's network, of nobody: none of it leaves the link."""
    outside = world.outside()
    one, _ = world.workspace("one")
    _two, two_ip = world.workspace("two")
    await policy.guard()
    counter = (
        "add table inet seen\nadd chain inet seen c { type filter hook forward priority 10; }\n"
        "add rule inet seen c udp dport 9 counter"
    )
    subprocess.run(["nft", "-f", "-"], input=counter.encode(), check=True)

    def forwarded() -> int:
        listed = subprocess.run(["nft", "-j", "list", "table", "inet", "seen"], capture_output=True, check=True).stdout
        rules = [item["rule"] for item in json.loads(listed)["nftables"] if "rule" in item]
        return int(rules[0]["expr"][1]["counter"]["packets"])

    send = (
        "import socket,sys; s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.setsockopt(0,19,1);"
        "s.bind((sys.argv[1],0)); s.sendto(b'x',(sys.argv[2],9))"
    )
    for liar in (two_ip, "192.168.77.9", "203.0.113.9"):
        one.run(sys.executable, "-c", send, liar, PUBLIC)
        assert forwarded() == 0, liar
    one.run(sys.executable, "-c", send, "0.0.0.0", PUBLIC)
    assert forwarded() == 1, "the truth passes"
    subprocess.run(["nft", "delete", "table", "inet", "seen"], check=True)
    assert outside.holder.poll() is None


async def test_no_ipv6_to_the_host(world: World, policy: Network) -> None:
    one, _ = world.workspace("one")
    world.serve(None)
    await policy.guard()
    links = json.loads(subprocess.run(["ip", "-j", "-6", "addr"], capture_output=True, check=True).stdout)
    host_side = [a["local"] for link in links if link["ifname"].startswith("veth") for a in link["addr_info"]]
    assert host_side, "the host's end has a link-local address"
    assert one.connect(f"{host_side[0]}%eth0").startswith("blocked")
    await policy.remove_policy()
    for _ in range(100):  # duplicate address detection takes a second or two
        if passes(one.connect(f"{host_side[0]}%eth0")):
            break
        await asyncio.sleep(0.05)
    assert passes(one.connect(f"{host_side[0]}%eth0")), "it was the policy that kept it off"


async def test_open_connections_survive_a_new_policy(world: World, policy: Network) -> None:
    outside = world.outside()
    one, _ = world.workspace("one")
    script = (
        "import socket,sys; s=socket.create_connection((sys.argv[1], 7007)); print('open', flush=True);"
        "sys.stdin.readline(); s.sendall(b'still'); s.shutdown(1); print(s.recv(9).decode(), flush=True)"
    )
    echo = (
        "import socket; s=socket.create_server(('', 7007)); print('ready', flush=True);"
        "c,_=s.accept(); c.sendall(c.recv(9))"
    )
    server = subprocess.Popen(["nsenter", f"--net={outside.path}", sys.executable, "-c", echo], stdout=subprocess.PIPE)
    world.processes.append(server)
    assert server.stdout
    with server.stdout:
        assert server.stdout.readline() == b"ready\n"
    client = subprocess.Popen(
        ["nsenter", f"--net={one.path}", sys.executable, "-c", script, PUBLIC],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert client.stdout
    assert client.stdout.readline() == b"open\n"
    await policy.apply_policy()
    out, _ = await asyncio.to_thread(client.communicate, b"\n", 10)
    assert out == b"still\n"


async def test_start_enables_forwarding_and_is_repeatable(world: World) -> None:
    IP_FORWARD.write_text("0")
    network = world.network()
    await network.start()
    assert IP_FORWARD.read_text().strip() == "1"
    world.workspace("one")
    await network.start()
    await network.remove_policy()
    await network.remove_policy()


async def test_subnet_in_use(world: World) -> None:
    world.outside()
    for subnet in ("192.168.77.0/24", "10.99.0.0/16", "198.51.0.0/16"):
        with pytest.raises(InvalidConfig, match=r"\[network\] subnet .*uplink"):
            await world.network(subnet=subnet).start()
    ip("route", "add", "unreachable", "10.0.0.0/8")
    await world.network().check_subnet()


async def test_foreign_firewall_is_told(world: World, policy: Network) -> None:
    assert await foreign_drops(policy.table) == []
    chain = "add table ip other\nadd chain ip other watch { type filter hook forward priority 0; policy drop; }"
    subprocess.run(["nft", "-f", "-"], input=chain.encode(), check=True)
    assert await foreign_drops(policy.table) == ["ip other watch"]
