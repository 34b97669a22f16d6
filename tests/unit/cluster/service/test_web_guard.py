"""Which Host and Origin headers are let in: spelled out, and as hypothesis makes them."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.cluster.service.web_guard import (
    WebGuard,
    check_same_site,
    host_of,
    is_host,
    is_loopback,
)
from moesaic.cluster.spec.spec import parse_spec
from moesaic.proto.errors import Forbidden, SpecError

HERE = WebGuard.of("127.0.0.1")
NAMED = WebGuard.of(
    "::1", allowed_hosts=["Api.example", "10.0.0.5", "fd00:0::1"], origins=["https://chat.example"]
)
EVERYWHERE = WebGuard.of("0.0.0.0")
PROXIED = WebGuard.of("0.0.0.0", allowed_hosts=["api.example"], own=["10.0.0.1"])

LOOPBACK = ("localhost", "LocalHost", "127.0.0.1", "127.8.9.10", "[::1]", "[0:0::1]")
FOREIGN = (
    "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil.example#localhost",
    "localhost@evil.example", "evil.example:80@localhost", "", " ", "localhost ", "localhost,evil",
    "localhost.", "127.1", "0x7f.0.0.1", "2130706433", "127.0.0.01", "0.0.0.0", "[::]", "::1",
    "[::ffff:10.0.0.1]", "10.0.0.1", "localhost:", "localhost:x", "localhost:1:2", "[::1", "[::1]x",
    "[::1%25eth0]", "lоcalhost", "localhost\x00", "localhost/", "http://localhost", "١27.0.0.1",
)  # fmt: skip


def passes(guard: WebGuard, *hosts: str, origins: tuple[str, ...] = ()) -> bool:
    try:
        guard.check(hosts, origins)
    except Forbidden:
        return False
    return True


@pytest.mark.parametrize("name", LOOPBACK)
@pytest.mark.parametrize("port", ["", ":80", ":8000", ":65535"])
def test_loopbacks_names_pass_with_any_port(name: str, port: str) -> None:
    for guard in (HERE, NAMED, EVERYWHERE, PROXIED):
        assert passes(guard, name + port)
        assert passes(guard, name + port, origins=(f"http://{name}:3000",))


@pytest.mark.parametrize("host", FOREIGN)
def test_others_do_not(host: str) -> None:
    assert not passes(HERE, host)
    assert not passes(NAMED, host)
    assert passes(EVERYWHERE, host), "there is no rule where it is for everybody"


def test_there_is_one_host() -> None:
    assert not passes(HERE)
    assert not passes(HERE, "localhost", "localhost")
    assert not passes(HERE, "evil.example", "localhost")


def test_allowed_hosts() -> None:
    for host in ("api.example", "API.example:443", "10.0.0.5:8000", "[fd00::1]:8000"):
        assert passes(NAMED, host)
    assert not passes(NAMED, "www.api.example")
    for host in ("api.example", "10.0.0.1:8000", "localhost:8000"):
        assert passes(PROXIED, host)
    assert not passes(PROXIED, "evil.example")
    assert not passes(WebGuard.of("127.0.0.1", own=["10.0.0.1"]), "10.0.0.1")
    assert passes(WebGuard.of("127.0.0.1", allowed_hosts=["*"]), "anything.example")


@pytest.mark.parametrize(
    "origin",
    [
        "null", "https://evil.example", "http://localhost.evil.example", "file://", "",
        "http://chat.example", "https://chat.example:8443", "https://chat.example.evil.example",
        "chrome-extension://localhost", "http://localhost@evil.example", "http://[::1", "localhost",
    ],
)  # fmt: skip
def test_pages_of_other_sites_do_not_ask(origin: str) -> None:
    assert not passes(NAMED, "localhost:8000", origins=(origin,))
    assert passes(EVERYWHERE, "localhost:8000", origins=(origin,))
    assert passes(WebGuard.of("localhost", origins=["*"]), "localhost", origins=(origin,))


def test_pages_that_are_named_and_those_of_the_same_site_do() -> None:
    assert passes(NAMED, "localhost:8000", origins=("https://chat.example",))
    assert passes(NAMED, "api.example", origins=("https://api.example",))
    assert passes(NAMED, "localhost:8000", origins=("http://localhost:3000",))
    assert not passes(NAMED, "localhost", origins=("https://api.example",))
    assert not passes(NAMED, "localhost", origins=("https://chat.example", "https://evil.example"))


@given(st.text())
def test_whatever_a_host_is_it_is_judged(host: str) -> None:
    name = host_of(host)
    assert passes(HERE, host) == (name is not None and is_loopback(name))
    if name is not None:
        assert is_host(name) or ":" in name
        assert host_of(f"[{name}]" if ":" in name else name) == name


@given(st.ip_addresses(), st.none() | st.integers(1, 65_535))
def test_addresses(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int | None
) -> None:
    text = f"[{address}]" if address.version == 6 else str(address)
    host = text if port is None else f"{text}:{port}"
    assert host_of(host) == str(address)
    assert passes(HERE, host) == address.is_loopback
    assert passes(WebGuard.of("127.0.0.1", allowed_hosts=[str(address)]), host)
    assert passes(HERE, "localhost", origins=(f"http://{host}",)) == address.is_loopback


LABEL = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)


@given(st.lists(LABEL, min_size=1, max_size=4).map(".".join), st.sampled_from(LOOPBACK))
def test_no_name_becomes_loopback_by_what_is_around_it(name: str, inner: str) -> None:
    plain = inner.strip("[]")
    for host in (f"{plain}.{name}x", f"{name}@{plain}", f"{name}#{inner}", f"{inner}{name}x"):
        assert not passes(HERE, host)
        assert not passes(HERE, "localhost", origins=(f"http://{host}",))


@pytest.mark.parametrize("bad", ["a:80", "[::1]:80", "http://x", "a b", "", "*.x", "a/"])
def test_allowed_hosts_in_the_spec_have_no_ports(bad: str) -> None:
    with pytest.raises(
        SpecError, match=r"endpoint\.allowed_hosts\.0: expected a name or an address"
    ):
        parse_spec({"endpoint": {"allowed_hosts": [bad]}})
    endpoint = parse_spec({"endpoint": {"allowed_hosts": ["a.b", "::1", "[fd00::1]"]}}).endpoint
    assert endpoint is not None
    with pytest.raises(SpecError, match="remove the others"):
        parse_spec({"endpoint": {"allowed_hosts": ["*", "a"]}})


# ---- what changes something comes from the server's own page -------------------------------------


@pytest.mark.parametrize(
    ("hosts", "origins", "fetched"),
    [
        (["127.0.0.1:8002"], [], []),  # no browser
        (["127.0.0.1:8002"], ["http://127.0.0.1:8002"], ["same-origin"]),
        (["Ops.example"], ["https://ops.example"], ["same-origin"]),  # behind a proxy with TLS
        (["127.0.0.1:8002"], [], ["none"]),
    ],
)
def test_the_own_page_may_act(hosts: list[str], origins: list[str], fetched: list[str]) -> None:
    check_same_site(hosts, origins, fetched)


@pytest.mark.parametrize(
    ("hosts", "origins", "fetched"),
    [
        (["127.0.0.1:8002"], ["http://127.0.0.1:8000"], []),  # the endpoint's port is another page
        (["127.0.0.1:8002"], ["http://localhost:8002"], []),
        (["127.0.0.1:8002"], ["https://evil.example"], []),
        (["127.0.0.1:8002"], ["null"], []),
        (["127.0.0.1:8002"], ["http://127.0.0.1:8002", "http://127.0.0.1:8002"], []),
        ([], ["http://"], []),
        (["127.0.0.1:8002"], [], ["cross-site"]),
        (["127.0.0.1:8002"], ["http://127.0.0.1:8002"], ["same-site"]),
        (["127.0.0.1:8002"], [], ["same-origin", "cross-site"]),
    ],
)
def test_other_pages_may_not_act(hosts: list[str], origins: list[str], fetched: list[str]) -> None:
    with pytest.raises(Forbidden, match="is another page"):
        check_same_site(hosts, origins, fetched)
