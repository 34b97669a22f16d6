"""A Hugging Face folder of a model whose trunk and experts are in different places.

The folder is what `save_pretrained` of the whole model would write. The model is never whole in
memory: each tensor is written to its place as soon as it is there.

Shape suffixes: E = experts of a layer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...proto.errors import CheckpointError, describe_error
from ..folder.files import INDEX_FILE
from ..folder.tokenizer import tokenizer_files
from ..trunk.experts_layers import expert_parameters, shared_parameters
from ..trunk.fitting import first_few
from .draft import new_folder
from .plan import ExportPlan, trunk_tensors
from .tensor_file import TensorFile

# layer -> (expert, its tensors by their names in the pool) of each expert of the layer, in any
# order. Tensors may change as soon as the next expert is asked for.
ExpertsOf = Callable[[int], Iterable[tuple[int, Mapping[str, Tensor]]]]


def export_model(
    target: Path,
    plan: ExportPlan,
    trunk: PreTrainedModel,
    experts: ExpertsOf,
    *,
    source: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write the folder ``target``, whole or not at all, of ``trunk`` and ``experts``.

    ``plan`` is that of the trunk, which may have other values by now. ``source`` is a folder whose
    tokenizer is copied. Any thread may call this; the tensors must not change meanwhile. Besides
    the trunk, memory is needed for one layer's experts twice: as they are in the model, and as they
    are on disk.

    Raises CheckpointError if trunk or experts are not those of the plan, or the folder cannot be
    written; also if it exists, unless ``overwrite``.
    """
    with writing(target, new_folder(target, overwrite=overwrite)) as draft:
        write_model(draft, plan, trunk, experts, source)


@contextmanager
def writing(target: Path, draft: AbstractContextManager[Path]) -> Iterator[Path]:
    """Yield the draft of ``target``. Raises CheckpointError in place of OSError."""
    try:
        with draft as folder:
            yield folder
    except FileExistsError as error:
        raise CheckpointError(
            f"{target}: exists already; give another folder, or say that it is to be overwritten"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {describe_error(error)}") from error


def write_model(
    folder: Path,
    plan: ExportPlan,
    trunk: PreTrainedModel,
    experts: ExpertsOf,
    source: Path | None = None,
) -> None:
    """Write what ``plan`` says into an empty folder. Raises CheckpointError and OSError."""
    for file in tokenizer_files(source) if source is not None else ():
        shutil.copyfile(file, folder / file.name)
    plan.config.save_pretrained(folder)
    if plan.generation is not None:
        plan.generation.save_pretrained(folder)
    with ExitStack() as stack:
        files: dict[str, TensorFile] = {}
        for file, tensors in plan.files.items():
            opened = stack.enter_context(TensorFile(folder / file, tensors))
            files |= dict.fromkeys(tensors, opened)

        def write(tensors: Mapping[str, Tensor]) -> None:
            for name, tensor in plan.on_disk(tensors).items():
                files[name].write(name, tensor)

        own = trunk_tensors(trunk)
        if differ := own.keys() ^ {name for names in plan.trunk for name in names}:
            raise CheckpointError(
                f"{type(trunk).__name__}: {first_few(sorted(differ))}: the trunk has changed since "
                "the export was planned; plan it again"
            )
        for names in plan.trunk:
            write({name: own[name].cpu() for name in names})
        for layer in plan.layers:
            write(_layer(plan, layer, experts(layer)))
        for name, stored in plan.unread.items():
            like = plan.files[files[name].file.name][name]
            # transformers loads no folder without them, whatever they are.
            tensor = torch.zeros(like.shape) if stored is None else stored.read(None)
            files[name].write(name, tensor.to(like.dtype))
    if len(plan.files) > 1:
        index = {
            "metadata": plan.metadata,
            "weight_map": {name: file for file, names in plan.files.items() for name in names},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / INDEX_FILE).write_text(text, encoding="utf-8")


def _layer(
    plan: ExportPlan, number: int, experts: Iterable[tuple[int, Mapping[str, Tensor]]]
) -> dict[str, Tensor]:
    """Return {name in the model: tensor (E, ...)} of a layer's experts. Raises CheckpointError."""
    layer = plan.layers[number]
    stacked = {
        layer.pool_name(name): torch.empty(parameter.shape, dtype=plan.dtype)
        for name, parameter in expert_parameters(layer)
    }
    # Each expert has a copy of them, all alike.
    shared = {
        layer.pool_name(name): torch.empty(parameter.shape, dtype=plan.dtype)
        for name, parameter in shared_parameters(layer)
    }
    lacking = set(range(layer.num_experts))
    for expert, tensors in experts:
        if expert not in lacking:
            raise CheckpointError(
                f"expert {expert} of layer {number} was given twice"
                if 0 <= expert < layer.num_experts
                else f"expert {expert} of layer {number}: the layer has {layer.num_experts} experts"
            )
        lacking.remove(expert)
        wanted = {name: all_E[expert] for name, all_E in stacked.items()} | shared
        _check_expert(f"expert {expert} of layer {number}", wanted, tensors)
        for name, tensor in tensors.items():
            wanted[name].copy_(tensor)
    if lacking:
        raise CheckpointError(
            f"expert {min(lacking)} of layer {number} is missing, so the model would not be whole"
        )
    return {
        f"{layer.name}.{name}": (stacked | shared)[layer.pool_name(name)]
        for name, _ in (*expert_parameters(layer), *shared_parameters(layer))
    }


def _check_expert(which: str, wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    forms = [
        {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        for tensors in (wanted, given)
    ]
    if forms[0] != forms[1]:
        raise CheckpointError(f"{which} has tensors {forms[1]}, and the model's are {forms[0]}")
