"""Traces of recorded load, which are taken from a running pool, written to files and read again.

A trace is one safetensors file: `counts/<model>/<layer>` (W, E) int64, `assignments` (W, H) int64,
`busy_s` and `queued_s` (W, H) float64, and in its metadata `moesaic_trace` (the format's version),
`window_s` and `hosts`, a JSON list.

Shapes: W windows, E experts of a layer, H hosts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .cluster.expert_keys import LayerKey
from .cluster.load.trace import LoadTotals, Trace, TraceRecorder
from .private_files import replace_file
from .proto.errors import CheckpointError, ClusterError, RequestError

_VERSION = "1"
_HOSTS = {"choices": np.int64, "busy_s": np.float64, "queued_s": np.float64}
# Routers report once a second; most shorter windows would have no report.
MIN_WINDOW_S = 1.0
# A recording ends when the controller has been away for this long.
_PATIENCE_S = 120.0

# (name of the step, done, total)
Progress = Callable[[str, int, int], None]


def write_trace(path: str | Path, trace: Trace) -> None:
    """Write ``trace``, and replace an existing file atomically. Raises CheckpointError."""
    file = Path(path)
    tensors = {f"counts/{key.model}/{key.layer}": found for key, found in trace.counts.items()}
    tensors |= {
        "choices": trace.assignments_WH,
        "busy_s": trace.busy_s_WH,
        "queued_s": trace.queued_s_WH,
    }
    metadata = {
        "moesaic_trace": _VERSION,
        "window_s": repr(trace.window_s),
        "hosts": json.dumps(trace.hosts),
    }
    data = save({n: np.ascontiguousarray(t) for n, t in tensors.items()}, metadata)
    try:
        replace_file(file, data)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be written: {error.strerror}") from error


def read_trace(path: str | Path) -> Trace:
    """Read the trace in a file.

    Raises CheckpointError if it is truncated, inconsistent, or not a trace.
    """
    file = Path(path)
    try:
        with safe_open(file, framework="np") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("moesaic_trace") != _VERSION:
                raise CheckpointError(f"{file}: {_why_not_a_trace(metadata)}")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return _parse(metadata, tensors)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: there is no such file") from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file}: not a trace, or a damaged one: {error}; copy the file again, or make it anew "
            "with `moesaic record`"
        ) from error


def _why_not_a_trace(metadata: dict[str, str]) -> str:
    again = "make the file anew with `moesaic record`"
    version = metadata.get("moesaic_trace")
    if version is None:
        return f"not a trace: its metadata lack the key moesaic_trace; {again}"
    return f"this is a trace of format {version!r}, and this Moesaic reads {_VERSION!r}; {again}"


def _parse(metadata: dict[str, str], tensors: dict[str, np.ndarray]) -> Trace:
    """Make a trace of a file's contents. Raises ValueError, KeyError and TypeError."""
    hosts = json.loads(metadata["hosts"])
    if not isinstance(hosts, list) or not all(isinstance(host, str) for host in hosts):
        raise ValueError(f"hosts: {hosts!r} is not a list of names")
    windows = len(np.atleast_1d(tensors["choices"]))
    for name, dtype in _HOSTS.items():
        _check(name, tensors[name], (windows, len(hosts)), dtype)
    counts = {}
    for name in sorted(tensors.keys() - _HOSTS):
        kind, _, rest = name.partition("/")
        model, _, layer = rest.rpartition("/")
        if kind != "counts" or not model or not layer.isdecimal():
            raise ValueError(f"{name}: this tensor does not belong in a trace")
        _check(name, tensors[name], (windows, tensors[name].shape[-1]), np.int64)
        counts[LayerKey(model, int(layer))] = tensors[name]
    return Trace(
        window_s=float(metadata["window_s"]),
        counts=dict(sorted(counts.items())),
        hosts=tuple(hosts),
        assignments_WH=tensors["choices"],
        busy_s_WH=tensors["busy_s"],
        queued_s_WH=tensors["queued_s"],
    )


def _check(name: str, found: np.ndarray, shape: tuple[int, int], dtype: type) -> None:
    if found.shape != shape or found.dtype != dtype:
        raise ValueError(
            f"{name}: the tensor is {found.dtype} {found.shape}, but must be "
            f"{dtype.__name__} {shape}"
        )
    if not (np.isfinite(found).all() and (found >= 0).all()):
        raise ValueError(f"{name}: the tensor has numbers that are below zero or not finite")


def record(
    read: Callable[[], LoadTotals],
    seconds: float,
    window_s: float,
    *,
    stop: Event,
    progress: Progress,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], object] | None = None,
) -> Trace:
    """Record the load of the next ``seconds``, or until ``stop`` is set, in whole windows.

    ``read`` returns the controller's totals. It raises ClusterError while the controller restarts;
    windows go on then, and the load in the next totals is divided among them. A controller that
    stays away ends the recording early. Raises RequestError, and ClusterError if the controller was
    never there.
    """
    if not MIN_WINDOW_S <= window_s <= seconds < float("inf"):
        raise RequestError(
            f"window_s, seconds: {window_s:g}, {seconds:g}; routers report every second, so "
            f"{MIN_WINDOW_S:g} <= window_s <= seconds must hold",
            param="window_s",
        )
    wait = wait or stop.wait
    total = int(seconds / window_s + 1e-9)
    recorder = TraceRecorder(window_s, read())
    began, taken = clock(), 0
    for window in range(1, total + 1):
        progress("recording", window - 1, total)
        while (left_s := began + window * window_s - clock()) > 0 and not stop.is_set():
            wait(left_s)
        if stop.is_set() or (window - taken) * window_s > _PATIENCE_S:
            break
        try:
            totals = read()
        except ClusterError:
            continue
        recorder.add(totals, window - taken)
        taken = window
    progress("recording", taken, total)
    return recorder.trace()
