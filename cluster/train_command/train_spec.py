"""The spec of `moesaic train`: what is trained, on what, and how."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import Field, ValidationError, model_validator

from ...proto.errors import SpecError
from ..spec.parts import Part
from ..spec.text import StrictLoader, problems
from .schedule import Kind, Schedule

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


class DataSpec(Part):
    """What is learned from. It is packed once into a file of tokens, in the folder of the run."""

    path: Annotated[str, Field(min_length=1)]
    """A text file, a JSONL file, a folder of either, or a folder that `datasets` saved. A line of
    JSONL has a `text`, or the `messages` of a conversation."""
    format: Literal["auto", "text", "jsonl", "dataset"] = "auto"
    """How it is read. `auto`: as it looks."""
    pattern: str | None = None
    """Which files of a folder are read, such as `**/*.md`. Default `null`: all that fit the
    format."""
    learn: Literal["answers", "all"] = "answers"
    """What of conversations is learned: the assistant's `answers`, or `all`. Of texts it is always
    all."""
    sequence_length: Annotated[int, Field(ge=2)] = 512
    """Number of tokens of a sequence. Documents are packed one after the other."""
    held_out: Fraction = 0.05
    """Part of the sequences that is held out for evaluation, chosen at random. 0: none."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the order of the sequences, and of the choice of those held out."""


class BatchSpec(Part):
    """How many sequences a step has."""

    sequences: Count = 8
    """Sequences of a step, whatever the number of workers."""
    microbatch: Count = 2
    """Sequences of one forward pass; more need more memory."""

    @model_validator(mode="after")
    def _fits(self) -> BatchSpec:
        if self.sequences % self.microbatch:
            raise ValueError(
                f"sequences: {self.sequences}: it must be a multiple of microbatch, "
                f"{self.microbatch}"
            )
        return self


class WorkersSpec(Part):
    """The processes that compute the steps."""

    count: Count = 1
    """How many there are. The result does not depend on it."""
    threads: Count = 1
    """Threads of each."""
    num_cpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """CPUs that each reserves from Ray."""
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    """Type in which the model computes but for its experts. `auto`: the model's; on CPUs float32 in
    place of bfloat16 and float16, with which most of them are many times slower."""


class OptimizerSpec(Part):
    """How gradients are applied."""

    name: str = "AdamW"
    """A class of `torch.optim`."""
    settings: dict[str, Any] = Field(default_factory=lambda: {"lr": 1e-4})
    """Its hyperparameters."""
    max_grad_norm: Positive | None = 1.0
    """The norm of all gradients is clipped to this; null: it is not."""
    redundancy: Annotated[int, Field(ge=0)] | None = None
    """How many hosts may be lost with what they own; null: `balance.redundancy` of the cluster."""
    exact: bool | None = None
    """Whether the run has the same bits, whoever computes what (docs/training.md). Default `null`:
    as `exact` of the model in the cluster's spec."""


class ScheduleSpec(Part):
    """How the learning rate changes."""

    kind: Kind = "cosine"
    """The curve after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps in which it rises from 0."""
    last_part: Annotated[float, Field(ge=0, le=1)] = 0.1
    """What is left of it at the end."""


class EvaluationSpec(Part):
    """Looks at the loss of the sequences that are held out."""

    every_steps: Count = 50
    """How often; also before the first step and after the last."""
    sequences: Count = 64
    """At most so many of them."""


class CheckpointsSpec(Part):
    """Where the run is saved, besides the end, and after Ctrl-C."""

    folder: Annotated[str, Field(min_length=1)] = "runs/train"
    """The folder of the run: checkpoints, the file of tokens, records of all steps, TensorBoard's
    events. All machines on which workers run must have it under the same path."""
    every_steps: Count | None = 100
    """How often it is saved; null: not by steps."""
    every_minutes: Positive | None = None
    """How often it is saved by the clock; null: not by it."""
    keep: Count = 3
    """How many of the last checkpoints stay."""


class TrainSpec(Part):
    """A training run over a cluster that runs already."""

    cluster: str = "local"
    """The cluster's name."""
    model: str | None = None
    """The name of one of its models, with `train: true` in the cluster's spec. Default `null`: its
    only one."""
    steps: Count = 200
    """Number of steps of the run."""
    data: DataSpec
    """What is learned from."""
    batch: BatchSpec = BatchSpec()
    """The sequences of a step."""
    workers: WorkersSpec = WorkersSpec()
    """How many processes compute the steps, and what each of them takes."""
    optimizer: OptimizerSpec = OptimizerSpec()
    """What applies the gradients, and how."""
    schedule: ScheduleSpec = ScheduleSpec()
    """How the learning rate changes from step to step."""
    evaluation: EvaluationSpec | None = EvaluationSpec()
    """How the run looks at sequences that it does not learn from. `null`: it does not."""
    checkpoints: CheckpointsSpec = CheckpointsSpec()
    """Where and when the run is saved."""
    balance_loss: Positive | None = None
    """Coefficient of the auxiliary loss of the model's gates over the whole step: transformers'
    `router_aux_loss_coef`. It keeps gates from choosing the same few experts; 0.01 is usual. A
    worker then keeps the activations of all its microbatches of a step. Default `null`: there is no
    such loss."""

    @model_validator(mode="after")
    def _fits(self) -> TrainSpec:
        if self.schedule.warmup_steps > self.steps:
            raise ValueError(
                f"schedule.warmup_steps: {self.schedule.warmup_steps}: the run has only "
                f"{self.steps} steps"
            )
        return self

    @property
    def curve(self) -> Schedule:
        given = self.schedule
        return Schedule(
            kind=given.kind,
            steps=self.steps,
            warmup_steps=given.warmup_steps,
            last_part=given.last_part,
        )


# What decides which sequences a step has, and what is kept of each tensor. Another number of
# workers, another schedule or learning rate go on with the same run.
_FIXED = ("model", "data", "batch.sequences", "optimizer.name", "optimizer.settings")
_FREE = ("optimizer.settings.lr", "optimizer.settings.weight_decay", "optimizer.settings.betas")


class _Loader(StrictLoader):
    """Takes 1e-4 for a number, as YAML 1.2 does; in YAML 1.1 it needs a point and a sign."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*(\.\d*)?|\.\d+)[eE][-+]?\d+"),
    list("-+.0123456789"),
)


class Difference(NamedTuple):
    """A key that two specs differ in."""

    path: str
    before: object
    after: object
    is_fixed: bool  # whether a run cannot go on with another value


def differences(before: TrainSpec, after: TrainSpec) -> list[Difference]:
    """Return what differs, key by key, but where the cluster and the folder are."""
    old, new = (_flat(one.model_dump(mode="json")) for one in (before, after))
    return [
        Difference(
            path,
            old.get(path),
            new.get(path),
            path not in _FREE
            and any(path == fixed or path.startswith(f"{fixed}.") for fixed in _FIXED),
        )
        for path in dict.fromkeys([*old, *new])
        if old.get(path) != new.get(path) and path not in ("cluster", "checkpoints.folder")
    ]


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{above}{name}.")
        else:
            found[above + name] = value
    return found


def load_train_spec(
    path: Path | None = None,
    *,
    data: str | None = None,
    steps: int | None = None,
    folder: str | None = None,
) -> TrainSpec:
    """Read a spec of `moesaic train`; None: all keys have their defaults.

    ``data``, ``steps`` and ``folder`` stand in the places of the keys data.path, steps and
    checkpoints.folder, if they are given. Raises SpecError that names the path of each wrong key.
    """
    values = {} if path is None else _read(path)
    where = "" if path is None else f"{path}: "
    if steps is not None:
        values["steps"] = steps
    for part, key, value in (("data", "path", data), ("checkpoints", "folder", folder)):
        if value is not None and isinstance(values.setdefault(part, {}), dict):
            values[part][key] = value
    if "data" not in values:
        raise SpecError(f"{where}data.path: name what to learn from, in a spec or with --data")
    try:
        return TrainSpec.model_validate(values)
    except ValidationError as error:
        raise SpecError(f"{where}{problems(error, values)}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SpecError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise SpecError(f"{path}: a mapping is expected, not {type(values).__name__}")
    return values
