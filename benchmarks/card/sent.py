"""A layer call that is sent to two hosts on the same card, or computed with their memory, against
the same layer in process.

    python -m benchmarks.card.sent [--device cpu] [--json PATH]

It needs what hosts and routers need, and no Ray. Qwen3-30B-A3B's layer: 128 experts of 768 x 2048,
top-8, bfloat16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from benchmarks.speed.layer import pool_of
from moesaic.actors.router.whole_calls import PassCheck
from moesaic.models.trunk.experts_layers import ExpertsLayer

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 2048, 768, 128, 8
TOKENS = (1, 64, 512, 4096)


def experts_module(device: str, intermediate: int, experts: int) -> Any:
    config = MixtralConfig(
        hidden_size=HIDDEN,
        intermediate_size=intermediate,
        num_local_experts=experts,
        num_hidden_layers=1,
        vocab_size=8,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    config._experts_implementation = "grouped_mm"
    module: Any = MixtralExperts(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.02)
    return module.to(device)


def timed_us(call: Callable[[], Any], device: str) -> float:
    began = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e6


def measure(device: str, *, rounds: int, intermediate: int, experts: int) -> list[dict[str, Any]]:
    module = experts_module(device, intermediate, experts)
    layer = ExpertsLayer(0, "experts", module, experts, HIDDEN)
    found = []
    with (
        torch.no_grad(),
        pool_of(
            layer, torch.bfloat16, module.config.to_dict(), device=device, lends=True
        ) as connect,
    ):
        sends, borrows = connect(None), connect(layer.form())
        on_device = None if device == "cpu" else connect(None, "device")
        for tokens in TOKENS:
            x = torch.randn(tokens, HIDDEN, device=device).bfloat16()
            scores = torch.rand(tokens, experts, device=device)
            weights, ids = scores.topk(TOP_K, dim=1)
            weights = (weights / weights.sum(1, keepdim=True)).bfloat16()
            given = x, ids, weights
            expected = module(*given).float()
            ways: dict[str, Callable[..., Any]] = {
                "sent": sends.experts("bench", 0),
                "lent": borrows.experts("bench", 0),
                "lent, in a pass": borrows.experts("bench", 0),
                "grouped_mm": module,
            }
            if on_device is not None:
                ways["sent, in device memory"] = on_device.experts("bench", 0)
            errors = {
                name: float((way(*given).float() - expected).norm() / expected.norm())
                for name, way in ways.items()
            }
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(rounds):
                for name, way in ways.items():
                    in_pass = name == "lent, in a pass"
                    borrows.begin_step(PassCheck.DEVICE if in_pass else PassCheck.CALLS)
                    calls = [
                        timed_us(partial(way, *given), device)
                        for _ in range(max(3, min(20, 2000 // tokens)))
                    ]
                    assert borrows.step_is_sound()
                    borrows.end_step()
                    times[name].append(statistics.median(calls))
            us = {name: statistics.median(taken) for name, taken in times.items()}
            ratios = {name: taken / us["grouped_mm"] for name, taken in us.items()}
            lent = borrows.stats().lent
            found.append(
                {"tokens": tokens, "us": us, "ratios": ratios, "errors": errors, "lent": lent}
            )
            if on_device is not None:
                # Should device memory have failed, these calls went through the CPU's.
                found[-1]["transports"] = dict(on_device.stats().transports)
            print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--intermediate", type=int, default=INTERMEDIATE)
    parser.add_argument("--experts", type=int, default=EXPERTS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = measure(
        arguments.device,
        rounds=arguments.rounds,
        intermediate=arguments.intermediate,
        experts=arguments.experts,
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
