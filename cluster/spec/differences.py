"""What differs between the spec that a cluster runs with and another one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ...proto.errors import SpecError
from ..reports.applying import SpecDifference
from .spec import Spec

# Keys that no running cluster can change, each with the reason.
_FIXED = {
    "name": "a cluster is found by it",
    "ray": "all processes run on that Ray",
    "network": "all hosts and trunks would have to be others at once",
    "traces": "every process reads it when it starts",
    "endpoint.host": "Ray Serve listens there for all its applications",
    "endpoint.port": "Ray Serve listens there for all its applications",
}


def differences(before: Spec, after: Spec) -> list[SpecDifference]:
    """Return every key that differs, with both values, in the order of the spec.

    Models are matched by their names, and host groups by their places. A model or a group that is
    new or gone is one difference.
    """
    return list(_between("", _plain(before), _plain(after)))


def check_changeable(before: Spec, after: Spec) -> None:
    """Raise SpecError that lists all differences that a running cluster cannot follow."""
    found = [one.path for one in differences(before, after)]
    wrong = [
        f"{path}: {why}"
        for path in found
        for key, why in _FIXED.items()
        if path == key or path.startswith(f"{key}.")
    ]
    if (before.endpoint is None) != (after.endpoint is None):
        wrong.append("endpoint: a cluster has one from its start, or never")
    for spec in (before, after):
        for place, group in enumerate(spec.hosts):
            changed = any(f"{path}.".startswith(f"hosts.{place}.") for path in found)
            if changed and group.placement_group != "none":
                wrong.append(f"hosts.{place}: a placement group of Ray keeps its size and place")
    if wrong:
        raise SpecError(
            "a running cluster cannot change this; keep the values, or end the cluster and start "
            "it again:\n  " + "\n  ".join(dict.fromkeys(wrong))
        )


def _between(path: str, before: Any, after: Any) -> Iterator[SpecDifference]:
    if before == after:
        return
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            inner = f"{path}.{key}" if path else str(key)
            yield from _between(inner, before.get(key, _ABSENT), after.get(key, _ABSENT))
        return
    yield SpecDifference(path=path, before=_text(before), after=_text(after))


_ABSENT = object()


def _text(value: Any) -> str | None:
    return None if value is _ABSENT else json.dumps(value)


def _plain(spec: Spec) -> dict[str, Any]:
    """Return a spec as JSON values, with models by name and groups by place."""
    values = spec.model_dump(mode="json")
    values["models"] = {model["name"]: model for model in values["models"]}
    values["hosts"] = {str(place): group for place, group in enumerate(values["hosts"])}
    return values
