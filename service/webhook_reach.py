"""Where a webhook may lead: never to an address that only this machine, or its network, can reach.

Owns: which URLs and which addresses are allowed, the resolver and the sockets of deliveries. Does not own: the
requests (webhook_http.py).

A name is looked at twice: when the webhook is made, so that its owner is told, and at every connection, for a name may
by then lead elsewhere (DNS rebinding). The second look is at the very address that the socket is made for, so nothing
is resolved between the look and the connection, and it does not matter how an address was written in the URL.
"""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

from aiohttp.abc import AbstractResolver, ResolveResult

from service.errors import InvalidField

MAX_URL: Final = 2048
RESOLVE_SECONDS: Final = 5.0
RESOLVING_THREADS: Final = 8
NAT64: Final = IPv6Network("64:ff9b::/96")
"""RFC 6052: what an IPv6-only network turns into the IPv4 address in the last 32 bits."""
GLOBAL_UNICAST: Final = IPv6Network("2000::/3")
"""RFC 4291: all of IPv6 that is anybody's; no IPv4-mapped, local, site-local or multicast address."""
PRIVATE: Final = (
    "url leads to an address that is not public: choose another, or have the operator set "
    "BONSAI_WEBHOOK_PRIVATE_ADDRESSES=true"
)


class AddressRefused(OSError):
    """The connection would have gone to an address that is not public."""


class Resolver(AbstractResolver):
    """The system's resolver in threads of its own: names that hang hold up no other work of the gateway."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(RESOLVING_THREADS, "webhook-names")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        def ask() -> list[Any]:
            return socket.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)

        rows = await asyncio.get_running_loop().run_in_executor(self._threads, ask)
        return [_resolved(host, *row) for row in rows]

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class Reach:
    """What the operator allows."""

    def __init__(self, *, private_addresses: bool, plain_http: bool, resolver: AbstractResolver | None = None) -> None:
        self._private = private_addresses
        self._schemes = ("https", "http") if plain_http else ("https",)
        self.resolver = Resolver() if resolver is None else resolver

    async def require(self, url: str) -> None:
        """Raises InvalidField, on the field `url`, for one that nothing would be delivered to."""
        parts = self._parts(url)
        try:
            async with asyncio.timeout(RESOLVE_SECONDS):
                found = await self.resolver.resolve(parts.hostname or "", parts.port or 0)
        except (OSError, UnicodeError):  # TimeoutError is an OSError
            raise InvalidField("url names a host that is not found", param="url") from None
        if not found or not all(self._allows(one["host"]) for one in found):
            raise InvalidField(PRIVATE, param="url", code="address_refused")

    def socket_for(self, address: tuple[Any, ...]) -> socket.socket:
        """For a connection to this address, a row of `getaddrinfo`. Raises AddressRefused."""
        family, kind, protocol, _, (host, *_) = address
        if not self._allows(host):
            raise AddressRefused("not public")
        return socket.socket(family, kind, protocol)

    def _allows(self, host: str) -> bool:
        return self._private or is_public(host)

    def _parts(self, url: str) -> SplitResult:
        if not all("!" <= character <= "~" for character in url) or "\\" in url:
            raise InvalidField("url must be printable ASCII without spaces and backslashes", param="url")
        try:
            parts, port = urlsplit(url), urlsplit(url).port
        except ValueError:
            raise InvalidField("url must be one, with a port of 1 to 65535 if any", param="url") from None
        if parts.scheme not in self._schemes:
            schemes = " or ".join(f"{scheme}://" for scheme in self._schemes)
            raise InvalidField(f"url must begin with {schemes}", param="url")
        if not parts.hostname or port == 0:
            raise InvalidField("url must name a host, and a port of 1 to 65535 if any", param="url")
        if "@" in parts.netloc or parts.fragment:
            raise InvalidField("url must have neither user, password nor fragment", param="url")
        return parts


def is_public(host: str) -> bool:
    """Whether anybody on the internet could reach this address."""
    address = ip_address(host.partition("%")[0])
    if address in NAT64:
        address = IPv4Address(int(address) & 0xFFFF_FFFF)
    if isinstance(address, IPv6Address) and (address not in GLOBAL_UNICAST or address.sixtofour is not None):
        return False
    # is_global alone would allow multicast.
    return address.is_global and not (address.is_multicast or address.is_reserved)


def _resolved(host: str, family: int, _type: int, protocol: int, _name: str, address: Any) -> ResolveResult:
    return ResolveResult(
        hostname=host, host=address[0], port=address[1], family=family, proto=protocol, flags=socket.AI_NUMERICHOST
    )
