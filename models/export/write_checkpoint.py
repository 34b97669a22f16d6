"""Writing a training checkpoint: everything that a run needs to go on.

The folder is a Hugging Face model (`export_model`), and beside its files are ``state/``, with what
training has besides the weights, and ``manifest.json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ...proto.errors import CheckpointError
from ..folder.expert_file import Place, write_experts
from ..folder.files import INDEX_FILE
from ..trunk.checkpoint import Checkpoint
from .draft import filled_folder, new_folder
from .export import ExpertsOf, write_model, writing
from .manifest import (
    MANIFEST_FILE,
    Manifest,
    StoredExpert,
    StoredPart,
    stored_file,
    sum_of_tensors,
)
from .plan import ExportPlan

STATE_FOLDER = "state"
# What a checkpoint replaces in a folder that exists, beside the files that it brings.
_REPLACED = (f"{STATE_FOLDER}/*.safetensors", "model*.safetensors", INDEX_FILE)
MAX_PART_BYTES = 2 * 10**9  # of a file in ``state/``, unless one expert's state is larger

# layer -> (expert, {"NAME.KIND": tensor}) of each expert, such as "up.exp_avg" or "down.master"
StateOf = Callable[[int], Iterable[tuple[int, Mapping[str, Tensor]]]]


def write_checkpoint(
    target: Path,
    plan: ExportPlan,
    trunk: PreTrainedModel,
    experts: ExpertsOf,
    *,
    step: int,
    run: Mapping[str, Any],
    state: StateOf | None = None,
    trunk_state: Iterable[tuple[str, Tensor]] = (),
    source: Path | None = None,
    max_part_bytes: int = MAX_PART_BYTES,
    into: bool = False,
) -> None:
    """Write the folder ``target``, whole or not at all, and return when it is on the disk.

    With ``into`` the folder may exist, and other files in it stay; it is no checkpoint while files
    are moved into it, as they are when all are written.

    ``plan``, ``trunk``, ``experts`` and ``source`` are those of `export_model`. ``run`` is the
    run's own state, and ``state`` and ``trunk_state`` are fp32 masters and the optimizer's state
    under names of their own; they are asked for after the weights. Any thread may call this; the
    tensors must not change meanwhile. Besides the memory of `export_model`, a file of ``state/``
    is in memory.

    Raises CheckpointError if the tensors are not those of the model, or the folder cannot be
    written or exists.
    """
    try:
        run = json.loads(json.dumps(run))  # as it will be read: with keys of text
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"run: its state cannot be written as JSON: {error}") from error
    sums: dict[Place, str] = {}

    def counted(layer: int) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
        for expert, tensors in experts(layer):
            sums[layer, expert] = sum_of_tensors(tensors)
            yield expert, tensors

    new = filled_folder(target, MANIFEST_FILE, _REPLACED) if into else new_folder(target)
    with writing(target, new) as draft:
        write_model(draft, plan, trunk, counted, source)
        (draft / STATE_FOLDER).mkdir()
        states: dict[Place, StoredPart | None] = {}
        if state is not None:
            for layer, one in plan.layers.items():
                parts = _Parts(draft, f"layer-{layer:05d}", max_part_bytes)
                states |= parts.write_experts(layer, one.num_experts, state(layer))
        trunk_files = _Parts(draft, "trunk", max_part_bytes).write_tensors(trunk_state)
        # The reader of the pool says where each expert is.
        written = Checkpoint(draft, plan.config, dtype=plan.dtype, model=plan.model)
        Manifest(
            step=step,
            run=run,
            dtype=str(plan.dtype).removeprefix("torch."),
            files={
                file.relative_to(draft).as_posix(): stored_file(file)
                for file in sorted(draft.rglob("*"))
                if file.is_file()
            },
            layers={layer: one.num_experts for layer, one in plan.layers.items()},
            experts={
                place: StoredExpert(
                    StoredPart(tuple(file.name for file in written.files(*place)), found),
                    states.get(place),
                )
                for place, found in sorted(sums.items())
            },
            trunk_state=tuple(trunk_files),
        ).write(draft)


class _Parts:
    """Files of one name and rising numbers in ``state/``, each of at most some bytes."""

    def __init__(self, folder: Path, name: str, most_bytes: int) -> None:
        self._folder, self._name, self._most_bytes = folder, name, most_bytes
        self._count = 0

    def write_experts(
        self, layer: int, count: int, experts: Iterable[tuple[int, Mapping[str, Tensor]]]
    ) -> dict[Place, StoredPart | None]:
        """Write the state of a layer's ``count`` experts; return where each is, or None if empty.

        Raises CheckpointError and OSError.
        """
        found: dict[Place, StoredPart | None] = {}
        lacking = {(layer, expert) for expert in range(count)}
        pending: dict[Place, dict[str, Tensor]] = {}
        size_bytes = 0

        def write() -> None:
            file = self._next()
            write_experts(self._folder / file, pending)
            for place, tensors in pending.items():
                found[place] = StoredPart((file,), sum_of_tensors(tensors))

        for expert, tensors in experts:
            place = layer, expert
            if place not in lacking:
                again = "was given twice" if 0 <= expert < count else f"is not one of {count}"
                raise CheckpointError(f"state: expert {expert} of layer {layer} {again}")
            lacking.remove(place)
            if not tensors:
                found[place] = None
                continue
            more_bytes = sum(tensor.nbytes for tensor in tensors.values())
            if pending and size_bytes + more_bytes > self._most_bytes:
                write()
                pending, size_bytes = {}, 0
            pending[place] = {name: _copy(tensor) for name, tensor in tensors.items()}
            size_bytes += more_bytes
        if lacking:
            raise CheckpointError(f"state: expert {min(lacking)[1]} of layer {layer} is missing")
        if pending:
            write()
        return found

    def write_tensors(self, tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
        """Write tensors; return the files. Raises CheckpointError and OSError."""
        files: list[str] = []
        names: set[str] = set()
        pending: dict[str, Tensor] = {}
        size_bytes = 0
        for name, tensor in tensors:
            if name in names:
                raise CheckpointError(f"trunk_state: {name} was given twice")
            names.add(name)
            if pending and size_bytes + tensor.nbytes > self._most_bytes:
                files.append(self._save(pending))
                pending, size_bytes = {}, 0
            pending[name] = _copy(tensor)
            size_bytes += tensor.nbytes
        if pending:
            files.append(self._save(pending))
        return files

    def _save(self, tensors: dict[str, Tensor]) -> str:
        file = self._next()
        try:
            save_file(tensors, self._folder / file)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        return file

    def _next(self) -> str:
        self._count += 1
        return f"{STATE_FOLDER}/{self._name}-{self._count:05d}.safetensors"


def _copy(tensor: Tensor) -> Tensor:
    """Return a copy that stays when the caller uses the memory again."""
    return tensor.detach().to("cpu", copy=True).contiguous()
