"""Which addresses roost connects to when somebody else chose the name: resolve once, check, connect to that address.

The check is worth something only if the connection goes to the very address that was checked: a name that answers
with a public address first and with 127.0.0.1 a moment later (DNS rebinding) is the ordinary attack.  So `resolve`
returns addresses and the caller pins them (curl: `http.curloptResolve`, ssh: `HostName` + `HostKeyAlias`).

Every address of a name must pass; one private address among public ones is a refusal, not a choice.  IPv6 forms that
carry an IPv4 address (mapped, 6to4, NAT64, Teredo) are judged by the address carried too, since a gateway on the way
may unwrap them.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from roost.errors import AddressNotAllowed

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64: Final = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("64:ff9b:1::/48"))
_RESOLVE_TIMEOUT_S: Final = 15.0
_CONNECT_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A host whose addresses passed the policy; connect to one of `addresses`, never to the name again."""

    host: str
    port: int
    addresses: tuple[str, ...]

    @property
    def curl_resolve(self) -> str:
        """The entry for curl's CURLOPT_RESOLVE (`http.curloptResolve`)."""
        listed = ",".join(f"[{address}]" if ":" in address else address for address in self.addresses)
        return f"{self.host}:{self.port}:{listed}"


def is_public(address: IPAddress) -> bool:
    """Whether the address is one of the open Internet, through every wrapping of IPv4 in IPv6."""
    if isinstance(address, ipaddress.IPv6Address):
        carried = [address.ipv4_mapped, address.sixtofour]
        carried += list(address.teredo or ())
        if any(address in network for network in _NAT64):
            carried.append(ipaddress.IPv4Address(address.packed[-4:]))
        inner = [one for one in carried if one is not None]
        if inner:
            return all(is_public(one) for one in inner)
    return address.is_global and not address.is_multicast and not address.is_reserved


def allowed_by(host: str, address: IPAddress, allow: Sequence[str]) -> bool:
    """Whether a list of hosts, `*.domains`, addresses and CIDR ranges names this host or address."""
    name = host.rstrip(".").lower()
    for entry in allow:
        wanted = entry.strip().rstrip(".").lower()
        if name == wanted or (wanted.startswith("*.") and name.endswith(wanted[1:])):
            return True
        with contextlib.suppress(ValueError):
            network = ipaddress.ip_network(wanted, strict=False)
            if address in network:
                return True
            mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
            if mapped is not None and mapped in network:
                return True
    return False


def check(host: str, address: str, allow: Sequence[str]) -> None:
    """AddressNotAllowed when the address is private and the policy does not name it."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if not is_public(parsed) and not allowed_by(host, parsed, allow):
        raise AddressNotAllowed(
            f"{host} leads to {address}, an address that is not public", details={"host": host, "address": address}
        )


async def resolve(
    host: str, port: int, *, allow: Sequence[str], trusted: bool = False, timeout_s: float = _RESOLVE_TIMEOUT_S
) -> Endpoint:
    """All addresses of a host, each checked; `trusted` (the local administrator) resolves without the check.

    Raises AddressNotAllowed, socket.gaierror (no such name), TimeoutError (no answer in time).
    """
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(timeout_s):
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    addresses = tuple(dict.fromkeys(str(info[4][0]) for info in found))
    if not trusted:
        for address in addresses:
            check(host, address, allow)
    return Endpoint(host, port, addresses)


async def first_reachable(endpoint: Endpoint, *, timeout_s: float = _CONNECT_TIMEOUT_S) -> Endpoint:
    """The endpoint with the address that accepted a connection in front; OSError or TimeoutError when none does."""
    last: OSError | None = None
    async with asyncio.timeout(timeout_s):
        for address in endpoint.addresses:
            try:
                _, writer = await asyncio.open_connection(address, endpoint.port)
            except OSError as error:
                last = error
                continue
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            others = tuple(one for one in endpoint.addresses if one != address)
            return Endpoint(endpoint.host, endpoint.port, (address, *others))
    raise last or OSError(f"{endpoint.host} has no address")
