"""Adapters for architectures whose experts do not use transformers' experts interface.

An adapter replaces one of transformers' modules in a model on the meta device. It has the same
call and the same result, keeps the module's parameters except the experts', and holds a
`PoolExperts`, which has the form of the interface. All other code treats the model like any other.
`ADAPTERS` says which class has which adapter; an extension's architecture brings its own.

The arithmetic is that of transformers' modules of the same names; the tests compare them.

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token, B = batch, S = sequence,
E = experts, I = intermediate size, N = T * K assignments flattened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

from . import extensions
from .architecture import Adapter
from .in_pool import experts_forward

UNUSED = -1  # id of an assignment that no expert computes


class PoolExperts(nn.Module):
    """Experts in the form of transformers' experts interface, without weights.

    ``up`` is the shape of all experts' up-projections, (E, 2I or I, H), and ``down`` is (E, H, I);
    both are transposed if ``is_transposed``. ``conversions`` map the tensors on disk to them.
    """

    _is_expert_parallel = False
    has_bias = False
    has_post_expert_norm = False
    # Whether transformers' module has weights, too, that nothing reads. They are not in the pool.
    has_unread_weights = False

    def __init__(
        self,
        up: Sequence[int],
        down: Sequence[int],
        act_fn: Callable[[Tensor], Tensor],
        *,
        has_gate: bool = True,
        is_transposed: bool = False,
        conversions: Sequence[WeightConverter | WeightRenaming] = (),
    ) -> None:
        super().__init__()
        self.has_gate = has_gate
        self.is_transposed = is_transposed
        self.act_fn = act_fn
        self.conversions = conversions
        name = "gate_up_proj" if has_gate else "up_proj"
        self.register_parameter(name, nn.Parameter(torch.empty(*up, device="meta")))
        self.down_proj = nn.Parameter(torch.empty(*down, device="meta"))

    def _apply_gate(self, up_R: Tensor) -> Tensor:
        gate, up = up_R.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, /) -> Tensor:
        return experts_forward(self, x_TH, ids_TK, weights_TK)


class SplitRows(ConversionOps):
    """Splits (E * rows, H) on disk, one expert below the other, into (E, rows, H)."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {
            pattern: [tensor.unflatten(0, (-1, self.rows)) for tensor in tensors]
            for pattern, tensors in input_dict.items()
        }

    @property
    def reverse_op(self) -> ConversionOps:
        return JoinRows(self.rows)


class JoinRows(ConversionOps):
    """Joins (E, rows, H) into (E * rows, H), which has one expert below the other."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:  # fmt: skip
        # After a `Chunk` the tensors have the target patterns; a transposition keeps the source's.
        names = target_patterns if len(input_dict) == len(target_patterns) else input_dict
        return {
            name: (t[0] if isinstance(t, list) else t).flatten(0, 1)
            for name, t in zip(names, input_dict.values(), strict=True)
        }

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitRows(self.rows)


class SwitchExperts(PoolExperts):
    """Switch Transformers (arXiv 2101.03961), with one expert for each token.

    A token beyond its expert's capacity, which the gate in the trunk counts, has none.
    """

    num_experts_per_tok = 1

    def __init__(self, experts: Any) -> None:
        first = experts["expert_0"]
        count = len(experts)
        super().__init__(
            (count, *first.wi.weight.shape),
            (count, *first.wo.weight.shape),
            first.act,
            has_gate=False,
            conversions=[
                WeightConverter(
                    f"experts.expert_*.{disk}.weight", f"experts.{name}", [MergeModulelist()]
                )
                for disk, name in (("wi", "up_proj"), ("wo", "down_proj"))
            ],
        )

    def forward(self, x_TH: Tensor, chosen_T1E: Tensor, weights_T1: Tensor) -> Tensor:
        highest_T1, ids_T1 = chosen_T1E.max(dim=-1)
        ids_T1 = ids_T1.masked_fill(highest_T1 == 0, UNUSED)
        return super().forward(x_TH, ids_T1, weights_T1)


class DbrxExperts(PoolExperts):
    """DBRX, with all experts of a layer in one matrix, one below the other; w2 is transposed."""

    def __init__(self, experts: Any) -> None:
        count, inner, hidden = experts.num_experts, experts.ffn_hidden_size, experts.hidden_size
        super().__init__(
            (count, 2 * inner, hidden),
            (count, hidden, inner),
            experts.mlp.activation_fn,
            conversions=[
                WeightConverter(
                    ["experts.mlp.w1", "experts.mlp.v1"],
                    "experts.gate_up_proj",
                    [SplitRows(inner), Concatenate(dim=1)],
                ),
                WeightConverter(
                    "experts.mlp.w2", "experts.down_proj", [SplitRows(inner), Transpose(1, 2)]
                ),
            ],
        )

    def forward(self, x_BSH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return super().forward(x_BSH.flatten(0, 1), ids_TK, weights_TK).view_as(x_BSH)


class LongcatFlashExperts(PoolExperts):
    """LongCat-Flash (arXiv 2509.01322), with zero-compute experts that return their input.

    Their ids begin at the number of routed experts. They stay in the trunk.
    """

    has_unread_weights = True  # up-projections of the zero-compute experts

    def __init__(self, experts: Any) -> None:
        routed = experts.num_routed_experts
        super().__init__(
            (routed, *experts.gate_up_proj.shape[1:]), experts.down_proj.shape, experts.act_fn
        )
        self.num_routed_experts = routed

    def forward(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        routed_TK = ids_TK < self.num_routed_experts
        y_TH = super().forward(x_TH, ids_TK.masked_fill(~routed_TK, UNUSED), weights_TK)
        kept_T1 = weights_TK.masked_fill(routed_TK, 0.0).sum(dim=-1, keepdim=True)
        return y_TH + (x_TH * kept_T1).to(x_TH.dtype)


class Llama4Moe(nn.Module):
    """Llama 4, where the gate's sigmoid scales an expert's input, so the pool's weights are 1.

    Each choice is a call of its own, because the inputs differ (published models have one
    assignment).
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.router = block.router
        self.shared_expert = block.shared_expert
        self.top_k = block.top_k
        self.experts = PoolExperts(
            block.experts.gate_up_proj.shape,
            block.experts.down_proj.shape,
            block.experts.act_fn,
            is_transposed=True,
        )

    def forward(self, x_BSH: Tensor) -> tuple[Tensor, Tensor]:
        x_TH = x_BSH.flatten(0, 1)
        scores_TE, logits_TE = self.router(x_TH)
        ids_TK = logits_TE.topk(self.top_k, dim=1).indices
        scores_TK = scores_TE.gather(1, ids_TK)
        y_TH = self.shared_expert(x_TH)
        for score_T1, ids_T1 in zip(scores_TK.split(1, dim=1), ids_TK.split(1, dim=1), strict=True):
            y_TH = y_TH + self.experts(x_TH * score_T1, ids_T1, torch.ones_like(score_T1))
        return y_TH, logits_TE


class JetMoeMoe(nn.Module):
    """The feed-forward experts of JetMoE (arXiv 2404.07413).

    Its attention is a mixture as well, and stays in the trunk with its keys and values.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.router = block.router
        self.bias = block.bias
        self.experts = PoolExperts(
            block.input_linear.weight.shape,
            block.output_linear.weight.shape,
            block.activation,
            conversions=[
                WeightRenaming("mlp.input_linear.weight", "mlp.experts.gate_up_proj"),
                WeightRenaming("mlp.output_linear.weight", "mlp.experts.down_proj"),
            ],
        )

    def forward(self, x_BSH: Tensor) -> Tensor:
        x_TH = x_BSH.flatten(0, 1)
        order_N, _, sorted_weights_N, expert_sizes, _ = self.router(x_TH)
        # The gate returns its assignments sorted by expert; here they return to the tokens' order.
        sizes_E = torch.tensor(expert_sizes, device=x_TH.device)
        experts_E = torch.arange(len(expert_sizes), device=x_TH.device)
        ids_N = torch.empty_like(order_N)
        ids_N[order_N] = experts_E.repeat_interleave(sizes_E)
        weights_N = torch.empty_like(sorted_weights_N)
        weights_N[order_N] = sorted_weights_N
        shape_TK = (x_TH.shape[0], self.router.top_k)
        y_TH = self.experts(x_TH, ids_N.view(shape_TK), weights_N.view(shape_TK))
        return y_TH.view_as(x_BSH) + self.bias


# A class of transformers -> its adapter.
ADAPTERS: dict[str, Adapter] = {
    "SwitchTransformersExperts": SwitchExperts,
    "DbrxExperts": DbrxExperts,
    "LongcatFlashExperts": LongcatFlashExperts,
    "Llama4TextMoe": Llama4Moe,
    "JetMoeMoE": JetMoeMoe,
}


def adapters_of(model: nn.Module) -> Mapping[str, Adapter]:
    """Return the adapters of classes that ``model`` may have, its extension's included."""
    config: Any = model.config
    return {**ADAPTERS, **extensions.adapters(config.model_type)}


def adapt(model: nn.Module) -> None:
    """Put the adapters into ``model`` in place; experts' weights that it has are lost."""
    adapters = adapters_of(model)
    for name, module in list(model.named_modules()):
        adapter = adapters.get(type(module).__name__)
        if adapter is not None:
            model.set_submodule(name, adapter(module))
            # transformers' weight initialisation would access the removed parameters
            owner: Any = model.get_submodule(name.rpartition(".")[0])
            owner._is_hf_initialized = True


def needs_adapter(model: nn.Module) -> bool:
    adapters = adapters_of(model)
    return any(type(module).__name__ in adapters for module in model.modules())


def conversions(model: nn.Module) -> list[WeightConverter | WeightRenaming]:
    """Return the conversions of the adapted experts' tensors from disk into memory."""
    kinds = {type(m): m for m in model.modules() if isinstance(m, PoolExperts)}
    return [one for experts in kinds.values() for one in experts.conversions]
