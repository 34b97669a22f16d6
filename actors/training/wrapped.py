"""Models that are wrapped, which a pool's optimizer cannot train."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ...proto.errors import BadInput


def check_not_wrapped(model: nn.Module) -> None:
    """Raise BadInput unless a model is a trunk itself."""
    if getattr(model, "_is_replica", False):
        raise BadInput(
            "DataParallel copies the trunk to several GPUs, and one device trains a pool; set "
            "CUDA_VISIBLE_DEVICES to one GPU"
        )
    if not isinstance(model, PreTrainedModel):
        raise BadInput(
            f"model: {type(model).__name__}: give the model that the cluster has opened, without "
            "DistributedDataParallel, FSDP, DeepSpeed, DataParallel, PEFT or torch.compile around "
            "it"
        )
    if type(model).__name__.startswith("FSDP"):
        raise BadInput(
            f"model: {type(model).__name__}: its parameters are sharded over processes; give the "
            "model that the cluster has opened"
        )
