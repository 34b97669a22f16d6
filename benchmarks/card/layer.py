"""A layer call of several sizes: ours, transformers' grouped_mm, Liger's, and the floors."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.kernels.grouped.configurations import Configuration, configuration_for
from moesaic.kernels.grouped.ffn import TiledCall

from .floors import Floors
from .layers import Call, Layers
from .timing import eager_microseconds, graph_microseconds

SIZES = (1, 8, 64, 256, 1024, 4096, 16384)
_CALLS = 8


def check(layers: Layers, tokens: int, configuration: Configuration | None = None) -> float:
    """Return the relative error of a call against float64."""
    call = layers.calls(tokens, 1)[0]
    expected = layers.oracle(call)
    out = layers.ours(call, configuration=configuration)()
    return float((out.double() - expected).norm() / expected.norm())


def breakdown(
    layers: Layers, tokens: int, configuration: Configuration | None = None
) -> dict[str, float]:
    """Return the time of each of the four programs in a graph, in microseconds."""
    calls = layers.calls(tokens, _CALLS)
    shape = layers.shape
    config = configuration or configuration_for(tokens * shape.top_k, shape.experts, described=True)

    def tiled(call: Call) -> TiledCall:
        return TiledCall(layers.slots[call.layer], call.ids_TK, layers.flags, config)

    made = [tiled(call) for call in calls]
    act_NI = made[0].up(calls[0].x_TH)
    y_NH = made[0].down(act_NI)
    out_TH = torch.empty_like(calls[0].x_TH)
    both = list(zip(made, calls, strict=True))
    parts: dict[str, list[Callable[[], object]]] = {
        "align": [lambda c=c: tiled(c) for c in calls],
        "up": [lambda t=t, c=c: t.up(c.x_TH) for t, c in both],
        "down": [lambda t=t: t.down(act_NI) for t in made],
        "combine": [lambda t=t, c=c: t.combine(y_NH, c.weights_TK, out_TH) for t, c in both],
    }
    if tokens == 1:
        del parts["align"]  # there is none
    return {name: round(graph_microseconds(runs), 2) for name, runs in parts.items()}


def compare(
    layers: Layers,
    tokens: int,
    floors: Floors,
    configuration: Configuration | None,
    *,
    peers: Sequence[str] = (),
    rounds: int = 5,
) -> dict[str, Any]:
    """Time one size in alternating rounds; a peer that fails is named with its error."""
    calls = layers.calls(tokens, _CALLS if tokens < 8192 else 4)
    makers: dict[str, Callable[[Call], Callable[[], Tensor]]] = {
        "ours": lambda call: layers.ours(call, configuration=configuration)
    }
    makers |= {name: getattr(layers, name) for name in peers}
    ways = {"graph": graph_microseconds, "eager": eager_microseconds}
    times: dict[str, list[float]] = {}
    errors: dict[str, str] = {}
    for _ in range(rounds):
        for name, make in makers.items():
            for way, measure in ways.items():
                key = f"{name} {way}"
                if key in errors:
                    continue
                try:
                    taken = measure([make(call) for call in calls], rounds=3)
                except Exception as error:  # a peer that cannot be captured, or is not there
                    errors[key] = f"{type(error).__name__}: {str(error)[:200]}"
                    torch.cuda.synchronize()
                    continue
                times.setdefault(key, []).append(taken)
    medians = {name: statistics.median(found) for name, found in times.items()}
    read_bytes = statistics.mean(c.experts_used for c in calls) * layers.shape.expert_bytes
    return {
        "tokens": tokens,
        "us": {name: round(us, 2) for name, us in medians.items()},
        "errors": errors,
        **_figures(medians, read_bytes, layers.shape.flop(tokens), floors),
    }


def _figures(
    us: Mapping[str, float], read_bytes: float, flop: int, floors: Floors
) -> dict[str, float]:
    ours = us["ours graph"]
    found = {
        "of_read_floor": ours / (read_bytes / floors.read_tb_s / 1e6),
        "of_read_bandwidth": read_bytes / ours / 1e6 / floors.read_tb_s,
        "of_matmul": flop / ours / 1e6 / floors.matmul_tflop_s,
    }
    for peer in ("grouped_mm", "liger"):
        best = min((us[k] for k in (f"{peer} graph", f"{peer} eager") if k in us), default=None)
        if best is not None:
            found[f"times_{peer}"] = best / ours
        if f"{peer} eager" in us:
            found[f"eager_times_{peer}"] = us[f"{peer} eager"] / us["ours eager"]
    return {name: round(value, 3) for name, value in found.items()}
