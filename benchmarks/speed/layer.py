"""One MoE layer in the pool against the same layer in process through transformers' grouped_mm.

    python -m benchmarks.speed.layer [--json PATH]

64 experts of 1024 x 2048, top-8, two hosts that share the cores which the layer in process has for
itself. `router` is the same path with experts that compute next to nothing: grouping, scattering,
gathering and summing alone, beside a layer that does nothing in process.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from benchmarks.hosts import NODE, host_processes, place
from benchmarks.measure import Comparison, compare, report
from moesaic.actors.router.router import Router
from moesaic.actors.transport.grpc.weights import put_weights
from moesaic.cluster.expert_keys import FIRST_VERSION, ExpertKey, ExpertVersion, LayerKey
from moesaic.cluster.placement import ModelRef
from moesaic.cluster.routing.transports import TransportChoice
from moesaic.kernels.ffn import ExpertForm
from moesaic.models.trunk.experts_layers import ExpertsLayer, expert_tensors
from moesaic.proto.keys import Grant, secret_of_process

HIDDEN, EXPERTS, TOP_K, HOSTS = 2048, 64, 8, 2
TOKENS = (1, 8, 64, 512)


def experts_module(dtype: torch.dtype, intermediate: int) -> MixtralExperts:
    config = MixtralConfig(
        hidden_size=HIDDEN,
        intermediate_size=intermediate,
        num_local_experts=EXPERTS,
        num_hidden_layers=1,
        vocab_size=8,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    config._experts_implementation = "grouped_mm"
    module = MixtralExperts(config).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.02)
    return module


@contextmanager
def pool_of(
    layer: ExpertsLayer,
    dtype: torch.dtype,
    config: Mapping[str, Any],
    *,
    device: str = "cpu",
    lends: bool = False,
) -> Iterator[Callable[..., Router]]:
    """Put a layer's experts into hosts; yield what connects a router to them (`connect`).

    With the layer's form and hosts that lend, the router computes with their memory.
    """
    name = str(dtype).removeprefix("torch.")
    ref = ModelRef(name="bench", dtype=name, config=config)
    with ExitStack() as stack:
        hosts = stack.enter_context(host_processes(HOSTS, device=device, lends=lends))
        placement = place(hosts, ref, {0: layer.num_experts}, load=False)
        for expert in range(layer.num_experts):
            (replica,) = placement.layers[("bench", 0)].replicas[expert]  # pyright: ignore[reportArgumentType]
            host = placement.hosts[replica.host]
            key = ExpertKey("bench", 0, expert)
            secret = secret_of_process()
            put_weights(
                host.grpc_address,
                ExpertVersion(key, FIRST_VERSION),
                expert_tensors(layer, expert),
                timeout_s=60.0,
                grant=Grant(0, secret.grant(host.host, host.incarnation, key, 1, 0)),
                proof=secret.proof("weights", host.target),
            )

        def connect(form: ExpertForm | None, transport: TransportChoice = "auto") -> Router:
            forms = None if form is None else {LayerKey("bench", 0): form}
            router = Router(
                name="sent" if form is None else "lent",
                node=NODE,
                device=torch.device(device),
                forms=forms,
                transport=transport,
            )
            stack.callback(router.close)
            router.place(placement)
            router.wait_ready(30.0)
            return router

        yield connect


def measure(dtype: torch.dtype, *, intermediate: int, rounds: int) -> list[Comparison]:
    module: Any = experts_module(dtype, intermediate)
    layer = ExpertsLayer(0, "experts", module, EXPERTS, HIDDEN)
    name = str(dtype).removeprefix("torch.")
    idle = intermediate <= 8
    with pool_of(layer, dtype, module.config.to_dict()) as connect:
        pooled, found = connect(None).experts("bench", 0), []
        for tokens in TOKENS:
            x = torch.randn(tokens, HIDDEN).to(dtype)
            ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)])
            weights = torch.rand(tokens, TOP_K).to(dtype)
            with torch.no_grad():
                error = (pooled(x, ids, weights) - module(x, ids, weights)).abs().max()
                assert float(error) < (1e-4 if dtype is torch.float32 else 0.05), float(error)
                found.append(
                    compare(
                        f"{'router ' if idle else ''}{tokens} tokens, {name}",
                        {
                            "pool": lambda x=x, i=ids, w=weights: pooled(x, i, w),
                            "grouped_mm": lambda x=x, i=ids, w=weights: module(x, i, w),
                        },
                        ours="pool",
                        base="grouped_mm",
                        rounds=rounds,
                        calls=max(3, min(50, 200 // tokens)),
                    )
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        found += measure(dtype, intermediate=1024, rounds=arguments.rounds)
    found += measure(torch.float32, intermediate=8, rounds=arguments.rounds)
    report("One layer, 64 experts 2048 x 1024, top-8, two hosts", found, arguments.json)


if __name__ == "__main__":
    main()
