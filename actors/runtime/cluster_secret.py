"""A cluster's secret and the key of its router service, in Ray's key-value store.

That is their one way to the cluster's processes: whoever may read the store commands the cluster's
actors anyhow, and they show in no argument, environment or report.
"""

from __future__ import annotations

from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from ...proto.errors import ClusterError
from ...proto.keys import ClusterSecret
from .ray_border import cluster_of

_SECRET, _ROUTER_KEY = "secret", "router-key"


def make_secret(namespace: str, router_key: str | None = None) -> ClusterSecret:
    """A new secret for a cluster that begins, before any of its processes does. ``router_key``
    opens its router service; None: a key that is derived from the secret."""
    secret = ClusterSecret.new()
    _internal_kv_put(_SECRET, secret.reveal(), overwrite=True, namespace=namespace)
    # Always written, so that nothing is left of a cluster of the same name whose owner was killed.
    key = secret.router_key if router_key is None else router_key
    _internal_kv_put(_ROUTER_KEY, key.encode(), overwrite=True, namespace=namespace)
    return secret


def secret_of(namespace: str) -> ClusterSecret:
    """The secret of a running cluster. Raises ClusterError."""
    return ClusterSecret(_read(_SECRET, namespace))


def router_key_of(namespace: str) -> str:
    """What clients of its router service show. Raises ClusterError."""
    return _read(_ROUTER_KEY, namespace).decode()


def _read(key: str, namespace: str) -> bytes:
    value = _internal_kv_get(key, namespace=namespace)
    if not value:
        raise ClusterError(
            f"cluster {cluster_of(namespace)!r}: its secret is not in Ray's key-value store; it "
            "has ended, or Ray has lost what it had stored: start the cluster anew"
        )
    return value
