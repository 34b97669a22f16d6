"""Decoding with the demo model and vLLM: over the pool, against vLLM with its own experts and
against transformers' continuous batching; same cores.

    python -m benchmarks.speed.vllm_decode [--json PATH] [--dtype bfloat16] [--rounds 5]

Needs an environment with vLLM (`make test-vllm` makes one). Each contender is a process of its own
that stays; they take turns, batch by batch. `pool` sends every call (`network.lending: never`),
`pool, lent` computes with the memory of hosts (`always`), `pool, auto` with as much of it as is
fastest. Prompts of 32 tokens, 48 new ones, greedy.
"""

# vLLM is optional.
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.hosts import NODE, host_processes, place
from benchmarks.measure import write_json
from moesaic.actors.engine.engine import Delta, Engine, EngineConfig, Sampling
from moesaic.models.upcycling.demo import demo_model

NEW_TOKENS = 48
BATCHES = (1, 8, 32)
POOLS = {"pool": "never", "pool, lent": "always", "pool, auto": "auto"}
WAYS = ("alone", "alone, eager", *POOLS, "transformers")
TARGETS = {"pool, lent": 0.95, "pool, auto": 0.95}  # tokens/s against those of vLLM alone
CONFIG = EngineConfig(num_blocks=256, max_batch_tokens=2048, max_requests=32)
Run = Callable[[list[list[int]]], float]  # prompts -> tokens/s


def over_engine(engine: Engine) -> Run:
    async def one(number: int, prompt: Sequence[int]) -> int:
        deltas: AsyncGenerator[Delta, None] = engine.generate(
            str(number), prompt, Sampling(max_tokens=NEW_TOKENS, logit_bias=())
        )
        return sum([len(delta.token_ids) async for delta in deltas])

    async def everything(prompts: list[list[int]]) -> float:
        began = time.perf_counter()
        counts = await asyncio.gather(*(one(n, ids) for n, ids in enumerate(prompts)))
        return sum(counts) / (time.perf_counter() - began)

    return lambda prompts: asyncio.run(everything(prompts))


@contextmanager
def alone(folder: Path, dtype: str, *, eager: bool) -> Iterator[Run]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(folder), dtype=dtype, skip_tokenizer_init=True, enforce_eager=eager,
        max_model_len=512, max_num_batched_tokens=2048, max_num_seqs=32,
        kv_cache_memory_bytes=1 << 28, enable_prefix_caching=False, disable_log_stats=True,
        generation_config="vllm",
    )  # fmt: skip
    asked = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, detokenize=False)

    def run(prompts: list[list[int]]) -> float:
        began = time.perf_counter()
        answers = llm.generate([{"prompt_token_ids": p} for p in prompts], asked, use_tqdm=False)
        tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
        return tokens / (time.perf_counter() - began)

    yield run


@contextmanager
def pool(folder: Path, dtype: str, lending: str) -> Iterator[Run]:
    from moesaic.actors.engine.trunk_config import TrunkConfig
    from moesaic.actors.engine.vllm_backend.engine import VllmEngine
    from moesaic.actors.router.router import Router
    from moesaic.cluster.expert_keys import LayerKey
    from moesaic.cluster.placement import ModelRef
    from moesaic.cluster.routing.policy import RouterPolicy
    from moesaic.kernels.ffn import ExpertForm
    from moesaic.models.trunk.config import read_config
    from moesaic.models.trunk.experts_layers import experts_layers
    from moesaic.models.trunk.trunk import meta_model

    class Link:
        def __init__(
            self, config: TrunkConfig, layers: Sequence[int], *, forms: dict[int, ExpertForm]
        ) -> None:
            lent = {LayerKey("demo", layer): form for layer, form in forms.items()}
            self.router = Router(
                name="benchmark",
                node=NODE,
                transport="shm",
                policy=RouterPolicy(splits_lent=lending == "auto"),
                forms=None if lending == "never" else lent,
            )
            self.router.place(placement)
            self.router.wait_ready(60.0)

        def close(self) -> None:
            self.router.close()

    ref = ModelRef(name="demo", dtype=dtype, path=str(folder))
    layers = {one.layer: one.num_experts for one in experts_layers(meta_model(read_config(folder)))}
    # As vLLM is by default.
    sizes = replace(CONFIG, compiled=True)
    config = TrunkConfig(namespace="", model=ref, name="trunk", engine=sizes)
    with host_processes(2, threads=1, lends=lending != "never") as hosts:
        placement = place(hosts, ref, layers)
        engine = VllmEngine(config, Link)  # pyright: ignore[reportArgumentType]
        engine.start()
        try:
            yield over_engine(engine)
        finally:
            engine.close()


@contextmanager
def transformers(folder: Path, dtype: str) -> Iterator[Run]:
    import torch
    from transformers import AutoModelForCausalLM

    from moesaic.actors.engine.transformers_backend.engine import TransformersEngine

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    engine = TransformersEngine(model, config=CONFIG)
    engine.start()
    try:
        yield over_engine(engine)
    finally:
        engine.close()


def contend(way: str, folder: Path, dtype: str) -> None:
    """Answer lines of JSON with prompts by tokens/s, until standard input ends."""
    ways = {
        "alone": lambda: alone(folder, dtype, eager=False),
        "alone, eager": lambda: alone(folder, dtype, eager=True),
        **{name: partial(pool, folder, dtype, lending) for name, lending in POOLS.items()},
        "transformers": lambda: transformers(folder, dtype),
    }
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM writes to standard output, too
    with ways[way]() as run:
        answers.write("ready\n")
        answers.flush()
        for line in sys.stdin:
            answers.write(f"{run(json.loads(line))}\n")
            answers.flush()


@contextmanager
def contender(way: str, folder: Path, dtype: str) -> Iterator[Run]:
    environment = os.environ | {
        "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(os.cpu_count() or 1),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    module = "benchmarks.speed.vllm_decode"
    process = subprocess.Popen(
        [sys.executable, "-m", module, "--contend", way, str(folder), dtype],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None
    assert stdout is not None

    def run(prompts: list[list[int]]) -> float:
        stdin.write(json.dumps(prompts) + "\n")
        stdin.flush()
        return float(stdout.readline())

    try:
        if stdout.readline() != "ready\n":
            raise RuntimeError(f"{way}: did not start")
        yield run
    finally:
        stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--contend", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.contend:
        contend(args.contend[0], Path(args.contend[1]), args.contend[2])
        return
    folder = demo_model()
    # In the contenders' processes torch is read with their threads; here it is not needed.
    from benchmarks.streams import prompts_of

    prompts = prompts_of(folder)
    found: dict[tuple[str, int], list[float]] = {}
    with ExitStack() as stack:
        start = partial(contender, folder=folder, dtype=args.dtype)
        running = {way: stack.enter_context(start(way)) for way in args.ways}
        for number in range(args.rounds + 1):
            for batch in BATCHES:
                for way, run in running.items():
                    tokens_per_s = run(prompts[:batch])
                    if number:  # the first round warms up
                        found.setdefault((way, batch), []).append(tokens_per_s)
    table = Table(title=f"tokens/s with the demo model, {args.dtype}")
    targets = {way: target for way, target in TARGETS.items() if way in args.ways}
    for column in (
        "batch", *args.ways, *(f"{way} / alone (>= {t:g})" for way, t in targets.items())
    ):  # fmt: skip
        table.add_column(column, justify="right")
    rows: list[dict[str, Any]] = []
    for batch in BATCHES:
        ratios = {
            way: statistics.median(
                ours / theirs
                for ours, theirs in zip(found[way, batch], found["alone", batch], strict=True)
            )
            for way in targets
        }
        speeds = {way: statistics.median(found[way, batch]) for way in args.ways}
        rows.append({"batch": batch, "tokens_per_s": speeds, "against_alone": ratios})
        table.add_row(
            f"{batch}", *(f"{speed:.1f}" for speed in speeds.values()),
            *(f"[{'green' if ratio >= TARGETS[way] else 'red'}]{ratio:.2f}[/]"
              for way, ratio in ratios.items()),
        )  # fmt: skip
    Console(width=120).print(table)
    write_json(args.json, {"dtype": args.dtype, "rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    main()
