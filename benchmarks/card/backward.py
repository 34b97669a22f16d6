"""Both halves of a layer call that is learned from: ours, and autograd through grouped_mm.

    python -m benchmarks.card.backward [--device cpu --tokens 16] [--json PATH]

Ours adds the gradients of the experts to sums in float32, as hosts do; transformers' experts have
theirs in bfloat16. On a CPU ours run in Triton's interpreter, to show that all of it works.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import write_json
from moesaic.kernels.grouped.backward import SlotGradients, grouped_backward
from moesaic.kernels.grouped.ffn import grouped_ffn

from .layers import Call, Layers, Shape

TOKENS = (4096, 16384)
SMALL = Shape(experts=4, top_k=2, hidden=32, intermediate=32, layers=1)
Halves = dict[str, Callable[[], object]]


class Ours:
    def __init__(self, layers: Layers, call: Call) -> None:
        self._call, self._flags = call, layers.flags
        self._slots = layers.slots[call.layer]
        self._sum_TH = torch.empty_like(call.x_TH, dtype=torch.float32)
        self.grad_x_TH = torch.empty_like(self._sum_TH)
        self._grad_weights_TK = torch.empty_like(call.weights_TK)
        self._grad_y_TH = grad_of(call).float()
        # Of all layers' slots, as these lie in one tensor.
        self.sums = SlotGradients.zeros(self._slots)

    def forward(self) -> None:
        call = self._call
        grouped_ffn(self._slots, call.x_TH, call.ids_TK, call.weights_TK, self._sum_TH, self._flags)

    def backward(self) -> None:
        self._backward().accumulate(self.sums)

    def rows(self) -> None:
        """The part that a trunk waits for."""
        self._backward()

    def _backward(self) -> Any:
        call = self._call
        return grouped_backward(
            self._slots,
            call.x_TH,
            call.ids_TK,
            call.weights_TK,
            self._grad_y_TH,
            self.grad_x_TH,
            self._grad_weights_TK,
            self._flags,
        )


class GroupedMm:
    def __init__(self, layers: Layers, call: Call) -> None:
        self._module = layers.module(call.layer, learns=True)
        self._x_TH = call.x_TH.detach().clone().requires_grad_()
        self._weights_TK = call.weights_TK.bfloat16().requires_grad_()
        self._ids_TK, self._grad_y_TH = call.ids_TK.long(), grad_of(call)
        self._y_TH: Tensor | None = None

    def forward(self) -> None:
        self._y_TH = self._module(self._x_TH, self._ids_TK, self._weights_TK)

    def both(self) -> None:
        self.forward()
        assert self._y_TH is not None
        self._y_TH.backward(self._grad_y_TH)


def grad_of(call: Call) -> Tensor:
    generator = torch.Generator(call.x_TH.device).manual_seed(1)
    return torch.randn(
        call.x_TH.shape, generator=generator, device=call.x_TH.device, dtype=torch.float32
    ).bfloat16()


def check(layers: Layers, tokens: int) -> dict[str, float]:
    """Return the relative errors of the gradients of x and of the experts against float64."""
    (call,) = layers.calls(tokens, 1)
    ours = Ours(layers, call)
    ours.backward()
    up, down = (one.double().requires_grad_() for one in layers.weights(call.layer))
    x_TH = call.x_TH.double().requires_grad_()
    y_TH = torch.zeros_like(x_TH)
    for expert in torch.unique(call.ids_TK).tolist():
        token, k = (call.ids_TK == expert).nonzero(as_tuple=True)
        gate, value = (x_TH[token] @ up[expert].t()).chunk(2, dim=1)
        y = (torch.nn.functional.silu(gate) * value) @ down[expert].t()
        y_TH = y_TH.index_add(0, token, y * call.weights_TK[token, k].double()[:, None])
    y_TH.backward(grad_of(call).double())
    first = call.layer * layers.shape.experts
    own = slice(first, first + layers.shape.experts)
    found = {
        "x": ours.grad_x_TH,
        "up": ours.sums.sums["up"][own],
        "down": ours.sums.sums["down"][own],
    }
    errors = {}
    for name, leaf in {"x": x_TH, "up": up, "down": down}.items():
        assert leaf.grad is not None
        errors[name] = float((found[name].double() - leaf.grad).norm() / leaf.grad.norm())
    return errors


def compare(layers: Layers, tokens: int, *, rounds: int = 7) -> dict[str, Any]:
    """Time both halves of one size in alternating rounds, launched one by one."""
    (call,) = layers.calls(tokens, 1)
    ours, peer = Ours(layers, call), GroupedMm(layers, call)

    def both() -> None:
        ours.forward()
        ours.backward()

    ways: Halves = {
        "ours forward": ours.forward,
        "ours rows": ours.rows,
        "ours backward": ours.backward,
        "ours both": both,
        "grouped_mm forward": peer.forward,
        "grouped_mm both": peer.both,
    }
    for way in ways.values():  # the first run compiles
        way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(timed_us(way, call.x_TH.device.type))
    us = {name: round(statistics.median(taken), 1) for name, taken in times.items()}
    ratio = round(us["grouped_mm both"] / us["ours both"], 3)
    # Backward takes twice the products of forward, and the up-projection once more.
    flop = layers.shape.flop(tokens) * (3 + 2 / 3)
    tflop_s = round(flop / us["ours both"] / 1e6, 1)
    return {"tokens": tokens, "us": us, "times_grouped_mm": ratio, "tflop_s": tflop_s}


def timed_us(run: Callable[[], object], device: str) -> float:
    _wait(device)
    began = time.perf_counter()
    run()
    _wait(device)
    return (time.perf_counter() - began) * 1e6


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    layers = Layers(SMALL if arguments.device == "cpu" else Shape(layers=1), arguments.device)
    found: dict[str, Any] = {"errors": check(layers, min(64, *arguments.tokens))}
    print(found["errors"], flush=True)
    for tokens in arguments.tokens:
        found[str(tokens)] = one = compare(layers, tokens)
        print(one, flush=True)
    write_json(arguments.json, found)


if __name__ == "__main__":
    main()
