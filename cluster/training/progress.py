"""What a run tells of itself: how far and how fast it is, and what hosts keep for it.

People see it, and the controller plans with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ..expert_keys import TRUNK, LayerKey, is_shared
from .contributions import Attempt
from .host_memory import TrainedBytes
from .owners import Owners, keys_by_host
from .run_plan import RunPlan

# How many steps a pace is the mean of.
_STEPS = 8


class HostOwns(NamedTuple):
    """What one host owns."""

    tensors: int  # keys: experts and blocks of the trunk
    nbytes: int  # of their masters, as large gradients, and the optimizer's state


@dataclass(frozen=True, slots=True, kw_only=True)
class RunParts:
    """Who owns what, and what replicas take; it changes when hosts come and go."""

    redundancy: int  # how many owners of a key may be lost at once
    owners: Mapping[LayerKey, tuple[tuple[str, ...], ...]]  # of each expert of a layer
    owned: Mapping[str, HostOwns]  # by host
    largest: TrainedBytes  # of the largest expert

    @classmethod
    def of(cls, plan: RunPlan, owners: Owners) -> RunParts:
        experts = [key for key in plan.tensors if key.layer != TRUNK and not is_shared(key)]
        layers: dict[LayerKey, list[tuple[str, ...]]] = {}
        # One object for equal owners, so that the whole is a short message.
        known: dict[tuple[str, ...], tuple[str, ...]] = {}
        for model, layer, expert in sorted(experts):
            of_layer = layers.setdefault(LayerKey(model, layer), [])
            of_layer += [()] * (expert - len(of_layer))
            hosts = owners.get(LayerKey(model, layer).expert(expert), ())
            of_layer.append(known.setdefault(hosts, hosts))
        sizes = {key: one.memory for key, one in plan.tensors.items()}
        return cls(
            redundancy=plan.redundancy,
            owners={key: tuple(of_layer) for key, of_layer in layers.items()},
            owned={
                host: HostOwns(len(keys), sum(_owned_bytes(sizes[key]) for key in keys))
                for host, keys in sorted(keys_by_host(owners).items())
            },
            largest=max((sizes[key] for key in experts), key=sum, default=TrainedBytes()),
        )


def _owned_bytes(one: TrainedBytes) -> int:
    return 2 * one.master + one.state


class RunProgress(NamedTuple):
    """What a run tells of itself at one moment."""

    attempt: int = 0  # at the next step: more than 1 mean that something was lost; 0: none yet
    workers: int = 0  # that compute it
    unprotected: int = 0  # keys with a single owner: its loss would take the run to a checkpoint
    step_s: float | None = None  # how long a step takes, the mean of the last ones; None: unknown
    tokens_per_s: float | None = None  # that these have learned from
    parts: RunParts | None = None  # None: not told yet


class _Steps(Protocol):
    @property
    def plan(self) -> RunPlan: ...

    @property
    def owners(self) -> Owners: ...

    @property
    def attempt(self) -> Attempt: ...

    @property
    def unprotected(self) -> int: ...


class RunTelling:
    """Collects what a run tells. One thread notes steps; any thread may ask for the progress."""

    def __init__(self, steps: _Steps) -> None:
        self._steps = steps
        self._tokens = 0  # of the step under way
        # When the last steps ended, and their tokens; before the first one, when it began.
        self._ended: deque[tuple[float, int]] = deque(maxlen=1 + _STEPS)
        self._parts: tuple[Owners, RunParts] | None = None

    def began(self, now: float) -> None:
        """Take note that the first step may begin."""
        self._ended.append((now, 0))

    def summed(self, tokens: int) -> None:
        """Take note of how many tokens the step under way learns from."""
        self._tokens = tokens

    def stepped(self, now: float) -> None:
        """Take note that a step is done."""
        self._ended.append((now, self._tokens))

    def progress(self, workers: int) -> RunProgress:
        steps, ended = self._steps, list(self._ended)
        step_s = tokens_per_s = None
        if len(ended) > 1 and (took_s := ended[-1][0] - ended[0][0]) > 0:
            step_s = took_s / (len(ended) - 1)
            tokens_per_s = sum(tokens for _, tokens in ended[1:]) / took_s
        return RunProgress(
            attempt=steps.attempt.number,
            workers=workers,
            unprotected=steps.unprotected,
            step_s=step_s,
            tokens_per_s=tokens_per_s,
            parts=self._parts_now(),
        )

    def _parts_now(self) -> RunParts:
        """Return who owns what; it is made anew only when that has changed."""
        owners = self._steps.owners
        if self._parts is None or self._parts[0] is not owners:
            self._parts = owners, RunParts.of(self._steps.plan, owners)
        return self._parts[1]
