"""The hosts of a training world: they come, end, restart, freeze, and are overlooked."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from moesaic.cluster.expert_keys import ExpertKey
from moesaic.cluster.placement import HostEntry
from moesaic.cluster.training.contributions import Attempt, Part
from moesaic.cluster.training.orders import Answer, Order
from moesaic.proto.errors import HostLost, MoesaicError, NoAnswer, NotHere
from tests.helpers.cluster.training_host import TrainingHost


@dataclass(frozen=True, kw_only=True)
class Faults:
    """How often something happens; each number is a probability."""

    unanswered: float = 0.03  # an order is lost, or its answer
    unanswered_moves: float = 0.1  # likewise, of those that follow hosts
    repeated: float = 0.05  # an order is carried out twice
    lost: float = 0.01  # a host ends, before or after an order
    restarted: float = 0.01  # likewise, and another incarnation is there at once
    frozen: float = 0.01
    interrupted: float = 0.0  # the shell leaves an exchange
    killed: float = 0.0  # the process that decides is gone, or only seems to be, before an order
    worker_gone: float = 0.0  # a worker is gone, or only seems to be, before an action
    unseen: float = 0.0  # the controller tells of the hosts as it saw them the time before
    pool_changes: float = 0.15  # between two actions of the user: hosts come, leave, are drained
    one_at_a_time: bool = False  # no host is lost until what another one owned has owners again
    idle_only: bool = False  # only hosts that own nothing are lost


class Interrupted(Exception):
    """The user has interrupted the shell."""


class Killed(Exception):
    """The process that decides is gone."""


@dataclass
class Place:
    """One host's name: its incarnation now, and what it has not carried out yet."""

    host: TrainingHost
    domain: str
    frozen: bool = False
    unheard: bool = False  # the controller counts it as lost, and it lives
    waiting: deque[Callable[[], object]] = field(default_factory=deque)


class TrainingHosts:
    """The hosts by their names, and what has happened to them."""

    def __init__(self, chance: random.Random) -> None:
        self.random = chance
        self.places: dict[str, Place] = {}
        self.happened: Counter[str] = Counter()
        self.excused: set[str] = set()  # hosts whose state may be lost
        self._commits: dict[int, Attempt] = {}
        self._named = 0
        self._incarnations: Counter[str] = Counter()

    @property
    def names(self) -> list[str]:
        """All that there ever were."""
        return list(self._incarnations)

    def reach(self, entry: HostEntry) -> TrainingHost:
        place = self.places.get(entry.host)
        if place is None or place.frozen or place.host.entry != entry:
            raise HostLost(f"{entry.host} does not answer")
        return place.host

    def _made(self, name: str) -> TrainingHost:
        self._incarnations[name] += 1
        entry = HostEntry(
            host=name,
            incarnation=self._incarnations[name],
            node=name,
            shm_address="",
            grpc_address=f"{name}#{self._incarnations[name]}",
        )
        return TrainingHost(entry, self.reach, self._commits)

    def join(self) -> str:
        name = f"h{self._named}"
        self.places[name] = Place(self._made(name), domain=f"d{self._named % 3}")
        self._named += 1
        return name

    def lose(self, name: str) -> None:
        self.happened["lost"] += 1
        self.excused.add(name)
        del self.places[name]

    def restart(self, name: str) -> None:
        self.happened["restarted"] += 1
        self.excused.add(name)
        place, before = self.places[name], self.places[name].host
        place.host, place.frozen = self._made(name), False
        place.waiting.clear()
        if self.random.random() < 0.5:  # it adopts its weights
            place.host.experts, place.host.weights = before.experts, dict(before.weights)

    def freeze(self, name: str) -> None:
        self.happened["frozen"] += 1
        self.excused.add(name)
        self.places[name].frozen = True

    def overlook(self, name: str) -> None:
        self.happened["overlooked"] += 1
        self.excused.add(name)
        self.places[name].unheard = True

    def thaw(self, name: str) -> None:
        place = self.places[name]
        place.frozen = place.unheard = False
        while place.waiting:
            place.waiting.popleft()()

    def wait(self) -> None:
        """Let a while pass: a host that is frozen goes on, or the controller counts it as lost."""
        for name, place in self.places.items():
            if place.frozen and self.random.random() < 0.5:
                self.thaw(name)
            elif place.unheard and self.random.random() < 0.5:
                place.unheard = False
            elif place.frozen:
                place.unheard = True

    def add(
        self, name: str, attempt: Attempt, part: Part, version: int, given: Mapping[ExpertKey, int]
    ) -> None:
        """Let a host add a part's gradients up. Raises HostLost, NoAnswer and NotHere."""
        if name not in self.places:
            raise HostLost(f"{name} is gone")
        place = self.places[name]
        host = place.host

        def add() -> MoesaicError | None:
            try:
                host.add(attempt, part, version, given)
            except NotHere as error:
                return error
            return None

        if place.frozen:
            place.waiting.append(add)
            raise NoAnswer(f"{name} has not answered in time")
        if (error := add()) is not None:
            raise error

    def is_safe(self, key: ExpertKey, entry: HostEntry, doubtful: Collection[str]) -> bool:
        """Return whether a run can count on an owner of a key."""
        place = self.places.get(entry.host)
        return (
            place is not None
            and place.host.entry == entry
            and not (place.frozen or place.unheard)
            and entry.host not in doubtful
            and key in place.host.owned
        )


def answer_of(host: TrainingHost, order: Order) -> Answer | MoesaicError:
    try:
        return host.order(order)
    except MoesaicError as error:
        return error
