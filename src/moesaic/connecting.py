"""`moesaic.connect`, to a cluster by its name or to a router service by its address."""

from __future__ import annotations

from typing import Any


def connect(target: str = "local") -> Any:
    """Return a `Cluster` for a cluster's name, or a `RouterClient` for moesaic://host:port.

    The cluster is one that another process of this user owns on this machine. The router service's
    key is in the session file of a cluster on this machine; for one elsewhere it is
    MOESAIC_ROUTER_KEY of the environment. Raises ClusterError, RequestError for a malformed
    address, and Unauthenticated without a key.
    """
    if "://" in target:
        from .clients.router_client import RouterClient

        return RouterClient(target)
    from .handle import connect as connect_by_name

    return connect_by_name(target)
