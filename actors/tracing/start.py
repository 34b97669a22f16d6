"""A cluster's settings of traces in Ray's key-value store, where its processes read them."""

from __future__ import annotations

import json
from dataclasses import asdict

from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from ...cluster.tracing.settings import TraceSettings
from .process_tracer import begin_tracing

_TRACES = "traces"


def store_traces(namespace: str, settings: TraceSettings | None) -> None:
    """Store the settings for processes that start from now on; None: they trace nothing."""
    # Always written, to replace those of an earlier cluster of this name.
    value = json.dumps(None if settings is None else asdict(settings))
    _internal_kv_put(_TRACES, value, overwrite=True, namespace=namespace)


def trace_if_wanted(namespace: str, kind: str, process: str, cluster: str) -> None:
    """Begin tracing in this process of a cluster, if its settings say so. Raises SpecError."""
    text = _internal_kv_get(_TRACES, namespace=namespace)
    values = json.loads(text) if text else None
    if values is not None:
        begin_tracing(TraceSettings(**values), kind, process, cluster)
