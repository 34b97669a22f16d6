"""The layer that is measured, ours and its peers over the same weights.

Shape suffixes: T = tokens, K = assignments of a token, H = hidden size, I = intermediate size, S =
slots, L = layers, E = experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moesaic.kernels.grouped.activation import Activation
from moesaic.kernels.grouped.configurations import Configuration
from moesaic.kernels.grouped.ffn import grouped_ffn
from moesaic.kernels.grouped.slots import LayerSlots, SlotForm, StepFlags


@dataclass(frozen=True, slots=True)
class Shape:
    """A layer of experts; the default is that of Qwen3-30B-A3B."""

    experts: int = 128
    top_k: int = 8
    hidden: int = 2048
    intermediate: int = 768
    layers: int = 4  # calls go round them, so that no cache has the next call's weights

    @property
    def expert_bytes(self) -> int:
        return 3 * self.hidden * self.intermediate * 2

    def flop(self, tokens: int) -> int:
        return 2 * 3 * self.hidden * self.intermediate * tokens * self.top_k


@dataclass(frozen=True, slots=True)
class Call:
    """The input of one layer call."""

    layer: int
    x_TH: Tensor
    ids_TK: Tensor
    weights_TK: Tensor

    @property
    def experts_used(self) -> int:
        return int(torch.unique(self.ids_TK).numel())


class Layers:
    """Random experts of several layers in one slab, and calls that go round them."""

    def __init__(self, shape: Shape, device: str = "cuda") -> None:
        self.shape = shape
        slots = shape.layers * shape.experts
        self.up_SUH = torch.empty(
            slots, 2 * shape.intermediate, shape.hidden, dtype=torch.bfloat16, device=device
        )
        self.up_SUH.normal_(std=shape.hidden**-0.5)
        self.down_SHI = torch.empty(
            slots, shape.hidden, shape.intermediate, dtype=torch.bfloat16, device=device
        )
        self.down_SHI.normal_(std=shape.intermediate**-0.5)
        table = torch.arange(slots, dtype=torch.int32, device=device)
        self.table_LE = table.view(shape.layers, shape.experts)
        numbers = torch.arange(shape.layers, dtype=torch.int32, device=device)
        form = SlotForm(Activation("silu"))
        self.slots = [
            LayerSlots(form, self.up_SUH, self.down_SHI, None, None, self.table_LE, number)
            for number in numbers
        ]
        self.flags = StepFlags.on(torch.device(device))

    def calls(self, tokens: int, count: int) -> list[Call]:
        """Return calls with random routing; each token's experts differ."""
        shape, device = self.shape, self.up_SUH.device
        made = []
        for n in range(count):
            scores = torch.rand(tokens, shape.experts, device=device)
            weights_TK, ids_TK = scores.topk(shape.top_k, dim=1)
            x_TH = torch.randn(tokens, shape.hidden, device=device).bfloat16()
            weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
            made.append(Call(n % shape.layers, x_TH, ids_TK.int(), weights_TK))
        return made

    def ours(
        self, call: Call, *, exact: bool = False, configuration: Configuration | None = None
    ) -> Callable[[], Tensor]:
        out_TH = torch.empty_like(call.x_TH)

        def run() -> Tensor:
            grouped_ffn(
                self.slots[call.layer],
                call.x_TH,
                call.ids_TK,
                call.weights_TK,
                out_TH,
                self.flags,
                exact=exact,
                configuration=configuration,
            )
            return out_TH

        return run

    def grouped_mm(self, call: Call) -> Callable[[], Tensor]:
        """transformers' experts, dispatched to its ``grouped_mm``, over the same memory."""
        module = self.module(call.layer)
        ids_TK, weights_TK = call.ids_TK.long(), call.weights_TK.bfloat16()
        return lambda: module(call.x_TH, ids_TK, weights_TK)

    def module(self, layer: int, *, learns: bool = False) -> Any:
        """Return transformers' experts over a layer's memory; ``learns``: they get gradients."""
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        shape = self.shape
        config = Qwen3MoeConfig(
            hidden_size=shape.hidden,
            moe_intermediate_size=shape.intermediate,
            num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            hidden_act="silu",
        )
        config._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            module = Qwen3MoeExperts(config)
        up, down = self.weights(layer)
        module.gate_up_proj = torch.nn.Parameter(up, requires_grad=learns)
        module.down_proj = torch.nn.Parameter(down, requires_grad=learns)
        return module

    def liger(self, call: Call) -> Callable[[], Tensor]:
        """Liger's fused MoE over the same memory."""
        from liger_kernel.ops.fused_moe import (  # pyright: ignore[reportMissingImports]
            LigerFusedMoEFunction,
        )

        up, down = self.weights(call.layer)
        return lambda: LigerFusedMoEFunction.apply(
            call.x_TH, up, down, call.ids_TK, call.weights_TK
        )

    def oracle(self, call: Call) -> Tensor:
        """The same call in float64."""
        up, down = self.weights(call.layer)
        x_TH, inter = call.x_TH.double(), self.shape.intermediate
        out_TH = torch.zeros_like(x_TH)
        for expert in torch.unique(call.ids_TK).tolist():
            token, k = (call.ids_TK == expert).nonzero(as_tuple=True)
            both = x_TH[token] @ up[expert].double().t()
            act = torch.nn.functional.silu(both[:, :inter]) * both[:, inter:]
            y = act @ down[expert].double().t()
            out_TH.index_add_(0, token, y * call.weights_TK[token, k].double()[:, None])
        return out_TH

    def weights(self, layer: int) -> tuple[Tensor, Tensor]:
        held = slice(layer * self.shape.experts, (layer + 1) * self.shape.experts)
        return self.up_SUH[held], self.down_SHI[held]
