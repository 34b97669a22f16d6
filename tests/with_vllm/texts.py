"""Greedy texts of a folder's model and their log-probabilities as JSON on standard output, by vLLM
alone or over a pool.

    python -m tests.with_vllm.texts alone|pool|compiled FOLDER TOKENS [HOSTS]

A process of its own, since vLLM keeps what it has set up until its process ends.
"""

# vLLM is optional.
# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# Of each prompt its tokens, and the log-probability of each.
Texts = list[tuple[list[int], list[float]]]
PROMPTS = [[5, 7, 11, 13], [3], list(range(20, 60)), [9, 8, 7, 6, 5, 4, 3, 2], [100] * 17]


def alone(folder: Path, tokens: int) -> Texts:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(folder),
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=256,
        kv_cache_memory_bytes=1 << 28,
        enable_prefix_caching=False,
        disable_log_stats=True,
        generation_config="vllm",
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=1
    )
    answers = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], sampling, use_tqdm=False)
    found: Texts = []
    for answer in answers:
        output = answer.outputs[0]
        ids = list(output.token_ids)
        pairs = zip(ids, output.logprobs or (), strict=True)
        found.append((ids, [float(one[token].logprob) for token, one in pairs]))
    return found


def pooled(folder: Path, tokens: int, hosts: int, *, compiled: bool) -> Texts:
    from moesaic.actors.engine.engine import EngineConfig, Sampling
    from moesaic.actors.engine.trunk_config import TrunkConfig
    from moesaic.actors.engine.vllm_backend.engine import VllmEngine
    from moesaic.actors.host.host import local_hosts
    from moesaic.actors.router.router import Router
    from moesaic.cluster.placement import ModelRef
    from moesaic.models.trunk.config import read_config
    from moesaic.models.trunk.experts_layers import experts_layers
    from moesaic.models.trunk.trunk import meta_model
    from tests.helpers.pool.pools import place

    class Link:
        def __init__(
            self, config: TrunkConfig, layers: Sequence[int], *, forms: object = None
        ) -> None:
            self.router = Router(name="test", node="here", transport="shm")
            self.router.place(placement)
            self.router.wait_ready(10.0)

        def close(self) -> None:
            self.router.close()

    layers = experts_layers(meta_model(read_config(folder)))
    ref = ModelRef(name="m", dtype="float32", path=str(folder))
    sizes = EngineConfig(num_blocks=64, compiled=compiled)
    config = TrunkConfig(namespace="", model=ref, name="test", engine=sizes)
    with local_hosts(hosts) as running:
        placement = place(layers, running, ref, replicas=hosts)
        engine = VllmEngine(config, Link)  # pyright: ignore[reportArgumentType]
        engine.start()

        async def one(number: int, ids: list[int]) -> tuple[list[int], list[float]]:
            asked = Sampling(max_tokens=tokens, logprobs=1)
            found: list[int] = []
            logprobs: list[float] = []
            async for delta in engine.generate(str(number), ids, asked):
                found += delta.token_ids
                logprobs += [one.logprob for one in delta.logprobs]
            return found, logprobs

        async def everything() -> Texts:
            return await asyncio.gather(*(one(n, ids) for n, ids in enumerate(PROMPTS)))

        try:
            return asyncio.run(everything())
        finally:
            engine.close()


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    way, folder, tokens = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    hosts = int(sys.argv[4]) if len(sys.argv) > 4 else 2
    if way == "alone":
        texts = alone(folder, tokens)
    else:
        texts = pooled(folder, tokens, hosts, compiled=way == "compiled")
    print(json.dumps(texts))


if __name__ == "__main__":
    main()
