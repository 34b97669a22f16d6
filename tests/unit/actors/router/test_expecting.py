"""Whether a router has experts, and who connects to their hosts."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import closing

import pytest

from moesaic.actors.router import upkeep
from moesaic.actors.router.router import Router
from moesaic.actors.router.upkeep import Upkeep
from moesaic.actors.transport.base import Channel
from moesaic.cluster.expert_keys import ExpertKey, LayerKey
from moesaic.cluster.placement import HostEntry, LayerPlacement, Placement, PlacementId, Replica
from moesaic.cluster.routing.host_health import HostState
from moesaic.proto.errors import HostLost
from moesaic.proto.keys import ClusterSecret

KEY, OTHER = ExpertKey("m", 0, 0), ExpertKey("m", 1, 0)
ENTRY = HostEntry(host="h0", incarnation=1, node="n", shm_address="", grpc_address="127.0.0.1:1")
PLACED = Placement(
    PlacementId(1, 1), {"h0": ENTRY}, {LayerKey("m", 0): LayerPlacement(((Replica("h0", 1.0),),))}
)


class Connects:
    """Notes the threads that open connections; none of them leads anywhere."""

    def __init__(self) -> None:
        self.threads: list[str] = []
        self.tried = threading.Event()

    def __call__(self, *_: object, **__: object) -> Channel:
        self.threads.append(threading.current_thread().name)
        self.tried.set()
        raise HostLost("nobody listens")


@pytest.fixture
def connects() -> Connects:
    return Connects()


def router_of(connects: Connects) -> Router:
    return Router(name="r", node="n", secret=ClusterSecret.new(), connect=connects)


def test_asking_what_it_has_opens_no_connection(connects: Connects) -> None:
    with closing(router_of(connects)) as router:
        router.place(PLACED)
        assert connects.threads == [threading.current_thread().name]
        assert not router.has([KEY])
        router._dispatcher.hosts["h0"].state = HostState.UP
        assert router.has([KEY])
        assert not router.has([KEY, OTHER])
        assert len(connects.threads) == 1


def test_while_experts_are_expected_the_router_connects_in_its_own_thread(
    connects: Connects,
) -> None:
    with closing(router_of(connects)) as router:
        router.place(PLACED)
        connects.threads.clear()
        connects.tried.clear()
        assert not connects.tried.wait(router.policy.reconnect_s + 5 * upkeep.LOOK_S)
        with router.expecting([KEY]):
            assert connects.tried.wait(10)
    assert set(connects.threads) == {"r-upkeep"}


def test_a_layer_that_is_expected_and_not_placed_is_asked_for(connects: Connects) -> None:
    with closing(router_of(connects)) as router:
        router.stirred.clear()
        with router.expecting([OTHER]):
            assert router.stirred.wait(10)
            assert router.take_load().unplaced == (LayerKey("m", 1),)


def test_the_thread_looks_only_while_somebody_expects_and_survives_errors() -> None:
    looks: list[list[LayerKey]] = []
    looked = threading.Semaphore(0)

    def look(layers: Sequence[LayerKey]) -> None:
        looks.append(list(layers))
        looked.release()
        raise ValueError("a defect")

    kept = Upkeep("r", look)
    with kept.expecting([KEY]):
        assert looked.acquire(timeout=10)
        with kept.expecting([KEY, OTHER]):
            while looks[-1] != [LayerKey("m", 0), LayerKey("m", 1)]:
                assert looked.acquire(timeout=10)
        while looks[-1] != [LayerKey("m", 0)]:
            assert looked.acquire(timeout=10)
    kept.close()
    assert kept._thread is not None
    assert not kept._thread.is_alive()
    with kept.expecting([KEY]):  # one that is closed starts no thread
        assert not kept._thread.is_alive()
