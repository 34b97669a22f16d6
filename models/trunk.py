"""Trunks: transformers models whose routed experts live elsewhere.

A trunk is the unmodified transformers class. Its experts modules are dispatched through
transformers' experts interface (`experts_implementation="moesaic"`), hold no weights, and carry a
`pool` attribute: the callable that computes their layer in the pool. Architectures that do not use
the interface are brought to it by adapters (`adapters.py`).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)

from ..kernels.ffn import ExpertForm
from ..proto.errors import CheckpointError, UnsupportedModel, in_words
from .adapters import ADAPTERS, PoolExperts, adapt
from .files import is_whole
from .fitting import fit
from .generation import generation_config
from .in_pool import IMPLEMENTATION, PoolFunction
from .quantised import FIELDS, forget, quantisation_of

# What transformers raises for values that make no model.
_CANNOT_BUILD = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(RuntimeError, TypeError, ValueError),
)
# Types of models that transformers lacks -> our module that makes it know them.
OWN = {"grok-1": "grok1", "openmoe": "openmoe"}
# What such models call themselves in ``architectures``, where their model_type is another's.
_OWN_BY_ARCHITECTURE = {"OpenMoeForCausalLM": "openmoe"}
# Types of models that transformers computes wrongly, and how.
BROKEN = {
    "nllb-moe": "transformers reads the gate's one-hot mask as expert numbers, so only experts 0 "
    "and 1 are ever asked and its texts are wrong, in a pool or out of one; use a dense NLLB",
}
# Names that configurations have for the number of experts, and for which layers have some.
_COUNTS = (
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    *("num_routed_experts", "moe_num_primary_experts"),
)
_DENSE = (
    *("first_k_dense_replace", "num_dense_layers", "dense_layers", "mlp_only_layers"),
    *("decoder_sparse_step", "sparse_step", "encoder_sparse_step", "mlp_layer_types"),
    *("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval", "moe_layer_freq"),
    *("moe_layers", "interleave_moe_layer_step", "expert_layer_period", "expert_layer_offset"),
    *("layers_block_type", "enable_moe_block", "num_sparse_encoder_layers"),
    "num_sparse_decoder_layers",
)


@dataclass(frozen=True, slots=True)
class ExpertsLayer:
    """One experts module of a model and what a host must know of it."""

    layer: int
    name: str
    module: nn.Module
    num_experts: int
    hidden_size: int

    @property
    def up_name(self) -> str:
        return "gate_up_proj" if self.module.has_gate else "up_proj"

    @property
    def has_post_norm(self) -> bool:
        """Older transformers know of none."""
        return getattr(self.module, "has_post_expert_norm", False)

    def form(self) -> ExpertForm:
        module: Any = self.module
        return ExpertForm(
            transposed=module.is_transposed,
            activate=module._apply_gate if module.has_gate else module.act_fn,
            post_norm=module.post_expert_norm if self.has_post_norm else None,
        )


def is_experts_module(module: nn.Module) -> bool:
    """True for every class under transformers' `use_experts_implementation`, and every adapter's
    experts."""
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "has_gate")


def _layer_numbers(names: list[str]) -> list[int]:
    """The number that people know a layer by, its index among decoder layers, if it is unique."""
    numbers = [[int(n) for n in re.findall(r"\.(\d+)(?=\.|$)", name)] for name in names]
    last = [found[-1] if found else -1 for found in numbers]
    unique = len(set(last)) == len(last) and min(last, default=-1) >= 0
    return last if unique else list(range(len(names)))


def _sizes(module: Any) -> tuple[int, int]:
    """(number of experts, hidden size) from the parameters' shapes, which configs name freely."""
    down = module.down_proj
    hidden = down.shape[2] if module.is_transposed else down.shape[1]
    return down.shape[0], hidden


def _why_no_experts(model: nn.Module) -> str:
    """Of a model in which no experts module is: an architecture without any, or one whose
    configuration asks for none."""
    here = vars(sys.modules[type(model).__module__])
    has_some = "use_experts_implementation" in here or "PoolExperts" in here
    if not has_some and not ADAPTERS.keys() & here.keys():
        return (
            "no experts module of this architecture dispatches through transformers' experts "
            "interface, and it has no adapter, so its experts cannot be served from a pool; models "
            "of the Mixtral, Qwen-MoE, OLMoE, DeepSeek, gpt-oss ... families can"
        )
    config: Any = model.config
    text = config.get_text_config()
    values = text.to_dict()
    values |= {f"ffn_config.{n}": v for n, v in (values.get("ffn_config") or {}).items()}
    none = next((n for n in values if n.rpartition(".")[2] in _COUNTS and values[n] == 0), None)
    if none is not None:
        return (
            f"config.{none} is {values[none]}: the model has no experts, so there is nothing to "
            "serve from a pool; serve it with transformers or vLLM alone"
        )
    layers = getattr(text, "num_hidden_layers", "all")
    said = [f"{n}={_short(values[n])}" for n in _DENSE if values.get(n) is not None]
    return (
        f"{', '.join(said) or 'config.json'} of {layers} layers: no sparse layer, so there are no "
        "experts to serve from a pool; serve it with transformers or vLLM alone"
    )


def _short(value: Any) -> str:
    many = isinstance(value, list) and len(value) > 8
    return f"[{', '.join(map(repr, value[:3]))}, ...]" if many else repr(value)


def experts_layers(model: nn.Module) -> list[ExpertsLayer]:
    """The experts modules of a model that still has its (possibly meta) expert parameters.

    Raises UnsupportedModel if there are none.
    """
    found = [(name, m) for name, m in model.named_modules() if is_experts_module(m)]
    if not found:
        raise UnsupportedModel(f"{type(model).__name__}: {_why_no_experts(model)}")
    numbers = _layer_numbers([name for name, _ in found])
    layers = [
        ExpertsLayer(number, name, module, *_sizes(module))
        for number, (name, module) in zip(numbers, found, strict=True)
    ]
    if not all(layer.num_experts for layer in layers):
        raise UnsupportedModel(f"{type(model).__name__}: {_why_no_experts(model)}")
    return layers


def read_config(path: Path) -> PretrainedConfig:
    """The configuration of a model folder. Raises CheckpointError if there is none to be read, and
    UnsupportedModel for a quantisation that is not known."""
    if not is_whole(path / "config.json"):
        raise CheckpointError(f"{path}: {_what_without_config(path)}")
    try:
        config = _own_config(path)
        if config is None:
            # Code of the model's own is never run, and nobody is asked whether it may.
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (*_CANNOT_BUILD, OSError, StrictDataclassError) as error:
        text = " ".join((str(error) or in_words(error)).split())
        raise CheckpointError(f"{path}/config.json: {text}") from error
    quantisation_of(config, path)
    return config


def _what_without_config(path: Path) -> str:
    if (path / "adapter_config.json").is_file():
        return (
            "holds an adapter (adapter_config.json), no model; merge it into its base model and "
            "give the folder of the result"
        )
    if gguf := sorted(file.name for file in path.glob("*.gguf")):
        return f"no config.json; {gguf[0]} is a GGUF file, which only `moesaic upcycle` reads"
    return "no config.json; give the folder of a Hugging Face model"


def _own_config(path: Path) -> PretrainedConfig | None:
    """The configuration of a model that transformers lacks; None for any other."""
    try:
        values: Any = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"not a valid JSON file: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"holds {_short(values)} instead of an object with model_type and the model's other "
            "fields"
        )
    for field in FIELDS:
        if values.get(field) is not None and not isinstance(values[field], dict):
            raise ValueError(f"{field}: {_short(values[field])} is not a mapping")
    architectures = values.get("architectures") or [None]
    if not isinstance(architectures, list):
        raise ValueError(f"architectures: {_short(architectures)} is not a list")
    own = _OWN_BY_ARCHITECTURE.get(str(architectures[0]), str(values.get("model_type")))
    return config_from_dict(values | {"model_type": own}) if own in OWN else None


def config_from_dict(values: dict[str, Any]) -> PretrainedConfig:
    """The configuration that ``PretrainedConfig.to_dict`` described."""
    rest = dict(values)
    model_type = rest.pop("model_type", None)
    if not model_type:
        raise UnsupportedModel("model_type: missing from the model's configuration")
    if model_type in OWN:
        import_module(f".{OWN[model_type]}", __package__)
    return AutoConfig.for_model(model_type, **rest)


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model of ``config`` on the meta device: shapes and forms, no memory.

    Raises CheckpointError and UnsupportedModel.
    """
    auto, _ = _generating_class(config)
    try:
        with torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=False)
            adapt(model)
    except _CANNOT_BUILD as error:
        raise CheckpointError(
            f"config.json: no model of type {config.model_type!r} can be built of it: "
            f"{_why_not_built(config, error)}"
        ) from error
    return model


def _why_not_built(config: PretrainedConfig, error: Exception) -> str:
    """With the fields whose value transformers has looked up in vain: of a KeyError its message
    has the value alone."""
    if not isinstance(error, KeyError) or not error.args:
        return str(error) or in_words(error)
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
    """Whether transformers alone made it: no class of ours, and no adapter in it."""
    ours = any(isinstance(module, PoolExperts) for module in model.modules())
    return not ours and type(model).__module__.startswith("transformers.")


def strip_experts(model: nn.Module) -> None:
    """Remove the parameters of every experts module, its post-expert norm included."""
    for module in model.modules():
        if is_experts_module(module):
            for submodule in module.modules():
                for name in list(submodule._parameters):
                    del submodule._parameters[name]
                # transformers' weight initialisation would touch the parameters that are gone
                submodule._is_hf_initialized = True  # pyright: ignore[reportArgumentType]


def _generating_class(config: PretrainedConfig) -> tuple[Any, type[PreTrainedModel]]:
    """transformers' automatic class for models that give a text, and the one of ``config``."""
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
            f"model_type: {config.model_type!r} is no causal language model of transformers, and "
            "no encoder with a decoder"
        ) from None


def _trunk_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    _, base = _generating_class(config)

    def init(self: Any, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        adapt(self)
        strip_experts(self)

    # The module's name keeps transformers' heuristics on a class's source file working.
    return type(base.__name__, (base,), {"__init__": init, "__module__": base.__module__})


def load_trunk(path: Path, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model in ``path`` without its routed experts, which are never read.

    transformers gets the tensors that it is to read, each dequantised when it asks for it. Its own
    ways to them are not taken: it would follow any file name, and read pickles; where there is a
    GPU it keeps quantised weights as they are; and it loads codes without scales as weights.

    Attach it with `connect_experts` before the first call. Raises CheckpointError and
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
        loaded: Any = _trunk_class(config).from_pretrained(
            None,
            state_dict=tensors,
            generation_config=generation_config(path),
            config=built.config,  # of a model of text and images the text's
            dtype=dtype,
            experts_implementation=IMPLEMENTATION,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they can be named
        )
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    trunk, info = loaded
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:5])
        raise CheckpointError(f"{path}: the checkpoint lacks {missing}")
    if info["mismatched_keys"]:
        name, given, wanted = sorted(info["mismatched_keys"])[0]
        raise CheckpointError(
            f"{path}: {name} has shape {tuple(given)}, the configuration gives {tuple(wanted)}"
        )
    trunk.requires_grad_(False)
    return trunk.to(device).eval()


def connect_experts(
    model: nn.Module, layers: list[ExpertsLayer], pool: Callable[[int], PoolFunction]
) -> None:
    """Let ``pool(layer)`` compute each experts module of ``model`` from the next call on."""
    modules = dict(model.named_modules())
    for layer in layers:
        modules[layer.name].pool = pool(layer.layer)  # pyright: ignore[reportArgumentType]


def disconnect_experts(model: nn.Module) -> None:
    for module in model.modules():
        if is_experts_module(module) and hasattr(module, "pool"):
            del module.pool


def passes(model: PreTrainedModel) -> list[nn.Module]:
    """The modules whose forward is a pass over a batch of its own: the model, and its encoder,
    which generation runs before it."""
    return [model, model.get_encoder()] if model.config.is_encoder_decoder else [model]


def expert_parameters(layer: ExpertsLayer) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of an experts module that have one slice for each expert."""
    for name in (layer.up_name, "down_proj", f"{layer.up_name}_bias", "down_proj_bias"):
        parameter = layer.module._parameters.get(name)
        if parameter is not None:
            yield name, parameter


def expert_bytes(layer: ExpertsLayer, dtype: torch.dtype) -> int:
    """Memory of one expert of a layer."""
    return sum(p[0].numel() for _, p in expert_parameters(layer)) * dtype.itemsize
