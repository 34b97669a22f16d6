"""Experts whose memory hosts of this machine have lent: the router computes with them itself.

Which experts are within reach follows from the placement and from what lies in the slabs. The
memory outlives its host, so a host that dies takes nothing away. While no placement names the host
its memory is an *orphan*: it is used like any other, until a successor of the host lends the same
model, or for a limited time.

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from ...cluster.expert_keys import ExpertKey, LayerKey
from ...cluster.placement import HostEntry, Placement
from ...cluster.routing.dispatch import Dispatcher
from ...cluster.routing.lending_share import LendingShare, ShareChoice
from ...cluster.routing.policy import RouterPolicy
from ...kernels import fused
from ...kernels.ffn import ExpertForm, ExpertWeights
from ...kernels.fused import LayerBank
from ...kernels.grouped.activation import Activation
from ...kernels.grouped.slots import SlotForm
from ...kernels.slabs.borrowed_device_slab import DeviceSlabReader, LentPools
from ...kernels.slabs.device_memory import DeviceMemory
from ...kernels.slabs.device_pool import Memory
from ...kernels.slabs.device_slab import layer_slots
from ...kernels.slabs.layer_arithmetic import CpuLayer, DeviceLayer
from ...kernels.slabs.layout import COPIES, Packing
from ...kernels.slabs.side_by_side import bank_of_slabs
from ...kernels.slabs.slab import SlabReader
from ..transport.seqpacket import close_all
from .layer_tensors import LayerTensors
from .lent_part import LayerReach, LentPart, Mapped, Slots

log = logging.getLogger(__name__)

Allocate = Callable[[int, int], Memory]  # (bytes, bytes of a chunk) -> addresses


class _Lent(NamedTuple):
    """What a slab has: the experts of one model in one incarnation of a host."""

    host: str
    incarnation: int
    model: str


_AnySlab = SlabReader | DeviceSlabReader


class _Place(NamedTuple):
    """A slot that has an expert in the version that is wanted."""

    slab: _AnySlab
    slot: int
    copy: int
    generation: int
    at: int  # on a device, the number of its place


@dataclass(frozen=True, slots=True)
class _Joined:
    """The experts of one layer in several slabs, as one bank; None: no kernel takes them so."""

    slabs: list[SlabReader]
    bank: LayerBank | None

    def with_bank(self, slab: SlabReader, layer: int, expert: ExpertWeights) -> ExpertWeights:
        """Return an expert of one of the slabs with its place in the bank."""
        first = self.slabs.index(slab) * COPIES * slab.layout.layers[layer].experts
        return replace(expert, bank=self.bank, place=first + expert.place)


@dataclass(slots=True)
class _Found:
    """What of a layer was found within reach."""

    placement: Placement  # the last one under which it is so
    names: object  # what of the placement it depends on
    reach: LayerReach | None


class LentExperts:
    """What hosts have lent to one router; used under the router's lock."""

    def __init__(
        self,
        forms: Mapping[LayerKey, ExpertForm],
        policy: RouterPolicy,
        device: torch.device,
        allocate: Allocate | None = None,
    ) -> None:
        """Take the arithmetic of the layers that may be computed here, on ``device``.

        The memory of a host that no placement names is kept for ``policy.orphan_s`` seconds. With
        ``policy.splits_lent`` the router computes the part of a call that makes it fastest.
        ``allocate`` returns ranges of the device's addresses (None: of a CUDA device).
        """
        self._forms = forms
        self._orphan_s = policy.orphan_s
        self._shares = LendingShare() if policy.splits_lent else None
        self._device = device
        self._pools = LentPools(allocate or partial(_device_memory, device))
        self._slabs: dict[_Lent, _AnySlab] = {}
        self._slot_forms: dict[LayerKey, SlotForm] = {}
        self._tables: dict[LayerKey, Tensor] = {}  # on the device: where a layer's experts lie
        self._layer_0: Tensor | None = None
        self._orphans: dict[_Lent, float] = {}  # and when each of them is let go
        self._reach: dict[LayerKey, _Found] = {}
        self._chunks_taken = 0
        self._joined: dict[LayerKey, _Joined] = {}

    def take_slab(self, entry: HostEntry, model: str, slab: _AnySlab | None) -> None:
        """Take a slab that a host lends, or forget what it takes back.

        What this host lent of the model before is forgotten, in earlier incarnations too.
        """
        self._forget(one for one in self._slabs if (one.host, one.model) == (entry.host, model))
        self._reach.clear()
        if isinstance(slab, DeviceSlabReader):
            try:
                slab.join(self._pools)
            except (ValueError, RuntimeError, ImportError) as error:
                log.warning("what %s lends of %s cannot be used: %s", entry.host, model, error)
                return
        if slab is not None:
            self._slabs[_Lent(entry.host, entry.incarnation, model)] = slab

    def take_chunks(
        self,
        entry: HostEntry,
        model: str,
        chunks: Sequence[tuple[int, int]],
        descriptors: Sequence[int],
    ) -> None:
        """Map chunks (number, serial) of a device's slab, and close their descriptors.

        Without descriptors the host takes the chunks back, and they are unmapped.
        """
        self._reach.clear()
        slab = self._slabs.get(_Lent(entry.host, entry.incarnation, model))
        if not isinstance(slab, DeviceSlabReader) or len(descriptors) not in (0, len(chunks)):
            close_all(descriptors)
            return
        for (chunk, serial), descriptor in zip_longest(chunks, descriptors):
            if descriptor is None:
                slab.drop(chunk, serial)
            else:
                slab.take(chunk, serial, descriptor, self._chunk_came)

    def _chunk_came(self) -> None:
        """Look again at what is within reach; any thread, maybe later, and without the lock."""
        self._chunks_taken += 1
        self._reach.clear()

    def clear(self) -> None:
        self._forget(self._slabs)
        self._pools.close()

    def has(self, key: ExpertKey, placement: Placement | None) -> bool:
        """Return whether an expert can be computed here; any thread may ask, without the lock."""
        layer_key = LayerKey(key.model, key.layer)
        layer = None if placement is None else placement.layers.get(layer_key)
        if placement is None or layer is None or layer_key not in self._forms:
            return False
        if not 0 <= key.expert < len(layer.replicas):
            return False
        version = placement.versions.of(key)
        return any(
            one.model == key.model
            and _can_compute(slab, key.layer, key.expert)
            and _find_slot(slab, key.layer, key.expert, version) is not None
            for one, slab in list(self._slabs.items())
        )

    def __bool__(self) -> bool:
        """Whether anything is lent."""
        return bool(self._slabs)

    @property
    def lenders(self) -> set[str]:
        """The hosts of which something is within reach."""
        return {one.host for one in self._slabs}

    def elements(self, model: str) -> int:
        """Return how many numbers all experts of a model have; 0 if nothing of it is lent."""
        layouts = (slab.layout for one, slab in self._slabs.items() if one.model == model)
        layout = next(layouts, None)
        return sum(
            layer.experts * sum(math.prod(tensor.shape) for tensor in layer.tensors)
            for layer in (layout.layers.values() if layout else ())
        )

    def known_reach(self, key: LayerKey, placement: Placement | None) -> LayerReach | None:
        """Return what `reach` has found already, if anything; any thread, without the lock.

        If it changes at this moment, `LayerReach.compute_all` finds that a slot has changed.
        """
        found = self._reach.get(key)
        return found.reach if found is not None and found.placement is placement else None

    def reach(self, key: LayerKey, placement: Placement | None) -> LayerReach | None:
        """Return what of a layer is within reach under ``placement``; None if nothing is."""
        if not self._slabs or placement is None:
            return None
        found = self._reach.get(key)
        if found is None or found.placement is not placement:
            names = self._names(key, placement)
            if found is not None and found.reach is not None and found.names == names:
                found.placement = placement
            else:
                taken = self._chunks_taken
                found = _Found(placement, names, self._find(key, placement))
                if taken == self._chunks_taken:
                    self._reach[key] = found
        return found.reach

    def in_use(self) -> AbstractContextManager[None]:
        """Return a context in which nothing of a device is mapped or unmapped."""
        return self._pools.in_use()

    def refresh(self, key: LayerKey, placement: Placement | None) -> LayerReach | None:
        """Bring the table of a layer on a device up to date, and return what is within reach."""
        found = self.reach(key, placement)
        if found is not None and found.is_on_device:
            return found
        if key in self._tables:
            self._tables[key].fill_(-1)
        return None

    def _names(self, key: LayerKey, placement: Placement) -> object:
        """Return what the reach of a layer depends on, besides slots: not on shares of the load."""
        layer = placement.layers.get(key)
        hosts = () if layer is None else tuple(tuple(r.host for r in at) for at in layer.replicas)
        used = {host for at in hosts for host in at} & placement.hosts.keys()
        incarnations = {host: placement.hosts[host].incarnation for host in used}
        exact = key.model in placement.exact
        return hosts, incarnations, placement.versions.layer(key), exact

    @property
    def splits(self) -> bool:
        """Whether a part of what is within reach may be sent all the same."""
        return self._shares is not None

    def keep_all(
        self, reach: LayerReach, assignments: int, dispatcher: Dispatcher, now: float
    ) -> tuple[bool, ShareChoice | None]:
        """Return whether all of a call is computed here, and the choice of that, if it was one."""
        if self._shares is None or not self._may_split(reach, dispatcher, now):
            return True, None
        if not self._shares.keeps_all(assignments):
            return False, None
        return True, self._shares.choose(assignments)

    def choose(
        self, reach: LayerReach, assignments: int, dispatcher: Dispatcher, now: float
    ) -> ShareChoice | None:
        """Choose the part of a call that is computed here; None: all that is within reach."""
        if self._shares is None or not self._may_split(reach, dispatcher, now):
            return None
        return self._shares.choose(assignments)

    def _may_split(self, reach: LayerReach, dispatcher: Dispatcher, now: float) -> bool:
        """Return whether any part of a call could as well be sent."""
        if not reach.can_split:
            return False
        healths = [dispatcher.hosts.get(host) for host in reach.hosts]
        return all(health is not None and health.takes_calls(now) for health in healths)

    def took_all(self, key: LayerKey, choice: ShareChoice | None, seconds: float | None) -> None:
        """Record how long a call took that was computed here; None: it has no usable result."""
        if seconds is None:
            self.changed(key)
        if self._shares is None or choice is None:
            return
        if seconds is None:
            self._shares.failed(choice)
        else:
            self._shares.took(choice, seconds)

    def take(self, tensors: LayerTensors, dispatcher: Dispatcher, now: float) -> LentPart | None:
        """Take what is computed here out of the ids that are sent; None if nothing is."""
        self.let_go(now)
        reach = self.reach(tensors.key, dispatcher.placement)
        if reach is None or not reach.takes(tensors.x_TH):
            return None
        all_ids_TK = tensors.ids_TK
        choice = self.choose(reach, int((all_ids_TK >= 0).sum()), dispatcher, now)
        mine_TK, others_TK = reach.split(all_ids_TK, 1.0 if choice is None else choice.part)
        if choice is None and (mine_TK < 0).all():
            return None
        tensors.ids_TK = others_TK
        return LentPart(
            reach,
            tensors.x_TH,
            torch.from_numpy(mine_TK),
            torch.from_numpy(tensors.weights_N.reshape(mine_TK.shape)),
            tensors.exact,
            torch.from_numpy(all_ids_TK),
            choice,
        )

    def took(self, lent: LentPart | None, seconds: float) -> None:
        """Record how long a call took whose lent part this is."""
        if self._shares is not None and lent is not None and lent.choice is not None:
            self._shares.took(lent.choice, seconds)
            lent.timed = True

    def over(self, lent: LentPart | None) -> None:
        """Record that the call of this lent part has ended, with or without a result."""
        if self._shares is not None and lent is not None and lent.choice and not lent.timed:
            self._shares.failed(lent.choice)
            lent.timed = True

    def changed(self, key: LayerKey) -> None:
        """Look again at what is within reach: a slot of the layer has changed."""
        self._reach.pop(key, None)

    def follow(self, placement: Placement, now: float) -> None:
        """Take note of which hosts a new placement names."""
        placed = {(entry.host, entry.incarnation) for entry in placement.hosts.values()}
        before = set(self._orphans)
        for one in self._slabs:
            if (one.host, one.incarnation) in placed:
                self._orphans.pop(one, None)
            else:
                self._orphans.setdefault(one, now + self._orphan_s)
        if before != self._orphans.keys():
            self._reach.clear()

    def let_go(self, now: float) -> None:
        """Free the orphans whose time is over."""
        if self._orphans:
            self._forget(one for one, until in self._orphans.items() if now >= until)

    def _forget(self, lent: Iterable[_Lent]) -> None:
        gone = list(lent)
        if gone:
            self._reach.clear()
            self._joined.clear()
        for one in gone:
            slab = self._slabs.pop(one)
            self._orphans.pop(one, None)
            if isinstance(slab, DeviceSlabReader):
                slab.close()

    def _find(self, key: LayerKey, placement: Placement) -> LayerReach | None:
        try:
            return self._search(key, placement)
        except (RuntimeError, LookupError, ValueError, TypeError, OSError) as error:
            # Hosts compute what cannot be computed here.
            log.exception("%s: what was lent of it cannot be used: %s", key, error)
            return None

    def _search(self, key: LayerKey, placement: Placement) -> LayerReach | None:
        form, layer = self._forms.get(key), placement.layers.get(key)
        if form is None or layer is None:
            return None
        versions, unmapped = placement.versions.layer(key), self._pools.unmapped
        found: dict[int, _Place] = {}
        orphans = [self._slabs[one] for one in self._orphans if one.model == key.model]
        for expert, replicas in enumerate(layer.replicas):
            lenders = (placement.hosts.get(replica.host) for replica in replicas)
            slabs = [
                self._slabs.get(_Lent(entry.host, entry.incarnation, key.model))
                for entry in lenders
                if entry is not None
            ]
            for slab in [*slabs, *orphans]:
                if slab is None or not _can_compute(slab, key.layer, expert):
                    continue
                place = _find_slot(slab, key.layer, expert, versions.of(expert))
                if place is not None:
                    found[expert] = place
                    break
        if not found:
            return None
        slots: dict[_AnySlab, list[tuple[int, int]]] = {}
        for place in found.values():
            slots.setdefault(place.slab, []).append((place.slot, place.generation))
        first = next(iter(slots))
        if isinstance(first, DeviceSlabReader):
            arithmetic, rows = self._on_device(key, form, found, first), _rows(first, key.layer)
        else:
            arithmetic = self._on_cpu(key, form, found)
            rows = _rows(first, key.layer, transposed=form.transposed)
        return LayerReach(
            arithmetic,
            list(found),
            [Slots(slab.entries, *map(list, zip(*t, strict=True))) for slab, t in slots.items()],
            [replicas[0].host if replicas else "" for replicas in layer.replicas],
            *rows,
            exact=key.model in placement.exact,
            mapped=Mapped(self._pools, unmapped) if isinstance(first, DeviceSlabReader) else None,
        )

    def _on_cpu(self, key: LayerKey, form: ExpertForm, found: Mapping[int, _Place]) -> CpuLayer:
        joined, experts = self._join(key), {}
        for expert, place in found.items():
            if isinstance(place.slab, SlabReader):
                lent = place.slab.view(key.layer, expert, place.copy)
                experts[expert] = joined.with_bank(place.slab, key.layer, lent)
        return CpuLayer(form, experts)

    def _on_device(
        self, key: LayerKey, form: ExpertForm, found: Mapping[int, _Place], first: DeviceSlabReader
    ) -> DeviceLayer:
        shape = first.layout.layers[key.layer]
        if key not in self._slot_forms:
            sizes = {tensor.name: tensor.shape for tensor in shape.tensors}
            gated = sizes["up"][0] == 2 * sizes["down"][1]
            known = Activation.of(form.activate, gated=gated)
            activate = None if known else form.activate
            self._slot_forms[key] = SlotForm(known, activate, form.post_norm)
        places = [found[e].at if e in found else -1 for e in range(shape.experts)]
        table_LE = self._tables.get(key)
        if table_LE is None or table_LE.shape[1] != shape.experts:
            table_LE = torch.empty(1, shape.experts, dtype=torch.int32, device=self._device)
            self._tables[key] = table_LE
        # Always the same memory: captured graphs read it, too.
        table_LE.copy_(torch.tensor([places], dtype=torch.int32))
        if self._layer_0 is None:
            self._layer_0 = torch.zeros((), dtype=torch.int32, device=self._device)
        parts = first.parts(key.layer)
        return DeviceLayer(layer_slots(self._slot_forms[key], parts, table_LE, self._layer_0))

    def _join(self, key: LayerKey) -> _Joined:
        """Return what all slabs have of a layer as one bank."""
        having = [
            slab
            for one, slab in self._slabs.items()
            if isinstance(slab, SlabReader)
            and one.model == key.model
            and key.layer in slab.layout.layers
        ]
        found = self._joined.get(key)
        if found is None or found.slabs != having:
            found = self._joined[key] = _Joined(having, bank_of_slabs(having, key.layer))
        return found


def _device_memory(device: torch.device, nbytes: int, chunk_bytes: int) -> Memory:
    return DeviceMemory(device, nbytes, chunk_bytes=chunk_bytes)


def _can_compute(slab: _AnySlab, layer: int, expert: int) -> bool:
    shape = slab.layout.layers.get(layer)
    if shape is None or expert >= shape.experts:
        return False
    return shape.fused is None or fused.instructions(shape.tensors[0].dtype) is not None


def _find_slot(slab: _AnySlab, layer: int, expert: int, version: int) -> _Place | None:
    """Return the slot that has this version of an expert."""
    for copy in range(COPIES):
        slot = slab.layout.slot(layer, expert, copy)
        # The generation first: whatever happens to the slot afterwards changes it.
        generation = slab.entries.generation(slot)
        if generation % 2 or slab.entries.version(slot) != version:
            continue
        at = slab.place(layer, slot) if isinstance(slab, DeviceSlabReader) else slot
        if at is not None:
            return _Place(slab, slot, copy, generation, at)
    return None


def _rows(slab: _AnySlab, layer: int, *, transposed: bool = False) -> tuple[int, torch.dtype]:
    """Return the hidden size and dtype of a layer's rows."""
    (up,) = (tensor for tensor in slab.layout.layers[layer].tensors if tensor.name == "up")
    plain = up.packing is Packing.PLAIN
    return up.shape[0 if transposed and plain else 1], up.dtype
