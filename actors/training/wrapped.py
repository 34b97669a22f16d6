"""Models that are wrapped or spread over processes, which a pool's optimizer cannot train."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from ...proto.errors import BadInput


def check_one_process() -> None:
    """Raise BadInput in a group of processes: each would have a run of its own over one pool."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        processes = distributed.get_world_size()
        if processes > 1:
            raise BadInput(
                f"torch.distributed has {processes} processes, and one process trains a pool; "
                "start the trainer without torchrun or accelerate launch, and use accumulation "
                "for larger batches"
            )


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
