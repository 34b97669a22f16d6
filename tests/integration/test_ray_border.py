"""Joining a Ray that is not there."""

from __future__ import annotations

import socket

import pytest

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
