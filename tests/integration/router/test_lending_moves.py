"""Lent and sent experts under random moves: results are the same to the bit, whoever computes."""

from __future__ import annotations

import random
import threading
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from moesaic.actors.host.host import ExpertHost
from moesaic.cluster.expert_keys import ExpertVersion
from moesaic.cluster.placement import LayerPlacement, Placement, PlacementId, Replica
from tests.helpers.effort import tries
from tests.helpers.pool.lending import borrowing, key
from tests.helpers.pool.serving import EXPERTS, KEY, PATIENT, Hosts, inputs, save_model, serving
from tests.helpers.pool.transports import settles


class Moves:
    """Experts of one layer that move about between hosts, of which some lend."""

    def __init__(self, pool: Hosts, hosts: list[ExpertHost], seed: int) -> None:
        self._pool = pool
        self._hosts = {host.name: host for host in hosts}
        self._drawn = random.Random(seed)
        self._epoch = 1
        first = pool.placement.layers[KEY]
        self.at = [set(first.hosts(expert)) for expert in range(EXPERTS)]

    def placement(self) -> Placement:
        self._epoch += 1
        replicas = tuple(
            tuple(Replica(host, 1 / len(hosts)) for host in self._shuffled(hosts))
            for hosts in self.at
        )
        entries = {name: host.entry() for name, host in self._hosts.items()}
        layers = {**self._pool.placement.layers, KEY: LayerPlacement(replicas)}
        return Placement(PlacementId(1, self._epoch), entries, layers, frozenset({"m"}))

    def _shuffled(self, hosts: set[str]) -> list[str]:
        return self._drawn.sample(sorted(hosts), len(hosts))

    def add(self) -> None:
        """Load a replica, which no placement names yet."""
        expert, name = self._drawn.randrange(EXPERTS), self._drawn.choice(sorted(self._hosts))
        wanted = ExpertVersion(key(expert), 1)
        self._hosts[name].load([(self._pool.ref, self._pool.shape)], [wanted])
        self.at[expert].add(name)

    def choose_to_leave(self) -> tuple[int, str] | None:
        """Choose a replica that is not its expert's last; placements do not name it any more."""
        movable = [(e, name) for e, hosts in enumerate(self.at) if len(hosts) > 1 for name in hosts]
        if not movable:
            return None
        expert, name = self._drawn.choice(sorted(movable))
        self.at[expert].discard(name)
        return expert, name

    def evict(self, expert: int, name: str) -> None:
        self._hosts[name].release([ExpertVersion(key(expert), 1)])


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize("fenced", [False, True], ids=["late", "fenced"])
def test_moves_change_no_bit(tmp_path: Path, splits: bool, fenced: bool) -> None:
    """``fenced``: evictions wait for the router, as the controller sees to. Otherwise the router
    is one that was frozen past its lease, and computes with slots that are freed and refilled."""
    with ExitStack() as stack:
        pool = stack.enter_context(serving(save_model(tmp_path), lends=True, exact=True))
        other = ExpertHost("other", node="here", device="cpu")
        stack.callback(other.close)
        plain = pool.router()
        cases = [inputs(tokens, seed=tokens) for tokens in (1, 3, 40)]
        wanted = [plain.forward(KEY, *case) for case in cases]
        policy = replace(PATIENT, splits_lent=splits)
        router = borrowing(pool, "host-0", "host-1", policy=policy)
        moves = Moves(pool, [*pool.hosts, other], seed=2 * fenced + splits)
        router.place(moves.placement())
        router.wait_ready(10.0)
        over, failures, made = threading.Event(), list[str](), [0, 0]

        def compute(mine: int) -> None:
            while not over.is_set():
                case = made[mine] % len(cases)
                if not torch.equal(router.forward(KEY, *cases[case]), wanted[case]):
                    failures.append(f"case {case}")
                made[mine] += 1

        def calls_since(before: list[int]) -> bool:
            """Whether each thread has begun and ended a call: none runs that is older."""
            return all(now >= then + 2 for now, then in zip(made, before, strict=True))

        threads = [threading.Thread(target=compute, args=(n,)) for n in range(len(made))]
        for thread in threads:
            thread.start()
        try:
            for _ in range(tries(120)):
                moves.add()
                gone = moves.choose_to_leave()
                if gone is not None and not fenced:
                    moves.evict(*gone)
                router.place(moves.placement())
                if gone is not None and fenced:
                    before = list(made)
                    assert settles(partial(calls_since, before))
                    moves.evict(*gone)
        finally:
            over.set()
            for thread in threads:
                thread.join(20.0)
        assert not any(thread.is_alive() for thread in threads)
        assert failures == []
        stats = router.stats()
        assert stats.lent > 0
        assert stats.rows_lost == 0
        # A part that was sent before the rest had to be computed again is counted again.
        assert router.take_load().counts[KEY].sum() >= 2 * stats.rows
