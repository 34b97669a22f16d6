"""Which tensors on disk make which parameter of a model, and whether they fit.

Only headers are read. transformers' own renamings and conversions map the names, and the
conversions run on tensors of the meta device, which have shapes and no memory. Trunk and hosts read
the tensors that are found here, so `check_folder` can report their errors before anything starts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from ...proto.errors import CheckpointError
from ..folder.files import INDEX_FILE, Listing, list_tensors
from ..folder.quantised import CODES, Quantisation, StoredTensor, quantisation_of, stored_tensors
from .adapters import SplitRows, conversions

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NUMBERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_EXPERT = re.compile(r"(experts?[._])(\d+)(?=\.)")
# Names of codes, scales and zero points: of FP8, compressed-tensors and modelopt; AWQ and GPTQ;
# bitsandbytes; MLX.
_OF_CODES = re.compile(
    r"(^|[._])(((weight|input|output|activation|q|k|v|kv|prob)_scale(_inv|_2)?"
    r"|(weight|input)_(packed|shape|zero_point|global_scale|g_idx)|pre_quant_scale"
    r"|qweight|qzeros|g_idx|scales|biases)"
    r"|SCB|weight_format|(nested_)?(absmax|quant_map)|quant_state\..*)$"
)
# Names of scales of any method, like SmoothQuant's. Next to a tensor that is read they change its
# meaning; elsewhere such a name may be a plain parameter's, like CLIP's logit_scale.
_ANY_SCALE = re.compile(r"scales?($|_)|(^|_)zeros?($|_)")
# Transformers' operations raise these for shapes that do not fit together.
_NOT_CONVERTED = (RuntimeError, ValueError, LookupError)
_SHOWN = 5  # names in a message; the rest is given as a number


@dataclass(frozen=True, slots=True)
class Source:
    """The tensors on disk of one parameter, and their conversion into memory."""

    # (source pattern, expert or None if all are in one tensor) -> tensor name on disk
    keys: dict[tuple[str, int | None], str] = field(default_factory=dict)
    converter: WeightConverter | None = None
    # (source pattern, name) of further tensors that a converter appends, as parts of a table
    further: list[tuple[str, str]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The names of all tensors on disk."""
        return [*self.keys.values(), *(name for _, name in self.further)]

    @property
    def per_expert(self) -> bool:
        return (
            self.converter is not None
            and any(isinstance(op, MergeModulelist) for op in self.converter.operations)
            and all(expert is not None for _, expert in self.keys)
        )

    @property
    def rows(self) -> int:
        """The rows of one expert in a fused tensor's first dimension."""
        operations = self.converter.operations if self.converter is not None else ()
        return next((op.rows for op in operations if isinstance(op, SplitRows)), 1)

    @property
    def patterns(self) -> list[str]:
        """The source patterns in the converter's order, which is not the file's."""
        found = {pattern for pattern, _ in self.keys}
        if self.converter is None:
            return list(found)
        return [p for p in self.converter.source_patterns if p in found]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitting:
    """The comparison of a folder's tensors with a model."""

    path: Path
    quantisation: Quantisation | None
    files: dict[Path, int]  # file -> number of tensors in it
    tensors: dict[str, StoredTensor]  # by their names in a plain checkpoint
    sources: dict[str, Source]  # of parameters and buffers, by their names in the model
    surplus: list[str]  # names on disk of tensors that the model does not use
    transforms: list[WeightTransform]  # those of transformers that apply to one of the names
    errors: list[str]

    def check(self) -> None:
        """Raise CheckpointError if the tensors do not make the model."""
        if self.errors:
            raise CheckpointError(f"{self.path}: {'; '.join(self.errors)}")


def fit(path: Path, config: PretrainedConfig, model: PreTrainedModel) -> Fitting:
    """Compare the headers in folder ``path`` with ``model``.

    The model is on the meta device with its adapters. Raises CheckpointError for damaged files.
    """
    listing = list_tensors(path)
    quantisation = quantisation_of(config, path)
    tensors = stored_tensors(listing.headers, quantisation)
    parameters = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    sources, unused = _map(tensors, model, parameters, [*transforms, *conversions(model)])
    found = _Comparison(path, quantisation, tensors, model, parameters)
    for target, source in sources.items():
        found.compare(target, source)
    missing = parameters.keys() - found.made
    errors = [
        *_missing(_needed(missing, model), sources, listing, found.incomplete),
        *found.errors(),
        *_unused_codes(unused, sources, tensors, model),
    ]
    surplus = [*(tensors[name].key for name in unused), *found.left]
    return Fitting(
        path=path,
        quantisation=quantisation,
        files=dict(Counter(header.file for header in listing.headers.values())),
        tensors=tensors,
        sources=sources,
        surplus=sorted(surplus),
        transforms=[transform for transform in transforms if transform.was_used()],
        errors=errors,
    )


def _map(
    names: Iterable[str],
    model: PreTrainedModel,
    parameters: dict[str, Tensor],
    transforms: Sequence[WeightTransform],
) -> tuple[dict[str, Source], list[str]]:
    """Map names on disk as transformers does.

    Returns {parameter: its source}, and the names that lead to no parameter.
    """
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    prefix = model.base_model_prefix
    sources: dict[str, Source] = {}
    unused: list[str] = []
    # Name with "*" for the expert -> its target. A pattern with a "*" merges all experts, so one of
    # them stands for the others; a model may have 90,000 such names.
    merged: dict[str, tuple[str, str]] = {}
    # Some renamings depend on earlier names; transformers sorts in this way.
    for name in sorted(names, key=_natural_key()):
        number = _EXPERT.search(name)
        form = name if number is None else f"{name[: number.end(1)]}*{name[number.end() :]}"
        target, pattern = merged.get(form, (None, None))
        if target is None:
            target, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
            if target not in parameters and name in parameters:
                target, pattern = rename_source_key(name, [], [], prefix, parameters)
            if number is not None and pattern is not None and "*" in pattern:
                merged[form] = target, pattern
        if target not in parameters:
            unused.append(name)
            continue
        converter = by_pattern[pattern] if pattern else None
        source = sources.get(target)
        if source is None:
            source = sources[target] = Source(converter=converter)
        key = pattern or "", int(number[2]) if number else None
        # As in transformers, the first one counts if two names lead to the same place.
        if source.converter is converter and key not in source.keys:
            source.keys[key] = name
        elif source.converter is converter is not None and number is None:
            source.further.append((key[0], name))
        else:
            unused.append(name)
    return sources, unused


def _natural_key() -> Callable[[str], list[Any]]:
    """Return a function equal to transformers' `dot_natural_key`, which sorts names.

    It makes the key of each part of a name once; 90,000 names have a few hundred different parts.
    """
    known: dict[str, Any] = {}

    def key_of(part: str) -> Any:
        if part not in known:
            (known[part],) = dot_natural_key(part)
        return known[part]

    return lambda name: [key_of(part) for part in name.split(".")]


def convert(
    converter: WeightConverter,
    collected: dict[str, list[Tensor]],
    target: str,
    model: PreTrainedModel,
) -> dict[str, Any]:
    """Run transformers' own operations on {source pattern: tensors}; return {parameter: tensor}."""
    own: Any = deepcopy(converter)
    own.collected_tensors = {p: [lambda t=t: t for t in ts] for p, ts in collected.items()}
    made = own.convert(target, model=model, config=model.config)
    return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}


class _Comparison:
    """A comparison of shapes and dtypes on disk with those of the model."""

    def __init__(
        self,
        path: Path,
        quantisation: Quantisation | None,
        tensors: dict[str, StoredTensor],
        model: PreTrainedModel,
        parameters: dict[str, Tensor],
    ) -> None:
        self.tensors, self.model, self.parameters = tensors, model, parameters
        self.quantisation = quantisation
        self.made: set[str] = set()  # parameters for which there are tensors
        self.incomplete: dict[str, list[str]] = {}  # parameter -> missing names on disk
        self.left: list[str] = []  # names of experts that the model does not have
        self._shapes: list[str] = []
        self._pairs: list[str] = []
        self._undeclared: dict[torch.dtype, list[str]] = {}
        self._path = path
        # Shapes of one expert's tensors -> the result; nearly all experts have the same shapes.
        self._known: dict[Any, tuple[int, ...] | str] = {}
        # Headers without their names -> shape as it is read, for the same reason.
        self._read_shapes: dict[Any, tuple[int, ...]] = {}

    def compare(self, target: str, source: Source) -> None:
        self.made.add(target)
        if any(not self._sound(name, target) for name in source.names):
            return
        if source.converter is None:
            (name,) = source.keys.values()
            self._same(target, [name], self.tensors[name].shape)
        elif source.per_expert:
            self._experts(target, source)
        else:
            self._whole(target, source)

    def _sound(self, name: str, target: str) -> bool:
        """Return whether one tensor can be read as the parameter's kind of values."""
        stored = self.tensors[name]
        try:
            self._shape(stored)
        except CheckpointError as error:
            self._pairs.append(str(error).removeprefix(f"{self._path}/"))
            return False
        # Integers and masks may have any dtype that is not a code of quantised floats.
        floats = self.parameters[target].is_floating_point()
        if stored.dtype in (_FLOATS if floats else (*_FLOATS, *_NUMBERS)):
            return True
        self._undeclared.setdefault(stored.dtype, []).append(stored.key)
        return False

    def _shape(self, stored: StoredTensor) -> tuple[int, ...]:
        """Return ``stored.shape``, which is checked once for all tensors with such headers."""
        values, scales = stored.values, stored.scales
        form = values.dtype, values.shape, scales and (scales.dtype, scales.shape)
        if form not in self._read_shapes:
            self._read_shapes[form] = stored.shape
        return self._read_shapes[form]

    def _experts(self, target: str, source: Source) -> None:
        """Compare a parameter that has one tensor for each expert and projection."""
        wanted = self.parameters[target].shape
        assert source.converter is not None
        patterns = source.patterns
        absent = [p for p in source.converter.source_patterns if p not in patterns]
        lacking: list[str] = []
        for pattern in patterns:
            here = {expert: name for (p, expert), name in source.keys.items() if p == pattern}
            example = next(iter(here.values()))
            lacking += [
                _EXPERT.sub(rf"\g<1>{expert}", example, count=1)
                for expert in range(wanted[0])
                if expert not in here
            ]
            self.left += [name for e, name in here.items() if e is not None and e >= wanted[0]]
        if lacking:
            self.incomplete[target] = lacking
            return
        for expert in range(wanted[0]):
            names = {p: source.keys[p, expert] for p in patterns}
            shapes = tuple((p, self._shape(self.tensors[name])) for p, name in names.items())
            made = self._make(target, source, shapes)
            if made == tuple(wanted[1:]):
                continue
            if absent:  # the tensors that are there may fit, only others are missing
                self.incomplete[target] = [f"{target} (of {', '.join(absent)})"]
                return
            self._differ(target, list(names.values()), made, tuple(wanted[1:]))

    def _make(self, target: str, source: Source, shapes: Any) -> tuple[int, ...] | str:
        """Return the shape of one expert made of tensors of these shapes, or why it cannot be."""
        known = (id(source.converter), shapes)
        if known not in self._known:
            collected = {p: [torch.empty(shape, device="meta")] for p, shape in shapes}
            assert source.converter is not None
            try:
                (made,) = convert(source.converter, collected, target, self.model).values()
                self._known[known] = tuple(made.shape[1:])
            except _NOT_CONVERTED as error:
                self._known[known] = str(error)
        return self._known[known]

    def _whole(self, target: str, source: Source) -> None:
        assert source.converter is not None
        collected: dict[str, list[Tensor]] = {}
        for pattern in source.patterns:
            mine = [(e or 0, name) for (p, e), name in source.keys.items() if p == pattern]
            ordered = [name for _, name in sorted(mine)]
            ordered += [name for p, name in source.further if p == pattern]
            shapes = [self.tensors[name].shape for name in ordered]
            collected[pattern] = [torch.empty(shape, device="meta") for shape in shapes]
        names = source.names
        try:
            made = convert(source.converter, collected, target, self.model)
        except _NOT_CONVERTED as error:
            if absent := [p for p in source.converter.source_patterns if p not in collected]:
                self.incomplete[target] = [f"{target} (of {', '.join(absent)})"]
            else:
                self._differ(target, names, str(error), tuple(self.parameters[target].shape))
            return
        for name, tensor in made.items():
            self.made.add(name)
            if name in self.parameters:
                self._same(name, names, tuple(tensor.shape))

    def _same(self, target: str, names: Sequence[str], found: tuple[int, ...]) -> None:
        wanted = tuple(self.parameters[target].shape)
        if found != wanted:
            self._differ(target, names, found, wanted)

    def _differ(
        self, target: str, names: Sequence[str], found: tuple[int, ...] | str, wanted: Any
    ) -> None:
        stored = [self.tensors[name] for name in names[:3]]
        words = " and ".join(f"{one.key} has shape {one.shape}" for one in stored)
        if isinstance(found, str):
            words += (
                f", which {'do' if names[1:] else 'does'} not make {target} of {wanted}: {found}"
            )
        elif len(stored) == 1 and found == stored[0].shape:
            words += f", the configuration gives {wanted}"
        else:
            verb = "make" if names[1:] else "makes"
            words += f", which {verb} {found}; the configuration gives {wanted} for {target}"
        self._shapes.append(words)

    def errors(self) -> list[str]:
        found = [first_few(kind) for kind in (self._pairs, self._shapes) if kind]
        for dtype, names in self._undeclared.items():
            verb = "are" if names[1:] else "is"
            found.append(f"{first_few(names)} {verb} {dtype}, {self._why_not_plain()}")
        return found

    def _why_not_plain(self) -> str:
        if self.quantisation is not None:
            return f"and there are no scales for it, though config.json says {self.quantisation}"
        other = "hf_quant_config.json"
        where = "config.json does not say that the weights are quantised"
        if (self._path / other).is_file():
            where = f"only {other}, which is not read, says that the weights are quantised"
        return (
            f"which is no dtype of plain weights, and {where}; quantised weights are read where "
            "quantization_config in config.json says how they were quantised"
        )


def _needed(missing: set[str], model: PreTrainedModel) -> list[str]:
    """Return which of the missing parameters the model needs."""
    tied: dict[str, set[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        tied.setdefault(source, {source}).add(target)
    for source, group in tied.items():
        # One of the tied parameters is enough. If all are missing, one name is reported.
        missing = missing - (group if group - missing else group - {source})
    ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_missing or ()]
    return sorted(
        (name for name in missing if not any(p.search(name) for p in ignored)),
        key=dot_natural_key,
    )


def _missing(
    needed: Sequence[str],
    sources: dict[str, Source],
    listing: Listing,
    incomplete: dict[str, list[str]],
) -> list[str]:
    names = [*needed, *(name for lacking in incomplete.values() for name in lacking)]
    if not names:
        return []
    lost = sorted(set(listing.lost.values()))
    count = f"{len(listing.lost)} tensor{'s' if len(listing.lost) > 1 else ''}"
    said = f"; {INDEX_FILE} names {count} that {first_few(lost, 3)} "
    said += "do not have" if lost[1:] else "does not have"
    return [f"the checkpoint lacks {first_few(names)}{said if lost else ''}"]


def _unused_codes(
    unused: Sequence[str],
    sources: dict[str, Source],
    tensors: dict[str, StoredTensor],
    model: PreTrainedModel,
) -> list[str]:
    """Report codes, scales and zero points that nothing uses.

    They show that quantised weights would be read as plain ones. Names that transformers ignores
    for this architecture are no part of the model.
    """
    if not unused:
        return []
    ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()]
    used = {name.rpartition(".")[0] for source in sources.values() for name in source.names}
    found = []
    for name in unused:
        stored = tensors[name]
        module, _, last = name.rpartition(".")
        beside = module in used and _ANY_SCALE.search(last) is not None
        if (stored.dtype in CODES or _OF_CODES.search(name) or beside) and not any(
            pattern.search(name) for pattern in ignored
        ):
            found.append(f"{stored.key} ({stored.values})")
    if not found:
        return []
    return [
        f"nothing uses {first_few(found)}; such codes, scales and zero points are of weights that "
        "are quantised in another way than config.json says"
    ]


def first_few(words: Sequence[str], most: int = _SHOWN) -> str:
    """Return the first few words, and how many more there are."""
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more
