"""Terms of controllers, what operators asked for, which hosts there are and which models sleep, in
Ray's key-value store.

A term is claimed by putting its key if it is absent, so that no two controllers ever have the
same; a later one is higher, even where the store was lost, because it is no lower than the clock.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from typing import Any

from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_put,
)

from ...cluster.placement import ExpertKey
from ...cluster.planner.plan import Wishes
from .start_failures import forget_start_failures

_LATEST, _WISHES, _FLEET, _ASLEEP = "latest-term", "wishes", "fleet", "asleep"


def claim_term(namespace: str) -> int:
    """A term that nobody else has or had."""
    latest = _internal_kv_get(_LATEST, namespace=namespace)
    term = max(int(latest or 0) + 1, int(time.time()))
    while _internal_kv_put(f"term-{term}", b"", overwrite=False, namespace=namespace):
        term += 1
    _internal_kv_put(_LATEST, str(term), overwrite=True, namespace=namespace)
    return term


def keep_wishes(namespace: str, wishes: Wishes) -> None:
    """For a controller that starts anew."""
    value = {
        "least": [[*key, count] for key, count in wishes.least.items()],
        "pins": [[*key, sorted(hosts)] for key, hosts in wishes.pins.items()],
        "leaving": sorted(wishes.leaving),
    }
    _internal_kv_put(_WISHES, json.dumps(value), overwrite=True, namespace=namespace)


def kept_wishes(namespace: str) -> Wishes:
    text = _internal_kv_get(_WISHES, namespace=namespace)
    if not text:
        return Wishes()
    value = json.loads(text)
    return Wishes(
        least={ExpertKey(m, la, e): count for m, la, e, count in value["least"]},
        pins={ExpertKey(m, la, e): frozenset(hosts) for m, la, e, hosts in value["pins"]},
        leaving=frozenset(value["leaving"]),
    )


def keep_fleet(namespace: str, value: dict[str, Any]) -> None:
    """`Fleet.keep`, for a controller that starts anew."""
    _internal_kv_put(_FLEET, json.dumps(value), overwrite=True, namespace=namespace)


def kept_fleet(namespace: str) -> dict[str, Any] | None:
    text = _internal_kv_get(_FLEET, namespace=namespace)
    return json.loads(text) if text else None


def keep_asleep(namespace: str, models: Collection[str]) -> None:
    """The models that nobody asks for."""
    _internal_kv_put(_ASLEEP, json.dumps(sorted(models)), overwrite=True, namespace=namespace)


def kept_asleep(namespace: str) -> frozenset[str]:
    text = _internal_kv_get(_ASLEEP, namespace=namespace)
    return frozenset(json.loads(text)) if text else frozenset()


def forget_last(namespace: str) -> None:
    """What a cluster of the same name left whose owner was killed."""
    for key in (_WISHES, _FLEET, _ASLEEP):
        _internal_kv_del(key, namespace=namespace)
    forget_start_failures(namespace)


def forget_all(namespace: str) -> None:
    """The cluster has ended."""
    _internal_kv_del("", del_by_prefix=True, namespace=namespace)
