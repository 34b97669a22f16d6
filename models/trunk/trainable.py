"""What of a trunk cannot learn, found before the first step."""

from __future__ import annotations

from torch import nn

from ...proto.errors import UnsupportedModel
from .fitting import first_few


def check_trainable(model: nn.Module) -> None:
    """Raise UnsupportedModel if something in a model of the pool would silently learn wrongly.

    Call it when nothing is added to the model any more.

    - Quantised weights have no gradients. A folder that `load_trunk` has dequantised is fine.
    - Adapters of PEFT train small matrices beside linear layers of this process. Experts are in the
      pool and would get none, and train all of their weights instead.
    """
    name, config = type(model).__name__, getattr(model, "config", None)
    if getattr(model, "hf_quantizer", None) or getattr(config, "quantization_config", None):
        raise UnsupportedModel(
            f"{name}: its weights are quantised, and have no gradients; load it dequantised, in "
            "bfloat16 or float32"
        )
    if adapted := [path for path, module in model.named_modules() if _is_adapter(module)]:
        raise UnsupportedModel(
            f"{name}: adapters of PEFT on {first_few(adapted)} reach no expert: experts are in the "
            "pool and would train all of their weights; train the model without adapters"
        )


def _is_adapter(module: nn.Module) -> bool:
    """Return whether it is a layer of PEFT; the package is not imported for that."""
    return any(base.__module__.startswith("peft.tuners.") for base in type(module).__mro__)
