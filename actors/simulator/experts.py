"""Experts whose outputs show which weights were used: they multiply by a number.

So a call's result proves that each of its assignments was computed once, with the version of the
weights that it should use. All numbers are small multiples of a power of two: sums are exact.

Shape suffixes: T = tokens, K = experts of a token, H = hidden size, E = experts of a layer.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...cluster.expert_keys import FIRST_VERSION, ExpertVersion, LayerKey
from ...cluster.placement import ModelRef, ModelShape
from ...cluster.versions import LayerVersions
from ...kernels.ffn import ExpertForm
from ...models.trunk.experts_layers import ExpertsLayer
from ...proto.errors import CheckpointError
from ..host.weight_store import ExpertStore, HostedModel

HIDDEN, DTYPE = 4, "float32"
# What stands for the weights that the checkpoint has; each update brings others.
CHECKPOINT = 0
_CPU = torch.device("cpu")


class _Experts(nn.Module):
    """An experts module as transformers has them: not gated, without an activation."""

    has_gate = is_transposed = False

    def __init__(self, experts: int) -> None:
        super().__init__()
        blank = torch.empty(experts, HIDDEN, HIDDEN, device="meta")
        self.up_proj = nn.Parameter(blank, requires_grad=False)
        self.down_proj = nn.Parameter(blank, requires_grad=False)
        self.act_fn = nn.Identity()


@functools.cache
def _layer(number: int, experts: int) -> ExpertsLayer:
    return ExpertsLayer(number, "", _Experts(experts), experts, HIDDEN)


def layers_of(shape: ModelShape) -> dict[int, ExpertsLayer]:
    return {number: _layer(number, experts) for number, experts in shape.experts.items()}


def forms_of(models: tuple[ModelShape, ...]) -> dict[LayerKey, ExpertForm]:
    """Return the arithmetic of all layers, for routers that borrow."""
    return {
        LayerKey(shape.model, number): layer.form()
        for shape in models
        for number, layer in layers_of(shape).items()
    }


def store_of(models: Mapping[str, ModelShape]) -> ExpertStore:
    """Return a host's store, without any expert."""

    def open_model(ref: ModelRef, device: torch.device, about: Mapping[str, Any]) -> HostedModel:
        return HostedModel(ref, layers_of(models[ref.name]), device, about)

    return ExpertStore(_CPU, open_model)


def ref_of(shape: ModelShape) -> ModelRef:
    return ModelRef(name=shape.model, dtype=DTYPE)


def tensors_of(weights: ExpertVersion, content: int) -> dict[str, Tensor]:
    """Return the tensors of an expert."""
    return {
        "up": torch.eye(HIDDEN),
        "down": factor(weights.key.expert, content) * torch.eye(HIDDEN),
    }


def content_of(tensors: Mapping[str, Tensor]) -> int:
    """Return what `tensors_of` was given. Raises CheckpointError for other tensors."""
    value = float(tensors["down"][0, 0])
    if value < 1.0:
        raise CheckpointError(f"down has {value}, as no expert has")
    return int(value) - 1


def factor(expert: int, content: int) -> float:
    return 1.0 + content + expert / 64


def rows_of(ids_TK: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return hidden states (T, H) and gate weights (T, K) for a call with these ids."""
    x_TH = torch.arange(1.0, len(ids_TK) + 1).unsqueeze(1).repeat(1, HIDDEN)
    weights_TK = 0.25 * (1 + torch.from_numpy(ids_TK).remainder(3))
    return x_TH, weights_TK


def expected(
    key: LayerKey,
    ids_TK: np.ndarray,
    versions: LayerVersions,
    contents: Mapping[ExpertVersion, int],
) -> np.ndarray:
    """Return the result (T, H) of a call with `rows_of` these ids, given its experts' versions."""
    x_TH, weights_TK = rows_of(ids_TK)
    out_T = np.zeros(len(ids_TK), dtype=np.float32)
    for row, ids in enumerate(ids_TK.tolist()):
        for k, expert in enumerate(ids):
            if expert >= 0:
                one = ExpertVersion(key.expert(expert), versions.of(expert))
                first = one.version == FIRST_VERSION
                content = CHECKPOINT if first else contents[one]
                out_T[row] += float(weights_TK[row, k]) * factor(expert, content)
    return out_T[:, None] * x_TH.numpy()
