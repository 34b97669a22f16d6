"""`save_pretrained` of a trunk that is trained, which writes the experts, too."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ...proto.errors import BadInput

_ELSEWHERE = {
    "push_to_hub": "save the folder first, and upload it with huggingface_hub",
    "variant": "rename the files afterwards",
    "distributed_checkpoint": "it is for models that are sharded over processes",
}


class WholeSaves:
    """Lets ``save(folder, max_shard_size)`` do what `save_pretrained` of a trunk is asked for.

    A trunk has no experts, so transformers would write a folder without them, and nobody would
    notice before it is loaded. Without ``save``, and for options that it has no counterpart for,
    `save_pretrained` raises BadInput. So does that of models inside of the trunk, such as its base
    model. `close` undoes all of it.
    """

    def __init__(self, trunk: PreTrainedModel) -> None:
        self.save: Callable[[Path, int | str | None], None] | None = None
        self._trunk = trunk
        self._inner = [
            (name, one)
            for name, one in trunk.named_modules()
            if isinstance(one, PreTrainedModel) and one is not trunk
        ]
        untyped: Any = trunk
        untyped.save_pretrained = self._save_pretrained
        for name, one in self._inner:
            one.save_pretrained = _refusing(name)

    def close(self) -> None:
        for model in (self._trunk, *(one for _, one in self._inner)):
            vars(model).pop("save_pretrained", None)

    def _save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        if self.save is None:
            raise BadInput(
                "save_pretrained: the experts are in the pool, and no PoolOptimizer is there to "
                "save them with the trunk; make one first"
            )
        for name, what in _ELSEWHERE.items():
            if options.get(name):
                raise BadInput(
                    f"save_pretrained: {name}={options[name]!r}: experts are on their hosts, and a "
                    f"model in training is not saved this way; {what}"
                )
        for name in ("save_original_format", "safe_serialization"):
            if options.get(name) is False:
                raise BadInput(
                    f"save_pretrained: {name}=False: a model in training is saved as safetensors, "
                    "under the names that the model was published with; leave it out"
                )
        if state_dict is not None and not self._is_own(state_dict):
            raise BadInput(
                "save_pretrained: state_dict: it is not the trunk's own; other tensors cannot be "
                "saved together with the experts in the pool; leave it out"
            )
        if is_main_process:
            self.save(Path(save_directory), options.get("max_shard_size"))

    def _is_own(self, given: Mapping[str, Tensor]) -> bool:
        """Return whether these are the trunk's tensors, as `Accelerator.get_state_dict` gives."""
        own = self._trunk.state_dict()
        return given.keys() == own.keys() and all(
            one.data_ptr() == own[name].data_ptr() for name, one in given.items()
        )


def _refusing(name: str) -> Callable[..., None]:
    def save_pretrained(*_: object, **__: object) -> None:
        raise BadInput(
            f"save_pretrained of {name}: its experts are in the pool; save the whole model"
        )

    return save_pretrained
