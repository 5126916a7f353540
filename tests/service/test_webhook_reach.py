"""Where no webhook leads: however an address is written, whatever a name meant before (reliability.md D30, S9)."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from service.errors import InvalidField
from service.webhook_http import open_sender
from service.webhook_reach import MAX_URL, Reach, Resolver, is_public
from tests.service.receiver import Receiver

pytestmark = pytest.mark.anyio
PUBLIC = "93.184.215.14"

NOT_PUBLIC = {
    "loopback": "127.0.0.1",
    "all of loopback": "127.255.255.254",
    "unspecified": "0.0.0.0",
    "private 10": "10.0.0.1",
    "private 172": "172.16.0.1",
    "private 192": "192.168.1.1",
    "link-local, where clouds keep their metadata": "169.254.169.254",
    "carrier-grade NAT": "100.64.0.1",
    "Alibaba's metadata": "100.100.100.200",
    "multicast": "224.0.0.1",
    "multicast beyond": "239.255.255.255",
    "reserved": "240.0.0.1",
    "broadcast": "255.255.255.255",
    "benchmarks": "198.18.0.1",
    "IPv6 loopback": "::1",
    "IPv6 unspecified": "::",
    "IPv6 link-local": "fe80::1",
    "IPv6 link-local with a zone": "fe80::1%eth0",
    "IPv6 site-local": "fec0::1",
    "IPv6 unique local": "fd00::1",
    "AWS' metadata": "fd00:ec2::254",
    "IPv6 multicast": "ff02::1",
    "IPv4-mapped loopback": "::ffff:127.0.0.1",
    "IPv4-mapped metadata": "::ffff:a9fe:a9fe",
    "IPv4-compatible": "::7f00:1",
    "6to4 of loopback": "2002:7f00:1::",
    "Teredo": "2001:0:53aa:64c::1",
    "NAT64 of loopback": "64:ff9b::7f00:1",
    "NAT64 of a private network": "64:ff9b::10.0.0.1",
    "local NAT64": "64:ff9b:1::1",
    "documentation": "2001:db8::1",
}


@pytest.mark.parametrize("host", NOT_PUBLIC.values(), ids=NOT_PUBLIC.keys())
def test_what_only_this_network_reaches_is_not_public(host):
    assert not is_public(host)


@pytest.mark.parametrize("host", [PUBLIC, "8.8.8.8", "2606:4700:4700::1111", "64:ff9b::8.8.8.8"])
def test_what_everybody_reaches_is_public(host):
    assert is_public(host)


WRONG = {
    "D30 gopher": "gopher://example.com/",
    "D30 a file": "file:///etc/passwd",
    "plain http": "http://93.184.215.14/",
    "no scheme": "//example.com/",
    "no host": "https:///hooks",
    "a user": "https://user@93.184.215.14/",
    "a password": "https://user:password@93.184.215.14/",
    "a fragment": "https://93.184.215.14/#x",
    "port 0": "https://93.184.215.14:0/",
    "port 65536": "https://93.184.215.14:65536/",
    "a port in words": "https://93.184.215.14:https/",
    "a space": "https://93.184.215.14/ x",
    "a line": "https://93.184.215.14/\r\nHost: x",
    "a backslash": "https://93.184.215.14\\@127.0.0.1/",
    "no ASCII": "https://exämple.com/",
    "half a bracket": "https://[::1/",
    "a name that is none": "https://-.invalid/",
    "a name that is not found": "https://nobody.invalid/",
    "an empty label": "https://a..example/",
    "a label of 64": f"https://{'a' * 64}.example/",
    "D30 loopback": "https://127.0.0.1/",
    "D30 loopback by its name": "https://localhost/",
    "loopback short": "https://127.1/",
    "loopback as one number": "https://2130706433/",
    "loopback in hexadecimal": "https://0x7f000001/",
    "loopback in octal": "https://0177.0.0.1/",
    "IPv6 loopback": "https://[::1]/",
    "IPv4-mapped": "https://[::ffff:127.0.0.1]/",
    "metadata": "https://169.254.169.254/latest/meta-data/",
}


@pytest.mark.parametrize("url", WRONG.values(), ids=WRONG.keys())
async def test_a_url_that_nothing_would_be_delivered_to_is_refused(url):
    with pytest.raises(InvalidField) as refused:
        await Reach(private_addresses=False, plain_http=False).require(url)
    assert refused.value.param == "url"


async def test_a_url_that_leads_out_is_taken():
    reach = Reach(private_addresses=False, plain_http=False)
    await reach.require(f"https://{PUBLIC}:8443/hooks?token=x")
    await reach.require("https://[2606:4700:4700::1111]/" + "a" * (MAX_URL - 31))


async def test_the_operator_may_allow_http_and_addresses_of_the_own_network():
    with pytest.raises(InvalidField, match=r"begin with https://$"):
        await Reach(private_addresses=True, plain_http=False).require("http://127.0.0.1/")
    with pytest.raises(InvalidField, match="BONSAI_WEBHOOK_PRIVATE_ADDRESSES"):
        await Reach(private_addresses=False, plain_http=True).require("http://127.0.0.1/")
    await Reach(private_addresses=True, plain_http=True).require("http://127.0.0.1/")


class Changing(AbstractResolver):
    """Answers each question with the next of these."""

    def __init__(self, *answers: tuple[str, ...]) -> None:
        self.answers = list(answers)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return [
            ResolveResult(hostname=host, host=one, port=port, family=socket.AF_INET, proto=0, flags=0)
            for one in self.answers.pop(0)
        ]

    async def close(self) -> None:
        pass


async def test_a_name_with_one_private_address_among_its_own_is_refused():
    reach = Reach(private_addresses=False, plain_http=False, resolver=Changing((PUBLIC, "10.0.0.1")))
    with pytest.raises(InvalidField):
        await reach.require("https://two.example/")


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver().listening() as one:
        yield one


async def test_a_name_that_led_out_when_it_was_looked_at_and_leads_in_now_is_not_connected_to(receiver):
    """DNS rebinding: a listener on loopback that must stay silent."""
    port = receiver.url.rsplit(":")[-1].split("/")[0]
    url = f"http://rebinding.example:{port}/hooks"
    resolver = Changing((PUBLIC,), ("127.0.0.1",), ("127.0.0.1", "127.0.0.1"))
    reach = Reach(private_addresses=False, plain_http=True, resolver=resolver)
    await reach.require(url)
    async with open_sender(reach) as sender:
        for _ in range(2):
            assert await sender.post(url, b"{}", {}) == (None, "its address is not public")
    assert resolver.answers == []
    assert receiver.received == []


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost", "127.1", "2130706433"])
async def test_an_address_is_looked_at_however_the_connection_was_asked_for(receiver, host):
    """Also where no resolver is asked: an address in a URL that got past the first look."""
    port = receiver.url.rsplit(":")[-1].split("/")[0]
    async with open_sender(Reach(private_addresses=False, plain_http=True)) as sender:
        assert (await sender.post(f"http://{host}:{port}/", b"{}", {})).status is None
    assert receiver.received == []


async def test_the_resolver_asks_the_system_in_threads_of_its_own():
    resolver = Resolver()
    assert {one["host"] for one in await resolver.resolve("localhost", 80)} <= {"127.0.0.1", "::1"}
    await resolver.close()
