"""The workspaces' network: one point-to-point link each, and one nft table that says what may pass.

CNI's `ptp` gives every workspace a veth pair and a /32 route on the host: there is no bridge on which workspaces could
see each other, everything passes the host's forward hook.  The rules live in one table of our own, `inet <instance>`,
replaced in one transaction; nothing of the host's tables is read or changed.

What holds, for a workspace's traffic:
- to another workspace, to the host, to private, link-local (metadata), CGNAT and multicast ranges: refused, with an
  ICMP answer so that programs fail at once; but the settings' `[network] allow`, and DNS to the servers we hand out.
- to everywhere else: passes, masqueraded.
- towards it: only answers, and what the host itself opens (the output hook is not ours).
- with a source address that is not its own: dropped.  Rules by source address alone could be passed by lying about it,
  so they match the *interfaces* too: the set `workspaces`, filled by `guard` from the host's /32 routes into our subnet
  and, between two calls, by the first honest packet.
- IPv6: workspaces get none, and their link-local packets are dropped.

What a base chain of somebody else drops stays dropped, whatever ours accepts (nftables: accept ends one base chain,
drop ends all): a host whose firewall has a forward policy `drop`, as Docker sets it, needs a rule for our subnet there.
`foreign_drops` tells the doctor.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import shutil
import socket
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import structlog

from roost import faults
from roost.errors import InvalidConfig, MissingFeature, MissingProgram
from roost.settings import Settings

log = structlog.get_logger()

IP_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
ROUTES = Path("/proc/self/net/route")
# systemd-resolved's stub in /etc/resolv.conf is loopback: what it asks itself is in the second file.
RESOLV_CONF = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))
_PROGRAM_S = 20.0

# RFC 6890: what is not the public internet; the metadata services of clouds are in 169.254.0.0/16 and 100.64.0.0/10.
PRIVATE = (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4",
)  # fmt: skip


def parse_subnet(text: str) -> IPv4Network:
    """The workspaces' range. Raises InvalidConfig."""
    try:
        network = IPv4Network(text)
    except ValueError as error:
        raise InvalidConfig(f"[network] subnet: {error}") from error
    if network.prefixlen > 29:
        raise InvalidConfig(f"[network] subnet: {text} has too few addresses; /29 is the least, /16 is usual")
    return network


def conflist(name: str, subnet: IPv4Network, data_dir: Path, mtu: int) -> str:
    """The CNI configuration (spec 0.4.0, which all of containerd 1.6 to 2.x read)."""
    plugin: dict[str, object] = {
        "type": "ptp",
        "ipMasq": False,  # ours is in the nft table; the plugin's would call iptables
        "ipam": {
            "type": "host-local",
            "dataDir": str(data_dir),
            "ranges": [[{"subnet": str(subnet)}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    if mtu:
        plugin["mtu"] = mtu
    return json.dumps({"cniVersion": "0.4.0", "name": name, "plugins": [plugin]}, indent=1) + "\n"


def ruleset(
    table: str,
    subnet: IPv4Network,
    allowed: Iterable[IPv4Network],
    resolvers: Iterable[IPv4Address],
    interfaces: Iterable[str],
) -> str:
    """The whole table as nft reads it; the first two lines make the replacement one transaction with the rest."""

    def elements(values: Iterable[object]) -> str:
        listed = ", ".join(str(value) for value in values)
        return f"elements = {{ {listed} }}" if listed else ""

    refuse = "reject with icmpx type admin-prohibited"
    return f"""\
table inet {table}
delete table inet {table}
table inet {table} {{
  set private {{ type ipv4_addr; flags interval; auto-merge; {elements(PRIVATE)} }}
  set allowed {{ type ipv4_addr; flags interval; auto-merge; {elements(sorted(allowed))} }}
  set resolvers {{ type ipv4_addr; {elements(sorted(resolvers))} }}
  set workspaces {{ type ifname; size 65535; flags dynamic; {elements(f'"{name}"' for name in sorted(interfaces))} }}

  chain honest {{
    type filter hook prerouting priority raw; policy accept;
    iifname @workspaces meta nfproto ipv6 drop
    iifname @workspaces fib saddr . iif oif missing drop
    ip saddr {subnet} fib saddr . iif oif missing drop
    ip saddr {subnet} iifname != "lo" add @workspaces {{ iifname }}
  }}

  chain forward {{
    type filter hook forward priority filter; policy accept;
    iifname @workspaces jump from_workspace
    ip saddr {subnet} jump from_workspace
    ip daddr {subnet} jump to_workspace
  }}
  chain from_workspace {{
    ct state established,related accept
    ct state invalid drop
    ip daddr {subnet} {refuse}
    ip daddr @resolvers meta l4proto {{ tcp, udp }} th dport 53 accept
    ip daddr @allowed accept
    ip daddr @private {refuse}
  }}
  chain to_workspace {{
    ct state established,related accept
    drop
  }}

  chain input {{
    type filter hook input priority filter; policy accept;
    iifname "lo" accept
    iifname @workspaces jump to_host
    ip saddr {subnet} jump to_host
  }}
  chain to_host {{
    ct state established,related accept
    ip daddr @resolvers meta l4proto {{ tcp, udp }} th dport 53 accept
    {refuse}
  }}

  chain leave {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {subnet} ip daddr != {subnet} masquerade
  }}
}}
"""


def routed_interfaces(subnet: IPv4Network, routes: str) -> set[str]:
    """Interfaces with a /32 route into the subnet, from the text of /proc/net/route: the host ends of our links."""
    found = set()
    for line in routes.splitlines()[1:]:
        fields = line.split()
        # Addresses are printed as host-order words.
        address = IPv4Address(socket.htonl(int(fields[1], 16)) if _LITTLE else int(fields[1], 16))
        if fields[7] == "FFFFFFFF" and address in subnet:
            found.add(fields[0])
    return found


_LITTLE = socket.htonl(1) != 1


def name_servers(resolv_conf: Iterable[Path] = RESOLV_CONF) -> tuple[str, ...]:
    """The host's IPv4 name servers that are not loopback (resolv.conf(5)); empty when it has none."""
    for path in resolv_conf:
        servers: list[str] = []
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            words = line.split()
            if len(words) < 2 or words[0] != "nameserver":
                continue
            try:
                address = IPv4Address(words[1])
            except ValueError:
                continue
            if not address.is_loopback and str(address) not in servers:
                servers.append(str(address))
        if servers:
            return tuple(servers[:3])
    return ()


class Network:
    """The network of one node's workspaces."""

    def __init__(self, settings: Settings, conf_dir: Path) -> None:
        self.name = settings.node.instance
        self.table = self.name.replace("-", "_")
        self.subnet = parse_subnet(settings.network.subnet)
        self._settings = settings.network
        self._conf = conf_dir / f"10-{self.name}.conflist"
        self._data = settings.node_state / "cni"

    def dns_servers(self) -> tuple[str, ...]:
        """The name servers to give to workspaces: the settings', else the host's. Raises InvalidConfig."""
        for server in self._settings.dns:
            try:
                IPv4Address(server)
            except ValueError as error:
                raise InvalidConfig(f"[network] dns: {error}") from error
        return tuple(self._settings.dns) or name_servers()

    async def start(self) -> None:
        """Check the subnet, enable forwarding, write the CNI configuration, apply the policy; again: refreshes all.

        Best before the engine starts, which then has its network at once. Raises InvalidConfig, MissingFeature,
        MissingProgram.
        """
        await self.check_subnet()
        await asyncio.to_thread(enable_forwarding)
        await asyncio.to_thread(self.write_conflist)
        faults.point("network.configured")
        await self.apply_policy()

    def write_conflist(self) -> None:
        """Write the CNI configuration where the engine looks, by rename. Blocks."""
        self._conf.parent.mkdir(parents=True, exist_ok=True)
        self._data.mkdir(parents=True, exist_ok=True)
        text = conflist(self.name, self.subnet, self._data, self._settings.mtu)
        if self._conf.is_file() and self._conf.read_text() == text:
            return
        beside = self._conf.with_name(f".{self._conf.name}.new")
        beside.write_text(text)
        beside.rename(self._conf)

    async def check_subnet(self) -> None:
        """Raise InvalidConfig when the host uses the subnet for something else."""
        output = await _run("ip", "-json", "-4", "route", "show", "table", "all")
        for route in json.loads(output or "[]"):
            if self._is_foreign(route):
                where = f"{route['dst']} dev {route.get('dev', '?')}"
                raise InvalidConfig(
                    f"[network] subnet {self.subnet} overlaps with this host's route to {where}",
                    next_step="Set [network] subnet to a private range that is not in use here.",
                    details={"route": where},
                )

    def _is_foreign(self, route: dict[str, object]) -> bool:
        destination = str(route.get("dst", "default"))
        # An unreachable or blackhole route says that nobody uses the range.
        if destination == "default" or route.get("type") in ("unreachable", "blackhole", "prohibit"):
            return False
        network = IPv4Network(destination)
        link = network.prefixlen == 32 and str(route.get("dev", "")).startswith("veth")  # a workspace's
        return network.overlaps(self.subnet) and not link

    async def apply_policy(self) -> None:
        """Replace our nft table; connections that are open go on. Raises MissingFeature, MissingProgram, InvalidConfig.

        Names in `[network] allow` are resolved now; one that does not resolve is logged and left out.
        """
        allowed = await asyncio.to_thread(self._allowed)
        resolvers = [IPv4Address(server) for server in self.dns_servers()]
        if not resolvers:
            log.warning("network.no_dns", why="the host has loopback name servers only; set [network] dns")
        interfaces = routed_interfaces(self.subnet, await asyncio.to_thread(ROUTES.read_text))
        await _nft(ruleset(self.table, self.subnet, allowed, resolvers, interfaces))

    async def guard(self) -> None:
        """Take the interfaces of the workspaces that are there now into the policy.

        To be called when a sandbox has its network and nothing runs in it yet. Raises MissingFeature if there is no
        policy.
        """
        interfaces = routed_interfaces(self.subnet, await asyncio.to_thread(ROUTES.read_text))
        listed = ", ".join(f'"{name}"' for name in sorted(interfaces))
        add = f"add element inet {self.table} workspaces {{ {listed} }}\n" if listed else ""
        await _nft(f"flush set inet {self.table} workspaces\n{add}")

    async def remove_policy(self) -> None:
        """Remove our nft table; absent: no error."""
        await _nft(f"table inet {self.table}\ndelete table inet {self.table}\n")

    def _allowed(self) -> list[IPv4Network]:
        found: list[IPv4Network] = []
        for entry in self._settings.allow:
            try:
                network = ipaddress.ip_network(entry, strict=False)
            except ValueError:
                found.extend(_resolve(entry))
                continue
            if isinstance(network, IPv4Network):  # workspaces have no IPv6
                found.append(network)
        return found


def _resolve(host: str) -> list[IPv4Network]:
    if "/" in host or " " in host:
        raise InvalidConfig(f"[network] allow: {host!r} is neither a host nor a range")
    try:
        answers = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError as error:
        log.warning("network.allow_unresolved", host=host, why=str(error))
        return []
    return [IPv4Network(str(answer[4][0])) for answer in answers]


def enable_forwarding() -> None:
    """Let the host forward IPv4. Raises MissingFeature. Blocks."""
    try:
        if IP_FORWARD.read_text().strip() != "1":
            IP_FORWARD.write_text("1")
    except OSError as error:
        raise MissingFeature(
            f"IPv4 forwarding is off and cannot be enabled: {error.strerror}",
            next_step="As root on the host: `sysctl -w net.ipv4.ip_forward=1`.",
        ) from error


async def foreign_drops(table: str) -> list[str]:
    """Others' base chains in the forward hook whose policy is drop, for the doctor: they need a rule for our subnet."""
    document = json.loads(await _run("nft", "--json", "list", "chains"))
    chains = [item["chain"] for item in document.get("nftables", []) if "chain" in item]
    return [
        f"{chain['family']} {chain['table']} {chain['name']}"
        for chain in chains
        if chain.get("hook") == "forward" and chain.get("policy") == "drop" and chain["table"] != table
    ]


async def _nft(script: str) -> None:
    await _run("nft", "-f", "-", stdin=script.encode())


async def _run(program: str, *args: str, stdin: bytes = b"") -> str:
    path = shutil.which(program)
    if path is None:
        package = {"nft": "nftables", "ip": "iproute2"}[program]
        raise MissingProgram(
            f"{program} is not installed", next_step=f"Run `make setup`, or `apt-get install {package}`."
        )
    process = await asyncio.create_subprocess_exec(
        path, *args, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(stdin), _PROGRAM_S)
    except TimeoutError as error:
        raise MissingFeature(f"{program} does not answer within {_PROGRAM_S:g} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise MissingFeature(f"{program} {' '.join(args)}: {err.decode(errors='replace').strip()}")
    return out.decode(errors="replace")
