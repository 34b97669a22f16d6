"""Items as server-sent events.

An event is `snapshot` (all items), `delta` (what has changed since the revision `from`), `beat`
(nothing has changed for a while) or `end` (the server ends). Data are JSON. An array of unsigned
integers is an object with one key, its type, and the little-endian bytes in base64:
`{"u2": "AQAC"}`.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np

from .items import ItemChanges

_TYPES = {1: "u1", 2: "u2", 4: "u4"}

BEAT = b"event: beat\ndata: {}\n\n"
END = b"event: end\ndata: {}\n\n"


def event_of(changes: ItemChanges) -> bytes:
    """Return the event that carries ``changes``."""
    data: dict[str, Any] = {"to": list(changes.revision), "items": changes.values}
    kind = "snapshot"
    if changes.since is not None:
        kind = "delta"
        data |= {"from": list(changes.since), "removed": list(changes.removed)}
    # JSON has no line ends of its own, so the data are one line.
    text = json.dumps(data, default=_array, separators=(",", ":"), allow_nan=False)
    return f"event: {kind}\ndata: {text}\n\n".encode()


def _array(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind == "u" and value.itemsize in _TYPES:
        little = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<"))
        return {_TYPES[value.itemsize]: base64.b64encode(little.tobytes()).decode()}
    raise TypeError(f"an item has no {type(value).__name__} in it")


def decoded(value: Any) -> Any:
    """Return a value of an event's JSON, with its arrays."""
    if isinstance(value, dict):
        if len(value) == 1:
            (name,) = value
            if name in _TYPES.values():
                return np.frombuffer(base64.b64decode(value[name]), dtype=f"<{name}")
        return {name: decoded(one) for name, one in value.items()}
    return [decoded(one) for one in value] if isinstance(value, list) else value
