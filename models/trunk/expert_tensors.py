"""One expert's tensors: as its checkpoint has them, and as the pool has them.

The pool has the same names for the experts of all models: up, down, up_bias and down_bias, and
norm and norm_bias for the norm that all experts of a layer may share, of which each expert has a
copy. A checkpoint has names of its own, and tensors that are transposed, split or fused otherwise;
transformers' operations lead from there to a model in memory, and back.

A checkpoint with one tensor for all experts of a layer has no name for one expert's part. Here the
part of expert 3 is called ``NAME[3]``, and has the tensor's shape without the first dimension; if
the experts lie one below the other in that dimension, it has the expert's rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter

from ...proto.errors import CheckpointError, UnsupportedModel
from .experts_layers import ExpertsLayer, expert_parameters, expert_shapes, shared_parameters
from .fitting import Source, convert, first_few

# Any other dtype is quantised, and means something only together with its scales.
PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PART = re.compile(r"(.+)\[(\d+)\]")

# (name on disk, expert or None for the whole tensor, rows of an expert) -> tensor
Fetch = Callable[[str, int | None, int], Tensor]


@dataclass(frozen=True)
class ExpertTensors:
    """The tensors on disk of a model's experts, and their conversion into the pool's and back."""

    model: PreTrainedModel  # on the meta device
    layers: Mapping[int, ExpertsLayer]
    sources: Mapping[str, Source]  # by the names of the model's parameters
    dtype: torch.dtype
    where: str  # of the tensors, for messages

    @classmethod
    def in_memory(
        cls, model: PreTrainedModel, layers: Mapping[int, ExpertsLayer], dtype: torch.dtype
    ) -> ExpertTensors:
        """Return the tensors of a model that has no checkpoint: its parameters."""
        names = [
            f"{layer.name}.{name}"
            for layer in layers.values()
            for name, _ in (*expert_parameters(layer), *shared_parameters(layer))
        ]
        sources = {name: Source(keys={("", None): name}) for name in names}
        return cls(model, layers, sources, dtype, "the tensors")

    # ---- into the pool --------------------------------------------------------------------------

    def read(self, layer: int, expert: int, fetch: Fetch) -> dict[str, Tensor]:
        """Return one expert as the pool has it: in memory of its own, and in the model's dtype.

        Raises CheckpointError if the tensors that ``fetch`` returns do not make the expert.
        """
        experts = self.layers[layer]
        tensors: dict[str, Tensor] = {}
        shapes = expert_shapes(experts)
        shared = [name for name, _ in shared_parameters(experts)]
        for name in (*(name for name, _ in expert_parameters(experts)), *shared):
            target, in_pool = f"{experts.name}.{name}", experts.pool_name(name)
            tensor = self.read_parameter(target, None if name in shared else expert, fetch)
            if tuple(tensor.shape) != shapes[in_pool]:
                raise CheckpointError(
                    f"{self.where}: expert {expert} of {target} has shape {tuple(tensor.shape)}, "
                    f"the configuration gives {shapes[in_pool]}; config.json or the "
                    "tensors belong to another model"
                )
            tensors[in_pool] = tensor.to(self.dtype, copy=True).contiguous()
        return tensors

    def read_parameter(self, target: str, expert: int | None, fetch: Fetch) -> Tensor:
        """Return one parameter: the part of ``expert``, or all of it if that is None."""
        source = self.sources[target]
        collected: dict[str, list[Tensor]] = {}
        for pattern in source.patterns:
            if source.per_expert:
                key = source.keys.get((pattern, expert))
                if key is None:
                    raise CheckpointError(
                        f"{self.where}: the checkpoint has no tensor of expert {expert} for "
                        f"{target}"
                    )
                collected[pattern] = [fetch(key, None, 1)]
            else:
                collected[pattern] = [fetch(source.keys[pattern, None], expert, source.rows)]
        shapes = {pattern: tuple(found[0].shape) for pattern, found in collected.items()}
        if source.converter is None:
            ((tensor,),) = collected.values()
        else:
            try:
                (tensor,) = convert(source.converter, collected, target, self.model).values()
            except (RuntimeError, ValueError, LookupError) as error:
                raise CheckpointError(
                    f"{self.where}: expert {expert} of {target}: the tensors on disk, of shapes "
                    f"{shapes}, do not make this expert: {error}"
                ) from error
        return tensor if expert is None else tensor[0]

    def named(self, tensors: Mapping[str, Tensor]) -> dict[tuple[int, int], dict[str, Tensor]]:
        """Return {(layer, expert): its tensors in the pool} of tensors with names on disk.

        ``tensors`` must have all tensors of each expert, and may have whole tensors of all experts
        of a layer. What the experts of a layer share comes with all of them. Raises
        CheckpointError.
        """
        for name, tensor in tensors.items():
            if tensor.dtype not in PLAIN_DTYPES:
                raise CheckpointError(
                    f"{self.where}: {name} is {tensor.dtype}; weights are given as plain floats, "
                    "also those of a quantised model"
                )

        wanted = {place for name in tensors for place in self._experts_of(name, tensors)}
        return {place: self.read(*place, self._given(tensors)) for place in sorted(wanted)}

    def _given(self, tensors: Mapping[str, Tensor]) -> Fetch:
        """Return how experts are read from tensors with names on disk."""

        def fetch(name: str, expert: int | None, rows: int) -> Tensor:
            part = name if expert is None else f"{name}[{expert}]"
            if part in tensors:
                found = tensors[part]
                if expert is None:
                    return found
                return self._rows(part, found if rows > 1 else found.unsqueeze(0), rows)
            if expert is None or name not in tensors:
                raise CheckpointError(
                    f"{self.where}: {part} is missing; an update must have all tensors of each of "
                    "its experts"
                )
            layer, _ = self._places[name]
            whole = self._rows(name, tensors[name], self.layers[layer].num_experts * rows)
            return whole[expert * rows : (expert + 1) * rows]

        return fetch

    def _rows(self, name: str, tensor: Tensor, wanted: int) -> Tensor:
        if tensor.dim() and len(tensor) == wanted:
            return tensor
        raise CheckpointError(
            f"{self.where}: {name} has shape {tuple(tensor.shape)}; its first dimension has "
            f"{wanted} rows in this model"
        )

    def _experts_of(self, name: str, given: Mapping[str, Tensor]) -> Iterator[tuple[int, int]]:
        """Yield (layer, expert) of the experts of which one of the ``given`` is a tensor."""
        whole, number = name, None
        if name not in self._places and (part := _PART.fullmatch(name)):
            whole, number = part[1], int(part[2])
        layer, expert = self._places.get(whole, (None, None))
        if layer is None or (number is not None and expert is not None):
            raise CheckpointError(
                f"{self.where}: {name} is not a tensor of an expert of this model; its experts "
                f"have tensors such as {first_few(self._examples, 3)}"
            )
        count = self.layers[layer].num_experts
        if number is not None and whole in given:
            raise CheckpointError(f"{self.where}: {name} is given twice, once as part of {whole}")
        if number is not None and name != f"{whole}[{number}]":
            raise CheckpointError(f"{self.where}: {name}: write {whole}[{number}]")
        if number is not None and number >= count:
            raise CheckpointError(f"{self.where}: {name}: layer {layer} has {count} experts")
        only = expert if number is None else number
        yield from ((layer, e) for e in (range(count) if only is None else (only,)))

    @cached_property
    def _places(self) -> dict[str, tuple[int, int | None]]:
        """{name on disk: (layer, expert, or None if it has all experts of the layer)}."""
        return {
            key: (layer.layer, expert if source.per_expert else None)
            for layer in self.layers.values()
            for name, _ in (*expert_parameters(layer), *shared_parameters(layer))
            for source in [self.sources[f"{layer.name}.{name}"]]
            for (_, expert), key in source.keys.items()
        }

    @property
    def _examples(self) -> list[str]:
        return [name if e is not None else f"{name}[0]" for name, (_, e) in self._places.items()]

    # ---- back -----------------------------------------------------------------------------------

    def on_disk(self, layer: int, expert: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return one expert of the pool with the names and shapes of its checkpoint.

        What is read of the result is ``tensors`` again, to the bit. Raises UnsupportedModel for a
        model whose tensors cannot be converted back.
        """
        experts = self.layers[layer]
        found: dict[str, Tensor] = {}
        for name, _ in expert_parameters(experts):
            target = f"{experts.name}.{name}"
            source, tensor = self.sources[target], tensors[experts.pool_name(name)]
            if source.converter is None:
                parts = {pattern: tensor.unsqueeze(0) for pattern in source.patterns}
            else:
                parts = self._reversed(source.converter, tensor.unsqueeze(0), target)
            for pattern in source.patterns:
                part = parts[pattern]
                if source.per_expert:
                    found[source.keys[pattern, expert]] = part.contiguous()
                else:
                    key = f"{source.keys[pattern, None]}[{expert}]"
                    found[key] = (part if source.rows > 1 else part[0]).contiguous()
        for name, _ in shared_parameters(experts):
            target = f"{experts.name}.{name}"
            source, tensor = self.sources[target], tensors[experts.pool_name(name)]
            if source.converter is None:
                parts = dict.fromkeys(source.patterns, tensor)
            else:
                parts = self._reversed(source.converter, tensor, target)
            found |= {source.keys[pattern, None]: parts[pattern] for pattern in source.patterns}
        again = self.read(layer, expert, self._given(found))
        if any(not _same_bits(again[name], tensor) for name, tensor in tensors.items()):
            raise self._not_reversed(f"{experts.name}", "the result is not the same")
        return found

    def _reversed(
        self, converter: WeightConverter, tensor: Tensor, target: str
    ) -> dict[str, Tensor]:
        """Return {source pattern: tensor} that ``converter`` makes ``tensor`` of."""
        # A pattern of many experts is that of the only one here.
        patterns = {p.replace("*", "0"): p for p in converter.source_patterns}
        patterns |= {p: p for p in converter.source_patterns}
        made: dict[str, Any] = {converter.target_patterns[0]: [tensor]}
        try:
            for operation in reversed(deepcopy(converter.operations)):
                made = operation.reverse_op.convert(
                    made,
                    source_patterns=list(converter.target_patterns),
                    target_patterns=list(converter.source_patterns),
                    full_layer_name=target,
                    model=self.model,
                    config=self.model.config,
                    missing_keys=None,
                )
        except (NotImplementedError, RuntimeError, ValueError, LookupError) as error:
            raise self._not_reversed(target, str(error)) from error
        if not made.keys() <= patterns.keys():
            raise self._not_reversed(target, f"it would become {', '.join(made)}")
        return {patterns[p]: t[0] if isinstance(t, list) else t for p, t in made.items()}

    def _not_reversed(self, target: str, why: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{target}: tensors of this model cannot be converted into those of its checkpoint: "
            f"{why}"
        )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are the same, also where they are not numbers."""
    mine, theirs = (tensor.contiguous().view(torch.uint8) for tensor in (one, other))
    return one.dtype == other.dtype and torch.equal(mine, theirs)
