"""Ray as this project uses it: joining one that is not there, and hosts as its actors."""

from __future__ import annotations

import socket

import pytest

from moesaic.actors.host import ExpertHost
from moesaic.actors.host_process import RayExpertHost
from moesaic.actors.ray_border import join_ray, start_ray
from moesaic.cluster.spec import parse_spec
from moesaic.proto.errors import ClusterError


@pytest.mark.timeout(30)
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
def test_a_ray_that_is_gone_is_named_at_once(host: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"{host}:{taken.getsockname()[1]}"
        with pytest.raises(ClusterError, match="no Ray answers there"):
            join_ray(address, "local")
        spec = parse_spec({"models": [{"name": "m", "path": "p"}], "ray": {"address": address}})
        with pytest.raises(ClusterError, match="no Ray answers there"):
            start_ray(spec)


def test_ray_offers_what_a_host_does() -> None:
    def public(cls: type) -> set[str]:
        return {name for name in vars(cls) if not name.startswith("_")}

    # Its report looks after its health, and Ray ends it.
    assert public(RayExpertHost) == public(ExpertHost) - {"check_health", "close"}
