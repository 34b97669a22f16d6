"""Trunks: transformers models whose routed experts live elsewhere.

A trunk is the unmodified transformers class. Its experts modules are dispatched through
transformers' experts interface (`experts_implementation="moesaic"`), hold no weights, and have an
attribute `pool`, the callable that computes their layer in the pool. Adapters (`adapters.py`)
connect architectures that do not use the interface.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)

from ...proto.errors import CheckpointError, UnsupportedModel, describe_error
from ..folder.generation import generation_config
from ..folder.quantised import forget
from .adapters import PoolExperts, adapt
from .config import CANNOT_BUILD, read_config
from .experts_layers import ExpertsLayer, experts_layers, is_experts_module
from .fitting import fit
from .in_pool import IMPLEMENTATION, LearningPool, PoolFunction

# transformers sets the default type of the whole process while it builds a model; of two threads
# that do so at once, one would leave the other's behind.
_BUILDING = threading.RLock()
# Types of models that transformers computes wrongly, and how.
BROKEN = {
    "nllb-moe": "transformers reads the gate's one-hot mask as expert numbers, so only experts 0 "
    "and 1 are ever asked and its texts are wrong, in a pool or out of one; use a dense NLLB",
}


def meta_model(config: PretrainedConfig, *, adapted: bool = True) -> PreTrainedModel:
    """Build the model of ``config`` on the meta device, with shapes and without memory.

    If not ``adapted``, it is transformers' own model, also where experts need an adapter. Raises
    CheckpointError and UnsupportedModel.
    """
    auto, _ = _generating_class(config)
    try:
        with _BUILDING, torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=False)
            if adapted:
                adapt(model)
    except CANNOT_BUILD as error:
        raise CheckpointError(
            f"config.json: no model of type {config.model_type!r} can be built of it: "
            f"{_why_not_built(config, error)}"
        ) from error
    return model


def _why_not_built(config: PretrainedConfig, error: Exception) -> str:
    """Return the reason, with the fields whose value transformers does not know.

    The message of a KeyError has only the value, so the fields with this value are searched.
    """
    if not isinstance(error, KeyError) or not error.args:
        return str(error) or describe_error(error)
    pending: list[tuple[str, Any]] = [("", config.to_dict())]
    fields = []
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict):
            pending += [(f"{name}.{key}".lstrip("."), each) for key, each in value.items()]
        elif value == error.args[0]:
            fields.append(name)
    return f"{', '.join(sorted(fields)) or 'it lacks'}: {error} is not known to transformers"


def is_unmodified(model: PreTrainedModel) -> bool:
    """Return whether it has no class of ours and no adapter, only transformers' own modules."""
    ours = any(isinstance(module, PoolExperts) for module in model.modules())
    return not ours and type(model).__module__.startswith("transformers.")


def strip_experts(model: nn.Module) -> None:
    """Remove the parameters of every experts module, its post-expert norm included."""
    for module in model.modules():
        if is_experts_module(module):
            for submodule in module.modules():
                for name in list(submodule._parameters):
                    del submodule._parameters[name]
                # transformers' weight initialisation would access the removed parameters
                submodule._is_hf_initialized = True  # pyright: ignore[reportArgumentType]


def _generating_class(config: PretrainedConfig) -> tuple[Any, type[PreTrainedModel]]:
    """Return transformers' automatic class for models that generate text, and that of ``config``.

    Raises UnsupportedModel.
    """
    if config.model_type in BROKEN:
        raise UnsupportedModel(f"model_type: {config.model_type!r}: {BROKEN[config.model_type]}")
    encodes = getattr(config, "is_encoder_decoder", False)
    auto: Any = AutoModelForSeq2SeqLM if encodes else AutoModelForCausalLM
    try:
        return auto, auto._model_mapping[type(config)]
    except KeyError:
        if type(config) in AutoModelForImageTextToText._model_mapping:
            raise UnsupportedModel(
                f"model_type: {config.model_type!r} is a model of images and text, and "
                "transformers has no class that loads its text alone; only text is served"
            ) from None
        raise UnsupportedModel(
            f"model_type: {config.model_type!r} is neither a causal language model nor an "
            "encoder-decoder of transformers"
        ) from None


def _trunk_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    _, base = _generating_class(config)

    def init(self: Any, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        adapt(self)
        strip_experts(self)

    # transformers looks at a class's source file; the module's name keeps that working.
    return type(base.__name__, (base,), {"__init__": init, "__module__": base.__module__})


def load_trunk(path: Path, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load the model in ``path`` without its routed experts, which are never read.

    transformers gets a state dict of lazy tensors, each dequantised when it is read. transformers
    does not read the folder itself, because it would follow any file name, read pickles, keep
    quantised weights as they are if there is a GPU, and load codes without scales as weights.

    Attach the model with `connect_experts` before the first call. Raises CheckpointError and
    UnsupportedModel.
    """
    config = read_config(path)
    built = meta_model(config)
    experts = tuple(f"{layer.name}." for layer in experts_layers(built))
    fitting = fit(path, config, built)
    fitting.check()
    tensors = {
        name: fitting.tensors[name]
        for target, source in fitting.sources.items()
        if not target.startswith(experts)
        for name in source.names
    }
    for part in (config, built.config):
        forget(part)
    try:
        with _BUILDING:
            loaded: Any = _trunk_class(config).from_pretrained(
                None,
                state_dict=tensors,
                generation_config=generation_config(path),
                config=built.config,  # for a model of text and images, that of its text model
                dtype=dtype,
                experts_implementation=IMPLEMENTATION,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that the error below can name them
            )
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    trunk, info = loaded
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:5])
        raise CheckpointError(
            f"{path}: the checkpoint lacks the tensors {missing}; download the model again"
        )
    if info["mismatched_keys"]:
        name, given, wanted = sorted(info["mismatched_keys"])[0]
        raise CheckpointError(
            f"{path}: {name} has shape {tuple(given)}, the configuration gives {tuple(wanted)}; "
            "config.json or the tensors belong to another model"
        )
    # `from_pretrained` keeps those of the tensors that it was given, and experts have others.
    trunk._weight_conversions = fitting.transforms
    trunk.name_or_path = trunk.config._name_or_path = str(path)  # its tokenizer is found by this
    trunk.requires_grad_(False)
    return trunk.to(device).eval()


def connect_experts(
    model: nn.Module, layers: list[ExpertsLayer], pool: Callable[[int], PoolFunction | LearningPool]
) -> None:
    """Let ``pool(layer)`` compute each experts module of ``model`` from the next call on."""
    modules = dict(model.named_modules())
    for layer in layers:
        modules[layer.name].pool = pool(layer.layer)  # pyright: ignore[reportArgumentType]


def disconnect_experts(model: nn.Module) -> None:
    for module in model.modules():
        if is_experts_module(module) and hasattr(module, "pool"):
            del module.pool


def forward_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules whose forward is a pass over a batch of its own.

    They are the model, and its encoder, if any, which generation runs before it.
    """
    return [model, model.get_encoder()] if model.config.is_encoder_decoder else [model]
