"""`moesaic.connect`: to a cluster by its name, to a router service by its address."""

from __future__ import annotations

from typing import Any


def connect(target: str = "local") -> Any:
    """A `Cluster`, for the name of one that another process of this user owns on this machine; a
    `RouterClient`, for an address moesaic://host:port.

    The latter's key is in the session file of a cluster on this machine; for one elsewhere it is
    MOESAIC_ROUTER_KEY of the environment. Raises ClusterError and, for an address that is none,
    RequestError; without a key Unauthenticated.
    """
    if "://" in target:
        from .router_client import RouterClient

        return RouterClient(target)
    from .handle import connect as connect_by_name

    return connect_by_name(target)
