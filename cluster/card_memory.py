"""The memory of cards (GPUs): what each process may take of one, and whether all processes fit.

A card is a GPU, or an instance of a GPU in MIG mode. Hosts keep experts there, trunks their weights
and the key-value cache, and each process has its CUDA context. Sizes of weights and caches are
known before a start; contexts and workspaces are estimates. So what is too small for the former is
an error, and what is too small only for the latter is a warning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

# What one process takes of a card before it has a tensor: the CUDA context and the libraries' code.
CONTEXT_BYTES = 600_000_000
# What a process needs for the tensors of calls and of attention: this part of its limit, at least
# so many bytes.
_WORKSPACE_PART = 1 / 16
LEAST_WORKSPACE_BYTES = 256 << 20
# A host maps memory for experts in chunks. So much may be mapped and not filled.
PARTLY_FILLED_BYTES = 256 << 20
# What an owner keeps for each parameter of an expert with AdamW: master, gradient, two moments.
OWNED_PARAMETER_BYTES = 16
# Two versions of an expert in 16 bits, as while a step is committed.
_VERSIONS_PARAMETER_BYTES = 4
# Tokens of one page of a key-value cache.
CACHE_PAGE_TOKENS = 32
# Ray counts a GPU in so many parts.
_PARTS = 10_000
_MIG = "MIG-"


def mig_names(visible: str | None) -> list[str]:
    """Return the MIG instances that ``CUDA_VISIBLE_DEVICES`` names; empty if it names GPUs."""
    names = [name.strip() for name in (visible or "").split(",")]
    return names if all(name.startswith(_MIG) for name in names) else []


@dataclass(frozen=True, slots=True, kw_only=True)
class CardShare:
    """The part of a card that one process may take, as the spec says it."""

    key: str = ""  # of the process in the spec, such as hosts.0 or trunk
    gpu_memory: float | int | None = None  # a fraction of the card (float), or bytes (int)
    num_gpus: float = 0.0  # what Ray reserves
    trains: bool = False  # the spec has a model that may be trained

    @property
    def limited_by(self) -> str:
        """The key that limits the process, or may be set to limit it."""
        part = self.gpu_memory is None and 0 < self.num_gpus < 1
        return f"{self.key}.{'num_gpus' if part else 'gpu_memory'}"

    def limit_bytes(self, total_bytes: int) -> int | None:
        """Return what the process may take of a card of this size; None: there is no limit."""
        if isinstance(self.gpu_memory, int):
            return self.gpu_memory
        if self.gpu_memory is not None:
            return int(self.gpu_memory * total_bytes)
        return int(self.num_gpus * total_bytes) if 0 < self.num_gpus < 1 else None


@dataclass(frozen=True, slots=True)
class HostRoom:
    """What a host's limit leaves, after the context, for experts and for the tensors of calls.

    ``expert_bytes`` is the size of experts, and the memory that is mapped for them may be larger.
    Where a model is trained, the tensors of its run count as those of calls.
    """

    expert_bytes: int
    workspace_bytes: int

    @classmethod
    def within(cls, limit_bytes: int, *, trains: bool = False) -> HostRoom:
        """Divide a limit; it is too small if no byte is left for experts."""
        workspace = workspace_within(limit_bytes)
        rest = max(0, limit_bytes - CONTEXT_BYTES - PARTLY_FILLED_BYTES - workspace)
        experts = beside_training(rest) if trains else rest
        return cls(experts, workspace + rest - experts)

    @property
    def mapped_bytes(self) -> int:
        """What may be mapped for experts."""
        return self.expert_bytes + PARTLY_FILLED_BYTES


def beside_training(room_bytes: int) -> int:
    """Return how much experts may take where they share a room with what their owners keep.

    A host is taken to own what it holds, with AdamW, in 16 bits.
    """
    both = _VERSIONS_PARAMETER_BYTES + OWNED_PARAMETER_BYTES
    return room_bytes * _VERSIONS_PARAMETER_BYTES // both


def cached_bytes(cache_tokens: int, token_bytes: int) -> int:
    """Return the size of a trunk's key-value cache, which has whole pages."""
    return -(-cache_tokens // CACHE_PAGE_TOKENS) * CACHE_PAGE_TOKENS * token_bytes


def workspace_within(limit_bytes: int) -> int:
    return max(int(limit_bytes * _WORKSPACE_PART), LEAST_WORKSPACE_BYTES)


@dataclass(frozen=True, slots=True)
class Card:
    """A card that this machine's processes can use."""

    name: str  # its UUID, or the name of its MIG instance
    total_bytes: int
    free_bytes: int | None = None  # None: unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class CardProcess:
    """One process that will use a card, and what it keeps there."""

    share: CardShare
    device: int = 0  # the card's number, if Ray reserves none
    holds_experts: bool = False
    most_expert_bytes: int | None = None  # as slots or memory_gb say; None: no such limit
    weight_bytes: int = 0  # besides experts: a trunk's weights and its key-value cache
    workspace_bytes: int = LEAST_WORKSPACE_BYTES

    @property
    def fixed_bytes(self) -> int:
        """All that it takes but experts, with the estimates."""
        chunks = PARTLY_FILLED_BYTES if self.holds_experts else 0
        return self.weight_bytes + CONTEXT_BYTES + chunks + self.workspace_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedProcess:
    """What one process takes of its card."""

    key: str
    expert_bytes: int  # of the experts that it holds at first
    fixed_bytes: int
    limit_bytes: int | None

    @property
    def planned_bytes(self) -> int:
        """What is set apart for the process: its limit, or what it needs."""
        needs = self.expert_bytes + self.fixed_bytes
        return needs if self.limit_bytes is None else self.limit_bytes


@dataclass(frozen=True, slots=True)
class PlannedCard:
    """A card, and what its processes take of it."""

    card: Card
    processes: tuple[PlannedProcess, ...]

    @property
    def planned_bytes(self) -> int:
        return sum(process.planned_bytes for process in self.processes)

    @property
    def needed_bytes(self) -> int:
        return sum(process.expert_bytes + process.fixed_bytes for process in self.processes)

    def __str__(self) -> str:
        counts = Counter((process.key, process.planned_bytes) for process in self.processes)
        parts = [
            f"{key} {gb(planned)}" if count == 1 else f"{count} of {key} {gb(planned)} each"
            for (key, planned), count in counts.items()
        ]
        return (
            f"card {self.card.name}: {gb(self.planned_bytes)} of {gb(self.card.total_bytes)} are "
            f"planned ({', '.join(parts)})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CardProblem:
    """Something that does not fit, by the key that says how large it is."""

    severity: Literal["error", "warning"]
    key: str
    message: str


@dataclass(slots=True)
class CardPlan:
    """What is where, and what does not fit. Without an error no card has more than it can hold."""

    cards: list[PlannedCard] = field(default_factory=list)
    problems: list[CardProblem] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return all(problem.severity != "error" for problem in self.problems)


def plan_cards(
    cards: Sequence[Card],
    processes: Sequence[CardProcess],
    *,
    expert_bytes: int,
    cpu_hosts: Sequence[int | None] = (),
    second_bytes: int = 0,
) -> CardPlan:
    """Plan the memory of all cards of a machine.

    ``processes`` are in the order in which they start. ``expert_bytes`` is the size of all replicas
    of experts. ``cpu_hosts`` has for each host without a card the bytes that it may hold of them,
    or None for any number. ``second_bytes`` is the size of a second version of all experts that are
    to be updated or trained.
    """
    plan = CardPlan()
    places = _places(len(cards), processes)
    for process, place in zip(processes, places, strict=True):
        if place is None:
            _unplaced(plan, process, len(cards))
    there = [
        [process for process, place in zip(processes, places, strict=True) if place == number]
        for number in range(len(cards))
    ]
    for card, own in zip(cards, there, strict=True):
        _check_limits(plan, card, own)
    hosts = [p for own in there for p in own if p.holds_experts]
    others = [expert_bytes + second_bytes if room is None else room for room in cpu_hosts]
    rooms = [room for card, own in zip(cards, there, strict=True) for room in _rooms(card, own)]
    most = [r for c, own in zip(cards, there, strict=True) for r in _rooms(c, own, sure=True)]
    if hosts and plan.fits:
        room = sum(rooms + others)
        _check_experts(plan, hosts, sum(most + others), room, expert_bytes, second_bytes)
    held = iter(_evenly(expert_bytes, [*rooms, *others]))
    for card, own in zip(cards, there, strict=True):
        found = [
            PlannedProcess(
                key=process.share.key,
                expert_bytes=next(held) if process.holds_experts else 0,
                fixed_bytes=process.fixed_bytes,
                limit_bytes=process.share.limit_bytes(card.total_bytes),
            )
            for process in own
        ]
        plan.cards.append(PlannedCard(card, tuple(found)))
    if plan.fits:
        for planned in plan.cards:
            _check_free(plan, planned)
    return plan


def _places(cards: int, processes: Sequence[CardProcess]) -> list[int | None]:
    """Return the number of each process's card as Ray chooses it; None: there is none.

    Ray puts a part of a GPU on the card with the least left over, and whole GPUs on unused cards.
    """
    left = [_PARTS] * cards
    places: list[int | None] = []
    for process in processes:
        wanted, place = round(process.share.num_gpus * _PARTS), None
        if wanted == 0:
            place = process.device if process.device < cards else None
        elif wanted < _PARTS:
            able = [n for n in range(cards) if left[n] >= wanted]
            place = min(able, key=lambda n: left[n]) if able else None
            if place is not None:
                left[place] -= wanted
        elif wanted % _PARTS == 0:
            whole = [n for n in range(cards) if left[n] == _PARTS][: wanted // _PARTS]
            if len(whole) == wanted // _PARTS:
                place = whole[0]
                for number in whole:
                    left[number] = 0
        places.append(place)
    return places


def _unplaced(plan: CardPlan, process: CardProcess, cards: int) -> None:
    wanted = process.share.num_gpus
    if wanted == 0:
        return  # there is no such device, which is another check's error
    text = f"{wanted:g} GPUs cannot be reserved beside the others on the {cards} of this machine; "
    text += "lower num_gpus"
    if wanted > 1 and wanted != int(wanted):
        text = f"{wanted:g}: Ray reserves a part of one GPU, or whole GPUs; set a whole number"
    _add(plan, "error", f"{process.share.key}.num_gpus", text)


def _check_limits(plan: CardPlan, card: Card, own: Sequence[CardProcess]) -> None:
    """Check each process's limit, and that all of a card fit together, experts apart."""
    taken = least = most = 0
    for process in own:
        share = process.share
        limit = share.limit_bytes(card.total_bytes)
        if limit is None:
            least += process.weight_bytes
            most += process.fixed_bytes
            continue
        taken += limit
        if limit > card.total_bytes:
            text = f"{gb(limit)}, but the card has {gb(card.total_bytes)}; set at most that"
            _add(plan, "error", share.limited_by, text)
            return
        if process.holds_experts:
            _check_host(plan, process, limit)
        elif process.weight_bytes > limit:
            text = too_small_for_a_trunk(process.weight_bytes, limit)
            _add(plan, "error", share.limited_by, text)
        elif process.fixed_bytes > limit:
            text = f"about {gb(process.fixed_bytes)} with the CUDA context and the workspace may "
            text += f"be needed, and the limit is {gb(limit)}; raise it, or lower cache_tokens"
            _add(plan, "warning", share.limited_by, text)
    if not own:
        return
    keys = dict.fromkeys(p.share.limited_by for p in own)
    names = ", ".join(keys)
    if taken > card.total_bytes:
        text = f"the limits of the processes on one card ({names}) are {gb(taken)} together, but "
        text += f"the card has {gb(card.total_bytes)}; lower them"
        _add(plan, "error", next(iter(keys)), text)
    elif taken + least > card.total_bytes:
        text = f"the processes on one card ({names}) need {gb(taken + least)} without their "
        text += f"experts, but the card has {gb(card.total_bytes)}; lower limits or "
        text += "trunk.cache_tokens, or use more cards"
        _add(plan, "error", next(iter(keys)), text)
    elif taken + most > card.total_bytes:
        text = f"the processes on one card ({names}) need about {gb(taken + most)} with their CUDA "
        text += f"contexts, and the card has {gb(card.total_bytes)}; lower limits or "
        text += "trunk.cache_tokens, or use more cards"
        _add(plan, "warning", next(iter(keys)), text)


def _check_host(plan: CardPlan, process: CardProcess, limit: int) -> None:
    room = HostRoom.within(limit, trains=process.share.trains)
    if room.expert_bytes == 0:
        _add(plan, "error", process.share.limited_by, too_small_for_a_host(limit))
    elif process.workspace_bytes > room.workspace_bytes:
        text = f"of {gb(limit)} a host keeps {gb(room.workspace_bytes)} for tensors of calls, and "
        text += "the computation of max_batch_rows rows, or the copy of an expert for another "
        text += f"host, may take {gb(process.workspace_bytes)}; raise it, or lower max_batch_rows"
        _add(plan, "warning", process.share.limited_by, text)


def _rooms(card: Card, own: Sequence[CardProcess], *, sure: bool = False) -> list[int]:
    """Return what each host on a card may take for experts, in bytes.

    Hosts without a limit share what the others leave. With ``sure`` nothing is set apart for what
    is only estimated.
    """
    limits = [process.share.limit_bytes(card.total_bytes) for process in own]
    free = card.total_bytes - sum(limit for limit in limits if limit is not None)
    unlimited = [p for p, limit in zip(own, limits, strict=True) if limit is None]
    free -= sum(p.weight_bytes if sure else p.fixed_bytes for p in unlimited)
    shared = [p for p in unlimited if p.holds_experts]
    if not sure and any(process.share.trains for process in shared):
        free = beside_training(free)
    open_rooms = iter(
        _evenly(
            max(0, free),
            [free if p.most_expert_bytes is None else p.most_expert_bytes for p in shared],
        )
    )
    rooms = []
    for process, limit in zip(own, limits, strict=True):
        if not process.holds_experts:
            continue
        if limit is None:
            rooms.append(next(open_rooms))
        else:
            within = min(limit, card.total_bytes)
            room = HostRoom.within(within, trains=process.share.trains).expert_bytes
            most = process.most_expert_bytes
            rooms.append(room if most is None else min(room, most))
    return rooms


def _check_experts(
    plan: CardPlan,
    hosts: Sequence[CardProcess],
    most_room: int,
    room: int,
    expert_bytes: int,
    second_bytes: int,
) -> None:
    keys = ", ".join(dict.fromkeys(host.share.limited_by for host in hosts))
    key = hosts[0].share.limited_by
    if expert_bytes > most_room:
        text = f"experts need {gb(expert_bytes)}, but the hosts' parts of their cards ({keys}) "
        text += f"have room for {gb(most_room)}; raise them, use fewer replicas or another dtype, "
        _add(plan, "error", key, f"{text}or more cards")
    elif expert_bytes > room:
        text = f"experts need {gb(expert_bytes)}, and about {gb(room)} are left for them on the "
        text += "cards beside CUDA contexts and workspaces"
        text += " and what training keeps" if any(host.share.trains for host in hosts) else ""
        text += "; use fewer replicas or more cards"
        _add(plan, "warning", key, text)
    elif second_bytes and expert_bytes + second_bytes > room:
        text = f"{gb(expert_bytes)} of experts fit on the cards, but not {gb(second_bytes)} more "
        text += "for a second version of all experts (models.updates, models.train); update some "
        _add(plan, "warning", "models", f"{text}experts at a time, or train on more cards")


def _check_free(plan: CardPlan, planned: PlannedCard) -> None:
    free, needed = planned.card.free_bytes, planned.needed_bytes
    if free is None or needed <= free or not planned.processes:
        return
    text = f"about {gb(needed)} of card {planned.card.name} are needed, and {gb(free)} of "
    text += f"{gb(planned.card.total_bytes)} are free now: end other programs on it"
    key = planned.processes[0].key
    _add(plan, "warning", "hosts" if key.startswith("hosts") else key, text)


def _evenly(amount: int, rooms: Sequence[int]) -> list[int]:
    """Divide an amount evenly over rooms, none of which gets more than it has."""
    given = [0] * len(rooms)
    left = amount
    for done, number in enumerate(sorted(range(len(rooms)), key=lambda n: rooms[n])):
        part = min(max(0, rooms[number]), left // (len(rooms) - done))
        given[number] = part
        left -= part
    return given


def too_small_for_a_host(limit_bytes: int) -> str:
    least = CONTEXT_BYTES + PARTLY_FILLED_BYTES + workspace_within(limit_bytes)
    return (
        f"{gb(limit_bytes)} have no room for experts: a host on a GPU takes {gb(least)} besides, "
        "for its CUDA context, the tensors of calls and memory that is filled in part; raise it"
    )


def too_small_for_a_trunk(needed_bytes: int, limit_bytes: int) -> str:
    return (
        f"{gb(limit_bytes)}, but the trunk's weights and its key-value cache need "
        f"{gb(needed_bytes)}; raise it, or lower trunk.cache_tokens"
    )


def gb(value: int) -> str:
    return f"{value / 1e9:,.1f} GB"


def _add(plan: CardPlan, severity: Literal["error", "warning"], key: str, message: str) -> None:
    problem = CardProblem(severity=severity, key=key, message=message)
    if problem not in plan.problems:  # processes of one group have the same
        plan.problems.append(problem)
