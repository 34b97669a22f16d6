"""Bind the port that Ray Serve opens in each replica to the address of its node.

Serve opens it for calls between deployments that bypass Ray's actors, which ours never make. The
port asks for Ray's token, and then unpickles whatever it receives. It listens on all interfaces of
the machine, even where Ray itself stays on loopback. Ray has no option for that, so the one
function that opens the port is replaced in the replicas' processes.
"""

from __future__ import annotations

from typing import Any

import ray
from ray._common import network_utils
from ray.serve._private import replica

ANYWHERE = "[::]"


def stay_on_node() -> None:
    """Replace Serve's function in this process; call it before the replica is initialised."""
    serves: Any = replica
    opens = serves.add_port_to_grpc_server
    if getattr(opens, "at", None) is None:
        serves.add_port_to_grpc_server = _OnNode(opens, ray.util.get_node_ip_address())


class _OnNode:
    """Opens a gRPC server's port with ``opens``: at the address ``at``, not on all interfaces."""

    def __init__(self, opens: Any, at: str) -> None:
        self._opens = opens
        self.at = at

    def __call__(self, server: Any, address: str) -> int:
        host, _, port = address.rpartition(":")
        network: Any = network_utils
        if host == ANYWHERE:
            address = network.build_address(self.at, port)
        return self._opens(server, address)
