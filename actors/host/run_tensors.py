"""What a host keeps for one training run: what it owns, and the gradients of an attempt."""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from ...cluster.expert_keys import SHARED, TRUNK, ExpertKey
from ...cluster.training.contributions import Attempt
from ...cluster.training.orders import BulkKey, Commit, Inherited, OpenRun, RunId
from ...kernels.ffn import wide_dtype
from ...kernels.training.owned_tensors import OwnedTensors
from ...kernels.training.update_rules import UpdateRule
from ...proto.errors import BadInput, Busy, CallError, NotHere
from ...proto.limits import MAX_BLOCK_BYTES, MAX_PUT_BYTES
from .gradients import ExpertSums
from .weight_store import ExpertStore

# How long to wait for others that use the tensors: commits, and copies of one key.
_WAIT_S = 60.0
# Upper bound for a safetensors header: per tensor (besides its name), and for the rest of it.
_HEADER_BYTES = 256


class RunTensors:
    """The tensors of one run on one host.

    Several threads read and put. One at a time calls the other methods, by the run's orders.

    Memory, besides that of `OwnedTensors`: the gradients of experts that had tokens here, from
    `gather` to the commit or the next attempt. The sum of a key that this host owns is another
    tensor, unless its only source is here; then it is that one. What was put: gradients of blocks
    of the trunk until they are summed up, weights and state until the key is owned.
    """

    def __init__(self, host: str, store: ExpertStore, opened: OpenRun) -> None:
        """``host`` is the host's name. Raises BadInput for an optimizer that cannot be used."""
        self.opened = opened
        self.owned = OwnedTensors[ExpertKey](UpdateRule(opened.optimizer, **opened.settings))
        self.gathered: frozenset[ExpertKey] | None = None  # of the attempt under way
        self._host = host
        self._store = store
        self._lock = threading.Lock()
        self._groups: dict[ExpertKey, dict[str, int]] = {}
        self._versions: dict[ExpertKey, int] = {}  # of the weights that masters are now
        self._step = 0  # steps that have led to the newest of these
        self._last: Commit | None = None
        self._attempt: Attempt | None = None
        self._exact = False  # gradients of the attempt are float64
        self._own: dict[ExpertKey, Mapping[str, Tensor]] = {}
        self._summed: set[ExpertKey] = set()
        # What was put: gradients by key and source, weights and state by key and kind.
        self._put: dict[tuple[ExpertKey, str], Mapping[str, Tensor]] = {}
        self._given: dict[tuple[ExpertKey, str], Mapping[str, Tensor]] = {}

    # ---- owning ---------------------------------------------------------------------------------

    def owns(self, key: ExpertKey, groups: Mapping[str, int]) -> bool:
        """Return whether a key is owned. Raises BadInput if it is so with other groups."""
        if key in self._groups and self._groups[key] != groups:
            raise BadInput(f"{key} is owned with groups {self._groups[key]}, not {dict(groups)}")
        return key in self._groups

    def given(self, key: ExpertKey, kind: str) -> Mapping[str, Tensor] | None:
        """Return the "state" or the "weights" that were put for a key."""
        with self._holding():
            return self._given.get((key, kind))

    def own(
        self,
        key: ExpertKey,
        weights: Mapping[str, Tensor],
        groups: Mapping[str, int],
        at: tuple[int, int],
    ) -> None:
        """Become the owner of the tensors that ``groups`` names; the caller gives ``weights`` up.

        ``at`` is their version, and the number of steps that have led to it.

        Raises BadInput for those that cannot be trained, or are not the model's.
        """
        self.check_key(key)
        if lost := groups.keys() - weights.keys():
            raise BadInput(f"{key}: {sorted(lost)} cannot be trained: there are {sorted(weights)}")
        trained = {name: weights[name].to(self._store.device) for name in groups}
        self._check_forms(key, {name: (t.shape, t.dtype) for name, t in trained.items()})
        with self._holding():
            self.owned.own(key, trained, groups)
            self._owns(key, groups, *at)

    def restore(
        self,
        key: ExpertKey,
        state: Mapping[str, Tensor],
        groups: Mapping[str, int],
        at: tuple[int, int],
    ) -> None:
        """Become the owner of the tensors that ``groups`` names; the caller gives ``state`` up.

        ``at`` is as in `own`. A state does not say which type the model has. An expert's is known;
        a block of the trunk is answered in the wide type, and rounded where it is copied. Raises
        BadInput.
        """
        self.check_key(key)
        kept = {entry: t for entry, t in state.items() if entry.rpartition(".")[0] in groups}
        masters = {name: kept[e] for name in groups if (e := f"{name}.master") in kept}
        # What an optimizer keeps beside a tensor follows it.
        masters = {name: master.to(self._store.device) for name, master in masters.items()}
        kept |= {f"{name}.master": master for name, master in masters.items()}
        if key.layer == TRUNK:
            dtypes = dict.fromkeys(groups, torch.float32)
            dtypes |= {name: master.dtype for name, master in masters.items()}
        else:
            _, dtype = self._store.expert_forms(key)
            dtypes = dict.fromkeys(groups, dtype)
            self._check_forms(key, {name: (t.shape, dtype) for name, t in masters.items()})
        with self._holding():
            self.owned.restore(key, kept, dtypes, groups)
            self._owns(key, groups, *at)

    def disown(self, key: ExpertKey) -> None:
        """Forget a key, if it is owned, and what was put here for it."""
        with self._holding():
            for place in [place for place in self._given if place[0] == key]:
                del self._given[place]
            if key in self.owned:
                self.owned.disown(key)
                del self._groups[key], self._versions[key]

    # ---- a step ---------------------------------------------------------------------------------

    def check_attempt(self, attempt: Attempt) -> None:
        """Raise NotHere unless an attempt is under way."""
        if attempt != self._attempt:
            found = "none" if self._attempt is None else self._attempt
            raise NotHere(f"{attempt}: {found} is under way on {self._host}")

    def begin(self, attempt: Attempt, *, exact: bool = False) -> None:
        """Begin an attempt, and forget the gradients of another one; see `HostGradients.begin`."""
        if attempt == self._attempt:
            return
        with self._holding():
            self.owned.abandon()
            self._forget_gradients()
            self._summed.clear()
            self.gathered = None
            self._attempt, self._exact = attempt, exact

    def gather(self, sums: ExpertSums) -> frozenset[ExpertKey]:
        """Take over what this host has added up in the attempt; return the experts."""
        # If memory is short for copying one of them, the call is repeated, and goes on there.
        for key in list(sums):
            assert isinstance(key, ExpertKey)
            self._own[key] = sums.take(key)
        self.gathered = frozenset(self._own)
        return self.gathered

    def is_prepared(self, key: ExpertKey) -> bool:
        return key in self._summed

    def kept_gradient(self, key: ExpertKey, source: str) -> Mapping[str, Tensor]:
        """Return a gradient of the attempt that is on this host, to read. Raises NotHere."""
        with self._holding():
            if source != self._host:
                found = self._put.get((key, source))
            else:
                found = self._own.get(key) if self.gathered is not None else None
        if found is None:
            raise NotHere(f"{key}: {self._host} has no gradient of {source} in {self._attempt}")
        return found

    def prepare(
        self, attempt: Attempt, key: ExpertKey, sums: Mapping[str, Tensor] | None
    ) -> dict[str, float]:
        """Take a sum of gradients over, as `OwnedTensors.prepare`; its sources may be freed."""
        squares = self.owned.prepare(attempt, key, sums)
        with self._holding():
            self._summed.add(key)
            for place in [place for place in self._put if place[0] == key]:
                del self._put[place]
        return squares

    def commit(self, order: Commit) -> None:
        """Apply what is prepared. The last commit may be repeated.

        Raises the errors of `OwnedTensors.commit`.
        """
        attempt, last = order.attempt, self._last
        if last is not None and last.attempt == attempt:
            if last.version != order.version:
                raise BadInput(
                    f"{attempt} was committed as version {last.version}, not {order.version}"
                )
            self.owned.commit(attempt, order.groups)  # it does nothing, or finds another decision
            return
        self.check_attempt(attempt)
        with self._holding():
            if not self.owned.missing(attempt):
                # Every owner has its sums by now, so these are freed, one by one.
                self._forget_gradients()
            self.owned.commit(attempt, order.groups)
            self._last, self._step = order, order.step
            self._versions = dict.fromkeys(self._versions, order.version)

    def succeed(self, run: RunId) -> Inherited:
        """Belong to a later run from now on; return what there is."""
        with self._holding():
            self.opened = replace(self.opened, run=run)
            self._given.clear()  # the other run had something in mind with it
            attempt = self._attempt
            whole = attempt is not None and not self.owned.missing(attempt)
            return Inherited(
                versions=dict(self._versions),
                groups=dict(self._groups),
                step=self._step,
                committed=self._last,
                prepared=attempt if whole and self._versions else None,
            )

    # ---- other processes ------------------------------------------------------------------------

    def check_key(self, key: ExpertKey) -> None:
        """Raise CallError for a key of another model, and for what this host cannot train."""
        if key.model != self.opened.model:
            raise CallError(f"{key}: run {self.opened.run} trains {self.opened.model!r}")
        if key.layer != TRUNK:
            self._store.check_trainable(key.model, key)

    @contextmanager
    def reading(self, wanted: BulkKey) -> Iterator[Mapping[str, Tensor]]:
        """Give tensors; inside of the block no commit changes them. Raises NotHere."""
        key = wanted.key
        if wanted.kind == "gradient":
            if wanted.attempt is None or wanted.source != self._host:
                raise NotHere(f"{key}: {self._host} has its own gradients, not {wanted.source!r}'s")
            self.check_attempt(wanted.attempt)
            yield self.kept_gradient(key, wanted.source)
            return
        with self._holding():
            if wanted.kind == "state":
                self._check_run(wanted.run)
                yield self.owned.state(key)
                return
            version = self._versions.get(key)
            if version != wanted.version:
                found = "another host owns it" if version is None else f"it has version {version}"
                raise NotHere(f"version {wanted.version} of {key} is not on {self._host}: {found}")
            yield self.weights(key)

    def weights(self, key: ExpertKey) -> dict[str, Tensor]:
        """Return what is trained of a key, as `OwnedTensors.weights`.

        An expert's has what is trained of the tensors that all experts of its layer share.
        """
        found: dict[str, Tensor] = {}
        for one in self._with_shared(key):
            found |= self.owned.weights(one)
        return found

    def _with_shared(self, key: ExpertKey) -> list[ExpertKey]:
        shared = key._replace(expert=SHARED)
        return [key, shared] if shared != key and shared in self.owned else [key]

    def put(self, given: BulkKey, tensors: Mapping[str, Tensor]) -> None:
        """Keep a gradient, or what a key is to be owned from.

        What was put before is replaced. Raises NotHere, CallError, and Busy if there is no room.
        """
        key, size = given.key, _nbytes(tensors)
        if size > (most := self.most_bytes(given)):
            raise CallError(f"{given.kind} of {key}: {size} bytes; it can have {most}")
        if given.kind == "gradient":
            self._put_gradient(given, tensors)
            return
        self._check_run(given.run)
        with self._holding():
            if key not in self.owned:  # otherwise it is here for the second time, and used
                self._keep(self._given, (key, given.kind), tensors)

    def most_bytes(self, key: BulkKey) -> int:
        """Return the largest size of what may be put or read. Raises NotHere and CallError."""
        self.check_key(key.key)
        forms = self._forms(key.key)
        if forms is None:
            if key.kind == "gradient":
                raise NotHere(f"{key.key} has another owner")
            return MAX_BLOCK_BYTES
        if key.kind != "state":
            # A trunk's gradients have any type: eight bytes are the most.
            of_masters = max((t.itemsize for _, t in forms.values()), default=0)
            is_wider = key.kind == "gradient" and self._exact
            wide = 8 if is_wider or key.key.layer == TRUNK else of_masters
            sizes = [wide * math.prod(shape) for shape, _ in forms.values()]
            return sum(sizes) + _header(forms, 1)
        rule = self.owned.rule
        parts = [rule.bytes_of(shape, dtype) for shape, dtype in forms.values()]
        kinds = [2 + len(rule.state_forms(len(shape), dtype)) for shape, dtype in forms.values()]
        return sum(one.master + one.state for one in parts) + _header(forms, max(kinds, default=0))

    # ---- steps ----------------------------------------------------------------------------------

    def _put_gradient(self, given: BulkKey, tensors: Mapping[str, Tensor]) -> None:
        key = given.key
        with self._holding():
            if given.attempt is None or given.attempt != self._attempt:
                raise NotHere(f"{key}: {given.attempt} is not under way on {self._host}")
            masters = self.owned.masters(key)
            trained = {name: tensor for name, tensor in tensors.items() if name in masters}
            for name, tensor in trained.items():
                check_shape(key, name, tensor, masters[name])
            if key not in self._summed:  # otherwise it is here for the second time, and used
                self._keep(self._put, (key, given.source), trained)

    def _keep(
        self,
        kept: dict[tuple[ExpertKey, str], Mapping[str, Tensor]],
        place: tuple[ExpertKey, str],
        tensors: Mapping[str, Tensor],
    ) -> None:
        """Keep what was put. That of experts is bounded by the model's size."""
        if place[0].layer == TRUNK:
            held = sum(
                _nbytes(others)
                for one in (self._put, self._given)
                for there, others in one.items()
                if there[0].layer == TRUNK and not (one is kept and there == place)
            )
            if held + _nbytes(tensors) > MAX_PUT_BYTES:
                raise Busy(
                    f"{place[0]}: {held} of {MAX_PUT_BYTES} bytes for tensors of trunks are in use"
                )
        kept[place] = dict(tensors)

    def _owns(self, key: ExpertKey, groups: Mapping[str, int], version: int, step: int) -> None:
        self._groups[key], self._versions[key] = dict(groups), version
        self._step = step
        for kind in ("state", "weights"):
            self._given.pop((key, kind), None)

    def _check_forms(
        self, key: ExpertKey, found: Mapping[str, tuple[torch.Size, torch.dtype]]
    ) -> None:
        """Raise BadInput unless an expert's tensors are as its model has them."""
        if key.layer == TRUNK:
            return
        shapes, dtype = self._store.expert_forms(key)
        for name, (shape, given) in found.items():
            if tuple(shape) != shapes.get(name) or given != dtype:
                raise BadInput(
                    f"{name} of {key} is {given} {tuple(shape)}, but its model has "
                    f"{dtype} {shapes.get(name)}"
                )

    def _forms(self, key: ExpertKey) -> dict[str, tuple[tuple[int, ...], torch.dtype]] | None:
        """Return the shapes and types of a key's masters; None for an unknown block of the trunk.

        Raises NotHere and CallError.
        """
        if key.layer != TRUNK:
            shapes, dtype = self._store.expert_forms(key)
            return {name: (shape, wide_dtype(dtype)) for name, shape in shapes.items()}
        with self._holding():
            if key not in self.owned:
                return None
            masters = self.owned.masters(key)
        return {name: (tuple(one.shape), one.dtype) for name, one in masters.items()}

    def _check_run(self, run: int) -> None:
        if run != self.opened.run:
            raise NotHere(f"run {run} is not the one of {self._host}, {self.opened.run}")

    def _forget_gradients(self) -> None:
        self._own.clear()
        self._put.clear()

    @contextmanager
    def _holding(self) -> Iterator[None]:
        if not self._lock.acquire(timeout=_WAIT_S):
            raise Busy(f"the tensors of run {self.opened.run} are in use for {_WAIT_S} s")
        try:
            yield
        finally:
            self._lock.release()


def check_shape(key: ExpertKey, name: str, gradient: Tensor, master: Tensor) -> None:
    """Raise CallError unless a gradient has its master's shape."""
    if gradient.shape != master.shape:
        found, due = tuple(gradient.shape), tuple(master.shape)
        raise CallError(f"the gradient of {name} of {key} is {found}, and must be {due}")


def _nbytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _header(names: Collection[str], kinds: int) -> int:
    """Return a bound for a safetensors header, of so many tensors for each name."""
    return _HEADER_BYTES + sum(kinds * (_HEADER_BYTES + len(name)) for name in names)
