"""What a training step keeps and moves, counted in the tensors themselves."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.actors.host.host import ExpertHost
from moesaic.actors.host.weight_store import ExpertStore, ServedWeights
from moesaic.actors.router.layer_tensors import LayerTensors
from moesaic.actors.transport.bulk.lent_memory import LentMemory
from moesaic.actors.transport.bulk.links import BulkLinks
from moesaic.cluster.expert_keys import TRUNK
from moesaic.cluster.placement import HostEntry
from moesaic.cluster.training.orders import Answer, BulkKey, Order
from moesaic.proto.errors import MoesaicError
from tests.helpers.training.runs import LocalPool


def storages(*roots: object) -> dict[int, int]:
    """The memory of all tensors that objects of ours lead to: {address: bytes}, each once."""
    found: dict[int, int] = {}
    todo, seen = list(roots), set[int]()
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, (ExpertStore, type)):
            continue  # the weights that are served are counted by themselves
        seen.add(id(one))
        if isinstance(one, Tensor):
            memory = one.untyped_storage()
            found[memory.data_ptr()] = memory.nbytes()
            todo.append(one.grad)
        elif isinstance(one, Mapping):
            todo += one.values()
        elif isinstance(one, (list, tuple, set, frozenset)):
            todo += one
        elif isinstance(one, torch.optim.Optimizer):
            todo += [one.state, one.param_groups]
        elif type(one).__module__.startswith("moesaic."):
            slots = [getattr(one, name, None) for name in getattr(type(one), "__slots__", ())]
            todo += [*slots, *getattr(one, "__dict__", {}).values()]
    return found


class Peaks:
    """The most memory that each host had at moments of a step: {moment: {host: bytes}}."""

    def __init__(self, pool: LocalPool, patch: pytest.MonkeyPatch) -> None:
        """Look at a host after each of its orders, and whenever it begins to serve weights."""
        self.found: dict[str, dict[str, int]] = {}
        self._pool = pool
        answer, serve = pool._answer, ServedWeights.serve

        def answered(host: str, order: Order) -> Answer | MoesaicError:
            found = answer(host, order)
            self._look(type(order).__name__, pool.alive[host])
            return found

        def served(self_: ServedWeights, given: Any) -> None:
            serve(self_, given)
            self._look("serving", pool.alive[self_._host], given)

        patch.setattr(pool, "_answer", answered)
        patch.setattr(ServedWeights, "serve", served)

    def look(self, moment: str) -> None:
        """Look at all hosts, as soon as they have added up what they have answered."""
        for host in self._pool.alive.values():
            host._loop.call(lambda: None)
            self._look(moment, host)

    def _look(self, moment: str, host: ExpertHost, *more: object) -> None:
        kept = storages(host.training._run, host._loop.gradients, *more)
        most = self.found.setdefault(moment, {})
        nbytes = _pages(host) + sum(kept.values())
        most[host.name] = max(most.get(host.name, 0), nbytes)


def _pages(host: ExpertHost) -> int:
    """Bytes of the pages that a host's slabs take, whether an expert is in them or not."""
    found = 0
    for _, memory in host._store.memories():
        if memory.descriptor is not None:
            found += os.fstat(memory.descriptor).st_blocks * 512
    return found


@dataclass
class MovedBytes:
    """Bytes of tensors that were moved: of calls, and by kind of what took the bulk path."""

    calls: int = 0
    rows: int = 0  # of calls: a token is one in each call to a host
    cells: int = 0  # assignments that calls have room for: rows x columns
    bulk: Counter[str] = field(default_factory=Counter[str])


@contextmanager
def counting(patch: pytest.MonkeyPatch) -> Iterator[MovedBytes]:
    """Count what calls carry both ways, and what is got and put over the bulk path."""
    moved = MovedBytes()
    write, accept = LayerTensors.write, LayerTensors.accept
    get, put, lend = BulkLinks.get, BulkLinks.put, BulkLinks.lend

    def written(self: LayerTensors, send: Any, frame: Any, layout: Any, buffer: Any) -> None:
        write(self, send, frame, layout, buffer)
        moved.calls += layout.call_bytes
        moved.rows += layout.rows
        moved.cells += layout.rows * layout.top_k

    def accepted(self: LayerTensors, send: Any, reply: Any, payload: Tensor) -> None:
        accept(self, send, reply, payload)
        moved.calls += self.layout(*send.assignment_tk.shape).reply_bytes

    def moves(key: BulkKey, tensors: Mapping[str, Tensor]) -> None:
        kind = "trunk" if key.key.layer == TRUNK else key.kind
        moved.bulk[kind] += sum(tensor.nbytes for tensor in tensors.values())

    @contextmanager
    def got(
        self: BulkLinks, entry: HostEntry, wanted: BulkKey, *, timeout_s: float
    ) -> Iterator[Mapping[str, Tensor]]:
        with get(self, entry, wanted, timeout_s=timeout_s) as tensors:
            moves(wanted, tensors)
            yield tensors

    def given(self: BulkLinks, entry: HostEntry, key: BulkKey, tensors: Any, **more: Any) -> None:
        put(self, entry, key, tensors, **more)
        moves(key, tensors)

    def lent(self: BulkLinks, entry: HostEntry, many: Any, memory: LentMemory, **more: Any) -> None:
        lend(self, entry, many, memory, **more)
        for key, tensors in many.items():
            if memory.find(tensors):  # the others are put
                moves(key, tensors)

    patched: list[tuple[type, str, Callable[..., Any]]] = [
        (LayerTensors, "write", written),
        (LayerTensors, "accept", accepted),
        (BulkLinks, "get", got),
        (BulkLinks, "put", given),
        (BulkLinks, "lend", lent),
    ]
    with patch.context() as inside:
        for where, name, new in patched:
            inside.setattr(where, name, new)
        yield moved
