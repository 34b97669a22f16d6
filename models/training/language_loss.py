"""The loss of a microbatch of sequences, as a sum over its targets.

Shape suffixes: B = sequences, S = tokens of each, V = vocabulary, R = rows (B * S), E = experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel

from ..data.sequences import NOT_LEARNED


class Computed(NamedTuple):
    """What a forward pass has given."""

    loss: Tensor  # the sum of the targets' losses in nats, at least float32
    targets: int  # tokens that count
    gates_RE: tuple[Tensor, ...]  # logits of each layer's gates; empty if they were not asked for


def compute(
    model: PreTrainedModel, ids_BS: Tensor, labels_BS: Tensor, *, gates: bool = False
) -> Computed:
    """Run a causal language model; ``labels_BS`` are as `sequence` returns them.

    With ``gates`` the logits of its gates are returned, as for an auxiliary loss.
    """
    asked: dict[str, Any] = {"output_router_logits": True} if gates else {}
    out: Any = model(input_ids=ids_BS, use_cache=False, **asked)
    logits_BSV = out.logits[:, :-1]
    wide = torch.promote_types(logits_BSV.dtype, torch.float32)
    targets_BS = labels_BS[:, 1:].to(logits_BSV.device)
    loss = functional.cross_entropy(
        logits_BSV.flatten(0, 1).to(wide),
        targets_BS.flatten(),
        ignore_index=NOT_LEARNED,
        reduction="sum",
    )
    return Computed(
        loss,
        int((targets_BS != NOT_LEARNED).sum()),
        tuple(one for one in out.router_logits if one is not None) if gates else (),
    )


def has_balance_loss(config: PretrainedConfig) -> bool:
    """Return whether a model tells its gates' logits, so that an auxiliary loss can be computed."""
    return hasattr(config.get_text_config(), "output_router_logits")
