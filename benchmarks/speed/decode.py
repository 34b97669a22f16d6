"""Decoding with the demo model: the pool against plain transformers, same batching, same cores.

    python -m benchmarks.speed.decode [--json PATH] [--dtype bfloat16]
    python -m benchmarks.speed.decode --dtype float32 --trunk-threads 1 --hosts 2
    python -m benchmarks.speed.decode --device cuda --hosts 1 2

Every contender is the same continuous-batching engine in this process; `plain` has all weights,
the others have their experts in 1, 2 or 4 host processes. `lent` computes with the same hosts'
memory itself (`network.lending: always`), `auto` with as much of it as is fastest. Prompts of 32
tokens, greedy; `prefill` is the time to the only token of one prompt of 512.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from benchmarks.hosts import NODE, host_processes, place
from benchmarks.measure import Comparison, report
from benchmarks.streams import prompts_of
from moesaic.actors.engine.engine import EngineConfig, Sampling
from moesaic.actors.engine.transformers_backend.engine import TransformersEngine
from moesaic.actors.router.router import Router
from moesaic.actors.trunk.trunk import run_in_steps
from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.placement import ModelRef
from moesaic.cluster.routing.policy import RouterPolicy
from moesaic.models.trunk.config import read_config
from moesaic.models.trunk.experts_layers import experts_layers, forms_anywhere
from moesaic.models.trunk.trunk import connect_experts, load_trunk, meta_model
from moesaic.models.upcycling.demo import demo_model

NEW_TOKENS = 48
BATCHES = (1, 8, 32)
HOSTS = (1, 2, 4)
PREFILL, PREFILL_ROUNDS = 512, 12
CONFIG = EngineConfig(num_blocks=256, max_batch_tokens=512, max_requests=32)


async def tokens_per_s(
    engine: TransformersEngine, prompts: Sequence[Sequence[int]], new_tokens: int = NEW_TOKENS
) -> tuple[float, float]:
    """(tokens/s from the first token of all to the last, seconds to the first token, median)."""
    firsts: list[float] = []
    start = time.perf_counter()

    async def one(index: int, prompt: Sequence[int]) -> int:
        count = 0
        sampling = Sampling(max_tokens=new_tokens)
        stream: AsyncIterator = engine.generate(f"{index}", prompt, sampling)
        async for delta in stream:
            if count == 0:
                firsts.append(time.perf_counter() - start)
            count += len(delta.token_ids)
        return count

    counts = await asyncio.gather(*(one(i, p) for i, p in enumerate(prompts)))
    return sum(counts) / (time.perf_counter() - start), statistics.median(firsts)


async def run(
    dtype: torch.dtype, rounds: int, hosts: Sequence[int], device: str
) -> list[Comparison]:
    folder = demo_model()
    layers = experts_layers(meta_model(read_config(folder)))
    forms = {LayerKey("demo", la): form for la, form in forms_anywhere(layers).items()}
    ref = ModelRef(name="demo", dtype=str(dtype).removeprefix("torch."), path=str(folder))
    prompts = prompts_of(folder)
    engines: dict[str, TransformersEngine] = {}
    async with AsyncExitStack() as stack:
        cleanup = stack.enter_context(ExitStack())
        plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        engines["plain"] = TransformersEngine(plain.to(device), config=CONFIG)
        for count in hosts:
            started = cleanup.enter_context(host_processes(count, device=device, lends=True))
            placement = place(started, ref, {la.layer: la.num_experts for la in layers})
            for how, lending in (("", "never"), (", lent", "always"), (", auto", "auto")):
                name = f"{count} hosts{how}"
                policy = RouterPolicy(splits_lent=lending == "auto")
                lent = None if lending == "never" else forms
                router = Router(
                    name=name, node=NODE, forms=lent, policy=policy, device=torch.device(device)
                )
                cleanup.callback(router.close)
                router.place(placement)
                router.wait_ready(30.0)
                trunk = load_trunk(folder, dtype=dtype, device=torch.device(device))
                connect_experts(trunk, layers, lambda la, r=router: r.experts("demo", la))
                run_in_steps(trunk, router)
                engines[name] = TransformersEngine(trunk, config=CONFIG)
        for engine in engines.values():
            engine.start()
            cleanup.callback(engine.close)
            await tokens_per_s(engine, prompts[:2])
        found = []
        text = [token for prompt in prompts for token in prompt]
        times: dict[str, list[float]] = {name: [] for name in engines}
        for number in range(PREFILL_ROUNDS):
            long = text[number : number + PREFILL]  # another one each time: prefixes are cached
            for name, engine in engines.items():
                times[name].append((await tokens_per_s(engine, [long], new_tokens=1))[1])
        for name in list(engines)[1:]:
            found.append(_comparison(f"prefill {PREFILL}", name, times))
        for batch in BATCHES:
            speeds: dict[str, list[float]] = {name: [] for name in engines}
            firsts: dict[str, list[float]] = {name: [] for name in engines}
            for _ in range(rounds):
                for name, engine in engines.items():
                    speed, first = await tokens_per_s(engine, prompts[:batch])
                    speeds[name].append(speed)
                    firsts[name].append(first)
            for name in list(engines)[1:]:
                found += _comparisons(batch, name, speeds, firsts)
    return found


def _comparisons(
    batch: int, name: str, speeds: dict[str, list[float]], firsts: dict[str, list[float]]
) -> list[Comparison]:
    """Per token and to the first token; 0.9 of the tokens per second is 1 / 0.9 of the time."""
    made = []
    for what, times in (
        ("s/token", {n: [1 / s for s in found] for n, found in speeds.items()}),
        ("first token", firsts),
    ):
        judged = what == "s/token" and name == "2 hosts" and batch in (8, 32)
        target = 1 / 0.9 if judged else None
        made.append(_comparison(f"batch {batch}, {what}", name, times, target))
    return made


def _comparison(
    case: str, name: str, times: dict[str, list[float]], target: float | None = None
) -> Comparison:
    ratios = [ours / base for ours, base in zip(times[name], times["plain"], strict=True)]
    return Comparison(
        case=case,
        ours=name,
        base="plain",
        seconds={n: statistics.median(times[n]) for n in (name, "plain")},
        ratio=statistics.median(ratios),
        target=target,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--hosts", type=int, nargs="+", default=HOSTS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trunk-threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(arguments.trunk_threads)
    dtype = getattr(torch, arguments.dtype)
    found = asyncio.run(run(dtype, arguments.rounds, arguments.hosts, arguments.device))
    title = f"Decoding, demo model, {arguments.dtype}, {arguments.device}"
    report(title, found, arguments.json)


if __name__ == "__main__":
    main()
