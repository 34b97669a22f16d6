"""The part of a layer's call that a router computes with experts that were lent to it.

A host may free a slot, or fill it again, while the router computes: then the slot's generation
changes, and the result is discarded. So torn weights never reach a sum, not even in a router that
was frozen past its lease.

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token, N = T * K, E = experts of a
layer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...cluster.routing.lending_share import ShareChoice
from ...kernels import ffn
from ...kernels.grouped.slots import StepFlags
from ...kernels.slabs.borrowed_device_slab import LentPools
from ...kernels.slabs.layer_arithmetic import (
    CpuLayer,
    DeviceLayer,
    LayerArithmetic,
    MissingExpert,
)
from ...kernels.slabs.slot_entries import SlotEntries


class Slots:
    """Slots of one slab, and the generations that their experts had when they were found."""

    def __init__(self, entries: SlotEntries, numbers: list[int], generations: list[int]) -> None:
        self._entries = entries
        self._numbers = np.array(numbers)
        self._generations = np.array(generations, dtype=np.uint64)
        self._changes = -1  # of the whole slab, when these slots were last looked at

    def unchanged(self) -> bool:
        changes = self._entries.changes
        if changes == self._changes:
            return True
        if not np.array_equal(self._entries.generations(self._numbers), self._generations):
            return False
        self._changes = changes
        return True


@dataclass(frozen=True, slots=True)
class Mapped:
    """Where experts on a device are mapped, and how often anything there had been unmapped."""

    pools: LentPools
    unmapped: int

    def unchanged(self) -> bool:
        return self.pools.unmapped == self.unmapped


class LayerReach:
    """The experts of one layer that are within reach, in the versions that a placement serves."""

    def __init__(
        self,
        arithmetic: LayerArithmetic,
        experts: Collection[int],
        slots: list[Slots],
        hosts: Sequence[str],
        hidden: int,
        dtype: torch.dtype,
        *,
        exact: bool = False,
        mapped: Mapped | None = None,
    ) -> None:
        """Take what computes ``experts``, which are ``mapped`` if they lie on a device.

        ``hosts`` has the preferred host of each expert of the layer, "" if it has none.
        """
        self._mapped = mapped
        count = len(hosts)
        self.arithmetic = arithmetic
        self._cpu = arithmetic if isinstance(arithmetic, CpuLayer) else None
        self._bank = None if self._cpu is None else self._cpu.bank()
        self._place_E = np.full(count, -1, dtype=np.int32)
        self._place_E[list(experts)] = list(experts)
        if self._cpu is not None and self._bank is not None:
            for number, expert in self._cpu.experts.items():
                self._place_E[number] = expert.place
        # The expert that lies in a place.
        self.expert_at = np.zeros(self._place_E.max() + 1, dtype=np.intp)
        self.expert_at[self._place_E[list(experts)]] = list(experts)
        self._hidden, self._dtype, self._exact = hidden, dtype, exact
        self._wide = ffn.wide_dtype(dtype)
        self._slots = slots
        # One place more than experts: an unused assignment (-1) finds the last.
        self._within_E = np.zeros(count + 1, dtype=bool)
        self._within_E[list(experts)] = True
        self.count = count  # of the layer's experts
        self._has_all = len(experts) == count
        self.hosts = sorted(set(hosts))
        # Whether any part of a call could as well be sent. Hosts on a device share it with the
        # router, so that nothing is gained.
        self.can_split = self._has_all and "" not in self.hosts and self._cpu is not None
        self._host_of_E = np.array([self.hosts.index(host) for host in hosts])

    def takes(self, x_TH: Tensor) -> bool:
        """Return whether these rows fit; a host says what is wrong with others."""
        there = x_TH.device == self.arithmetic.ids_device
        return there and x_TH.shape[1] == self._hidden and x_TH.dtype == self._dtype

    def places(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> np.ndarray | None:
        """Return where the experts of a call lie that `compute_all` computes; None if it does not.

        Each id must be that of an expert within reach; none is -1.
        """
        if self._exact or self._cpu is None:
            return None
        if not (x_TH.is_cpu and ids_TK.is_cpu and weights_TK.is_cpu):
            return None
        shape = ids_TK.shape
        if len(shape) != 2 or 0 in shape or weights_TK.shape != shape:
            return None
        if x_TH.shape != (shape[0], self._hidden):
            return None
        if x_TH.dtype != self._dtype:
            return None
        if torch.is_grad_enabled() and (x_TH.requires_grad or weights_TK.requires_grad):
            return None
        ids = (ids_TK if ids_TK.dtype == torch.int32 else ids_TK.to(torch.int32)).numpy()
        try:
            # As an unsigned number, -1 is larger than any expert.
            place_TK = self._place_E.take(ids.view(np.uint32))
        except IndexError:
            return None
        return place_TK if self._has_all or place_TK.min() >= 0 else None

    def compute_all(
        self,
        x_TH: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        place_TK: np.ndarray,
        *,
        check: bool = True,
    ) -> Tensor | None:
        """Compute a call with the result of `places`: the sum over K of weight * expert(x).

        The result is (T, H) in x's dtype. It is None if it cannot be used: it is not finite, or a
        slot has changed since it was found. Without ``check`` the caller looks after that.
        """
        if not x_TH.is_contiguous():
            x_TH = x_TH.contiguous()
        if weights_TK.dtype != self._wide or not weights_TK.is_contiguous():
            weights_TK = weights_TK.to(self._wide).contiguous()
        if self._bank is not None:
            out_TH = self._bank.layer(x_TH, torch.from_numpy(place_TK), weights_TK)
        else:
            sum_TH = torch.empty(x_TH.shape, dtype=self._wide)
            given = x_TH, ids_TK, weights_TK, sum_TH
            # Whatever the model around it says: hosts know nothing of its contexts.
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                self.arithmetic.compute(*given, exact=False)
            out_TH = sum_TH.to(x_TH.dtype)
        return out_TH if not check or (ffn.all_finite(out_TH) and self.unchanged()) else None

    @property
    def is_on_device(self) -> bool:
        return self._cpu is None

    def takes_all(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> bool:
        """Return whether a call is one for `compute_on_device`."""
        shape = ids_TK.shape
        if not self._has_all or len(shape) != 2 or 0 in shape or weights_TK.shape != shape:
            return False
        if not self.takes(x_TH) or x_TH.shape[0] != shape[0]:
            return False
        if torch.is_grad_enabled() and (x_TH.requires_grad or weights_TK.requires_grad):
            return False
        return x_TH.device == ids_TK.device == weights_TK.device

    def compute_on_device(
        self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, flags: StepFlags | None = None
    ) -> Tensor | None:
        """Compute a call on the experts' device: the sum over K of weight * expert(x).

        The result is (T, H) in x's dtype. It is None if it cannot be used. It waits for the device
        once; with ``flags`` it does not, and whoever has these checks them, and `unchanged`, when
        more calls are done.
        """
        assert isinstance(self.arithmetic, DeviceLayer)
        found = flags or StepFlags.on(self.arithmetic.ids_device)
        given = x_TH.contiguous(), ids_TK, weights_TK
        with self.in_use(), torch.no_grad():
            if not self.unchanged():
                return None
            out_TH = self.arithmetic.layer(*given, found, exact=self._exact)
            if flags is None and (found.any() or not self.unchanged()):
                return None
            return out_TH

    def split(self, ids_TK: np.ndarray, part: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids to compute here, and the others; each is -1 where the other is not.

        Ids outside [0, experts) are in neither. Here are those within reach, or about ``part`` of
        them.
        """
        used_TK = (ids_TK >= 0) & (ids_TK < self.count)
        ids_TK = np.where(used_TK, ids_TK, -1)
        here_E = self._within_E
        if part < 1.0:
            counts_E = np.bincount(ids_TK[used_TK], minlength=self.count)
            here_E = np.append(self._choose(counts_E, part), False)
        here_TK = here_E[ids_TK]
        return np.where(here_TK, ids_TK, -1), np.where(here_TK, -1, ids_TK)

    def _choose(self, counts_E: np.ndarray, part: float) -> np.ndarray:
        """Return which experts to compute here, so that each host keeps the same part of its own.

        An expert's rows stay together. The largest go first, each if it brings its host's sum
        nearer to what is wanted.
        """
        here_E = np.zeros(self.count, dtype=bool)
        wanted = part * np.bincount(self._host_of_E, counts_E, len(self.hosts))
        for expert in np.argsort(-counts_E, kind="stable").tolist():
            count, host = counts_E[expert], self._host_of_E[expert]
            if 0 < count < 2 * wanted[host]:
                here_E[expert] = True
                wanted[host] -= count
        return here_E

    def unchanged(self) -> bool:
        """Return whether all slots still hold what they held when they were found."""
        if self._mapped is not None and not self._mapped.unchanged():
            return False
        return all(map(Slots.unchanged, self._slots))

    def in_use(self) -> AbstractContextManager[None]:
        """Return a context for a computation; enter it before `unchanged` is asked."""
        return nullcontext() if self._mapped is None else self._mapped.pools.in_use()


@dataclass(slots=True)
class LentPart:
    """The assignments of a call that the router computes itself, and then their result."""

    reach: LayerReach
    x_TH: Tensor
    ids_TK: Tensor  # -1 where a host computes the assignment
    weights_TK: Tensor
    exact: bool
    all_ids_TK: Tensor  # those of the hosts, too
    choice: ShareChoice | None = None  # how large a part this is meant to be
    timed: bool = False  # its time was noted, or that it failed
    out: Tensor | None = None  # wide: sums (T, H), or with ``exact`` rows (T, K, H)
    bad_experts: list[int] | None = None

    def compute(self) -> bool:
        """Compute, and return whether the result may be used: no slot changed meanwhile."""
        with self.reach.in_use():
            return self._compute()

    def _compute(self) -> bool:
        reach, x_TH = self.reach, self.x_TH
        if not reach.unchanged():
            return False
        shape = (*self.ids_TK.shape, x_TH.shape[1]) if self.exact else x_TH.shape
        arithmetic = reach.arithmetic.for_a_call()
        ids_TK = self.ids_TK.to(arithmetic.ids_device)
        weights_TK = self.weights_TK.to(x_TH.device)
        out = torch.empty(shape, dtype=ffn.wide_dtype(x_TH.dtype), device=x_TH.device)
        # Whatever the model around it says: hosts know nothing of its contexts.
        with torch.autocast(x_TH.device.type, enabled=False):
            arithmetic.compute(x_TH, ids_TK, weights_TK, out, exact=self.exact)
        try:
            bad = arithmetic.bad_experts(x_TH, ids_TK, out)
        except MissingExpert:
            # Another thread has found the layer's experts anew, and one has gone.
            return False
        if not reach.unchanged():
            return False
        self.out, self.bad_experts = out, bad
        return True

    def make_up(self, lost_N: np.ndarray) -> bool:
        """Compute what was sent and no host has answered; return whether the result may be used.

        The call is one that was split: everything is within reach.
        """
        assert self.choice is not None
        assert self.out is not None
        lost_TK = torch.zeros(self.ids_TK.shape, dtype=torch.bool)
        lost_TK.view(-1)[torch.from_numpy(lost_N)] = True
        ids_TK = torch.where(lost_TK, self.all_ids_TK, -1)
        more = LentPart(self.reach, self.x_TH, ids_TK, self.weights_TK, self.exact, self.all_ids_TK)
        if not more.compute():
            return False
        assert more.out is not None
        if self.exact:
            self.out = torch.where(lost_TK.to(self.out.device)[..., None], more.out, self.out)
        else:
            self.out += more.out
        self.ids_TK = torch.where(lost_TK, ids_TK, self.ids_TK)
        self.bad_experts = [*(self.bad_experts or ()), *(more.bad_experts or ())] or None
        return True

    def used_ids(self) -> np.ndarray:
        """Return the experts that were computed here, one for each assignment."""
        ids_N = self.ids_TK.numpy().reshape(-1)
        return ids_N[ids_N >= 0]

    def bad_rows(self) -> dict[int, list[int]]:
        """Return for each expert whose output was not finite the rows that are so because of it."""
        if not self.bad_experts or self.out is None:
            return {}
        broken_T = ~torch.isfinite(self.out.flatten(1)).all(dim=1).cpu()
        hit = {expert: (self.ids_TK == expert).any(dim=1) & broken_T for expert in self.bad_experts}
        return {expert: hit_T.nonzero().flatten().tolist() for expert, hit_T in hit.items()}


def patience(wanted_T: np.ndarray | None, lent: LentPart | None, tokens: int) -> np.ndarray | None:
    """Return how long each token waits for experts that no host can compute at the moment.

    A router that can compute them itself does not wait.
    """
    return wanted_T if lent is None or lent.choice is None else np.zeros(tokens)
