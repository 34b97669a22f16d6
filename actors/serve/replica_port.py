"""The port that Ray Serve opens in each of its replicas: at the address of its node alone.

Serve opens it for calls between deployments that go past Ray's actors, which ours do not. It asks
for Ray's token and then unpickles what it is sent; and it listens on all interfaces of the machine,
also where Ray itself stays on loopback. Ray has no option for that, so the one function that opens
it is replaced in the replicas' processes.
"""

from __future__ import annotations

from typing import Any

import ray
from ray._common import network_utils
from ray.serve._private import replica

ANYWHERE = "[::]"


def stay_on_node() -> None:
    """To be called in a replica before it is initialised."""
    serves: Any = replica
    opens = serves.add_port_to_grpc_server
    if getattr(opens, "at", None) is None:
        serves.add_port_to_grpc_server = _OnNode(opens, ray.util.get_node_ip_address())


class _OnNode:
    """``opens`` a port of a gRPC server, at one address in place of all."""

    def __init__(self, opens: Any, at: str) -> None:
        self._opens = opens
        self.at = at

    def __call__(self, server: Any, address: str) -> int:
        host, _, port = address.rpartition(":")
        network: Any = network_utils
        if host == ANYWHERE:
            address = network.build_address(self.at, port)
        return self._opens(server, address)
