"""What a preflight finds of ports and addresses."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from moesaic.actors.preflight.preflight import preflight
from moesaic.actors.runtime.ports import check_port
from moesaic.proto.errors import ClusterError
from tests.helpers.models.preflight_specs import found, only, spec_of


def test_ports(whole: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        both = spec_of(whole, endpoint={"port": port}, router={"port": port})
        assert found(both) == [
            ("error", "endpoint.port"),
            ("error", "router.port"),
            ("error", "router.port"),
        ]
        messages = [one.message for one in preflight(both).findings]
        shared = spec_of(whole, endpoint={"port": port}, ray={"address": "auto"})
        assert found(shared) == [], "Serve may be who listens there"
    assert messages[0].startswith(f"127.0.0.1:{port} is not free (Address already in use)")
    assert messages[2].startswith(f"port {port} is also the endpoint's")
    assert found(both) == [("error", "router.port")]
    watched = spec_of(whole, monitoring={"port": port}, router={"port": port})
    assert found(watched) == [("error", "monitoring.port")]
    assert (
        preflight(watched)
        .findings[0]
        .message.startswith(f"port {port} is also the router service's")
    )
    unwatched = spec_of(whole, endpoint=None, monitoring={"port": port}, router={"port": port})
    assert found(unwatched) == [], "without an endpoint no process listens there"
    apart = {"endpoint": {"port": port}, "router": {"port": port, "host": "127.0.0.2"}}
    assert found(spec_of(whole, **apart)) == []


def test_an_address_of_another_machine(whole: Path) -> None:
    one = only(spec_of(whole, network={"bind": "203.0.113.1"}))
    assert (one.severity, one.path) == ("error", "network.bind")
    remote = spec_of(whole, network={"bind": "203.0.113.1"}, ray={"address": "auto"})
    assert found(remote) == [], "its hosts are elsewhere"


@pytest.mark.parametrize("part", ["endpoint", "router"])
def test_a_port_at_an_address_of_another_machine(part: str, whole: Path) -> None:
    one = only(spec_of(whole, **{part: {"host": "203.0.113.1", "port": 8123}}))
    assert (one.severity, one.path) == ("error", f"{part}.host")
    assert one.message.startswith("'203.0.113.1' is not an address of this machine")


def test_a_port_of_ip_version_6() -> None:
    with socket.socket(socket.AF_INET6) as taken:
        try:
            taken.bind(("::1", 0))
        except OSError:
            return  # a machine without it
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ClusterError, match="Address already in use"):
            check_port("endpoint", "::1", port)
    check_port("endpoint", "::1", port)
    with pytest.raises(ClusterError, match=r"host: 'no\.such\.invalid' cannot be resolved"):
        check_port("endpoint", "no.such.invalid", port)
