"""A cluster's secret and the key of its router service, in Ray's key-value store.

The cluster's processes get them only from there: anyone who can read the store controls the
cluster's actors anyway, and no argument, environment or report shows them.
"""

from __future__ import annotations

from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from ...proto.errors import ClusterError
from ...proto.keys import ClusterSecret
from ..runtime.ray_border import cluster_of

_SECRET, _ROUTER_KEY = "secret", "router-key"


def make_secret(namespace: str, router_key: str | None = None) -> ClusterSecret:
    """Make and store the secret of a new cluster, before any of its processes starts.

    ``router_key`` is the key of its router service (None: a key derived from the secret).
    """
    secret = ClusterSecret.new()
    _internal_kv_put(_SECRET, secret.reveal(), overwrite=True, namespace=namespace)
    # Always written, to replace the key of an earlier cluster of this name whose owner was killed.
    key = secret.router_key if router_key is None else router_key
    _internal_kv_put(_ROUTER_KEY, key.encode(), overwrite=True, namespace=namespace)
    return secret


def secret_of(namespace: str) -> ClusterSecret:
    """Return the secret of a running cluster. Raises ClusterError."""
    return ClusterSecret(_read(_SECRET, namespace))


def router_key_of(namespace: str) -> str:
    """Return the key that clients of its router service show. Raises ClusterError."""
    return _read(_ROUTER_KEY, namespace).decode()


def _read(key: str, namespace: str) -> bytes:
    value = _internal_kv_get(key, namespace=namespace)
    if not value:
        raise ClusterError(
            f"cluster {cluster_of(namespace)!r}: its secret is not in Ray's key-value store; the "
            "cluster has ended, or Ray has lost its stored values: start the cluster anew"
        )
    return value
