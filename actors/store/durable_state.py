"""State in Ray's key-value store: the cluster as it was asked for, and what controllers decided.

A controller claims a term by writing its key only if it is absent, so no two controllers ever have
the same term. A later term is higher, even if the store was lost, because a term is at least the
clock's seconds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from typing import Any

from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)

from ...cluster.expert_keys import ExpertKey
from ...cluster.planner.plan import OperatorConstraints
from ...cluster.spec.deployment import Deployment
from ...proto.errors import ClusterError
from ..runtime.ray_border import cluster_of
from .start_failures import forget_start_failures

_CLAIM, _DEPLOYMENT = "claim", "deployment"
_LATEST, _CONSTRAINTS, _FLEET, _ASLEEP = "latest-term", "constraints", "fleet", "asleep"
_HISTORY = "history"
_UPDATES = "updates-"  # and the term
# Parts that take something over when they start (`note_part`).
INGRESS_PART, SERVICE_PART = "ingress", "router-service"
_PART = "part-"  # and its name


def claim(namespace: str, start_s: float) -> None:
    """Claim the namespace for a cluster that starts. Raises ClusterError if another one does.

    A claim counts for ``start_s``: after that there is a controller, or its cluster has failed.
    """
    now = str(time.time())
    if not _internal_kv_put(_CLAIM, now, overwrite=False, namespace=namespace):
        return
    claimed = float(_internal_kv_get(_CLAIM, namespace=namespace) or 0.0)
    if time.time() - claimed < start_s:
        raise ClusterError(
            f"name: a cluster {cluster_of(namespace)!r} is starting on this Ray; `moesaic down "
            f"--name {cluster_of(namespace)}` ends it"
        )
    _internal_kv_put(_CLAIM, now, overwrite=True, namespace=namespace)


def store_deployment(namespace: str, deployment: Deployment) -> None:
    """Store what the cluster is to be, before its controller starts."""
    _internal_kv_put(_DEPLOYMENT, deployment.to_json(), overwrite=True, namespace=namespace)


def stored_deployment(namespace: str) -> Deployment | None:
    """Return what the cluster is to be; None: there is none. Raises ClusterError."""
    text = _internal_kv_get(_DEPLOYMENT, namespace=namespace)
    return Deployment.from_json(text) if text else None


def note_part(namespace: str, part: str, version: str | None) -> None:
    """Note with what a part of the cluster was started last (None: it is not there)."""
    if version is None:
        _internal_kv_del(f"{_PART}{part}", namespace=namespace)
    else:
        _internal_kv_put(f"{_PART}{part}", version, overwrite=True, namespace=namespace)


def noted_part(namespace: str, part: str) -> str | None:
    """Return with what a part of the cluster was started last; None: it is not there."""
    found = _internal_kv_get(f"{_PART}{part}", namespace=namespace)
    return found.decode() if found else None


def claim_term(namespace: str) -> int:
    """Claim a term that no other controller has or had."""
    latest = _internal_kv_get(_LATEST, namespace=namespace)
    term = max(int(latest or 0) + 1, int(time.time()))
    while _internal_kv_put(f"term-{term}", b"", overwrite=False, namespace=namespace):
        term += 1
    _internal_kv_put(_LATEST, str(term), overwrite=True, namespace=namespace)
    return term


def store_constraints(namespace: str, constraints: OperatorConstraints) -> None:
    """Store the operators' constraints for a restarted controller."""
    value = {
        "min_replicas": [[*key, count] for key, count in constraints.min_replicas.items()],
        "pins": [[*key, sorted(hosts)] for key, hosts in constraints.pins.items()],
        "leaving": sorted(constraints.leaving),
    }
    _internal_kv_put(_CONSTRAINTS, json.dumps(value), overwrite=True, namespace=namespace)


def stored_constraints(namespace: str) -> OperatorConstraints:
    text = _internal_kv_get(_CONSTRAINTS, namespace=namespace)
    if not text:
        return OperatorConstraints()
    value = json.loads(text)
    return OperatorConstraints(
        min_replicas={ExpertKey(m, la, e): count for m, la, e, count in value["min_replicas"]},
        pins={ExpertKey(m, la, e): frozenset(hosts) for m, la, e, hosts in value["pins"]},
        leaving=frozenset(value["leaving"]),
    )


def store_fleet(namespace: str, value: dict[str, Any]) -> None:
    """Store the result of `Fleet.snapshot` for a restarted controller."""
    _internal_kv_put(_FLEET, json.dumps(value), overwrite=True, namespace=namespace)


def stored_fleet(namespace: str) -> dict[str, Any] | None:
    text = _internal_kv_get(_FLEET, namespace=namespace)
    return json.loads(text) if text else None


def store_asleep(namespace: str, models: Collection[str]) -> None:
    """Store which models sleep, for a restarted controller."""
    _internal_kv_put(_ASLEEP, json.dumps(sorted(models)), overwrite=True, namespace=namespace)


def stored_asleep(namespace: str) -> frozenset[str]:
    text = _internal_kv_get(_ASLEEP, namespace=namespace)
    return frozenset(json.loads(text)) if text else frozenset()


def store_history(namespace: str, changes: list[dict[str, Any]]) -> None:
    """Store the result of `ChangeHistory.snapshot` for a restarted controller."""
    value = {"at": time.time(), "changes": changes}
    _internal_kv_put(_HISTORY, json.dumps(value), overwrite=True, namespace=namespace)


def stored_history(namespace: str) -> tuple[list[dict[str, Any]], float]:
    """Return what `store_history` has stored, and how many seconds ago."""
    text = _internal_kv_get(_HISTORY, namespace=namespace)
    if not text:
        return [], 0.0
    value = json.loads(text)
    return value["changes"], max(0.0, time.time() - value["at"])


def store_updates(namespace: str, term: int, value: dict[str, Any]) -> bool:
    """Store the result of `WeightUpdates.snapshot` for a later controller.

    Return False if a later one has claimed its term already, and may not know of this. Each term
    has a key of its own, so that a controller that was thought dead overwrites nothing.
    """
    key = f"{_UPDATES}{term}"
    _internal_kv_put(key, json.dumps(value), overwrite=True, namespace=namespace)
    # A later controller claims its term first and reads this key then, so one of both is seen.
    return int(_internal_kv_get(_LATEST, namespace=namespace) or 0) <= term


def stored_updates(namespace: str, term: int) -> dict[str, Any] | None:
    """Return what the last controller before ``term`` has stored."""
    keys = [bytes(key).decode() for key in _internal_kv_list(_UPDATES, namespace=namespace)]
    terms = [int(key.removeprefix(_UPDATES)) for key in keys]
    earlier = [one for one in terms if one < term]
    if not earlier:
        return None
    text = _internal_kv_get(f"{_UPDATES}{max(earlier)}", namespace=namespace)
    return json.loads(text) if text else None


def forget_last(namespace: str) -> None:
    """Delete what an earlier cluster of this name left and could not remove itself."""
    for key in (_DEPLOYMENT, _CONSTRAINTS, _FLEET, _ASLEEP, _HISTORY):
        _internal_kv_del(key, namespace=namespace)
    for prefix in (_UPDATES, _PART):
        _internal_kv_del(prefix, del_by_prefix=True, namespace=namespace)
    forget_start_failures(namespace)


def forget_all(namespace: str) -> None:
    """Delete all that the cluster stored, once it has ended."""
    _internal_kv_del("", del_by_prefix=True, namespace=namespace)
