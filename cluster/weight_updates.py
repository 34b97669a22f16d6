"""Updates of experts' weights in a running pool: which versions arrive, and which are served.

An update has three steps. `begin` gives it a number, which is the version of its experts. Then the
weights arrive: somebody puts each expert into a host, and the controller lets the others load it
from there, while all requests still use the version before. At last `serve` makes all of them the
served versions at once, in the next placement. Until then an update can be abandoned without a
trace; `hold` keeps it while it is written to its model's folder. Going back to the versions before
is an update, too, whose weights hosts may still have.

Numbers and what is served outlive the controller (`snapshot`), and the updates of a folder outlive
the cluster (`replay`); an update on its way does not.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .expert_keys import FIRST_VERSION, ExpertKey, ExpertVersion
from .versions import WeightVersions

# Updates that can be reverted are remembered up to this number, for each model.
_KEPT = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """One change of experts of one model."""

    model: str
    number: int
    versions: Mapping[ExpertKey, int]  # to be served
    before: Mapping[ExpertKey, int]  # served until then
    who: str
    reverts: int | None = None  # the number of the update that it takes back

    @property
    def weights(self) -> list[ExpertVersion]:
        return [ExpertVersion(key, version) for key, version in self.versions.items()]


class Holdings(Protocol):
    """What hosts hold, and which versions are served."""

    @property
    def versions(self) -> WeightVersions:
        """The versions that are served."""
        ...

    def serve(self, versions: WeightVersions) -> None:
        """Serve these versions from now on."""
        ...

    def holders(self, key: ExpertKey, version: int | None = None) -> list[str]:
        """Return the hosts that hold a version of an expert (None: the served one)."""
        ...


class WeightUpdates:
    """The updates of one pool's models, one at a time for each model."""

    def __init__(self, view: Holdings, saved: set[ExpertVersion]) -> None:
        """Start without updates; ``saved`` has the versions that hosts can read from a file."""
        self.past: list[WeightUpdate] = []  # served, the oldest first
        self.trained_by: dict[str, int] = {}  # model -> the run that trains it, if one does
        self._view = view
        self._saved = saved
        self._numbers: dict[str, int] = {}  # the last number of each model
        self._arriving: dict[str, tuple[WeightUpdate, float]] = {}  # with its deadline

    # ---- one update -----------------------------------------------------------------------------

    def begin(
        self, model: str, experts: Collection[ExpertKey], *, who: str, until: float
    ) -> WeightUpdate:
        """Begin an update of these experts, which is abandoned at ``until`` if it is not served.

        Raises ValueError while another update of the model is under way, or a run trains it.
        """
        number = self._next(model)
        return self._start(
            WeightUpdate(
                model=model,
                number=number,
                versions=dict.fromkeys(experts, number),
                before={key: self._view.versions.of(key) for key in experts},
                who=who,
            ),
            until,
        )

    def begin_revert(self, model: str, *, who: str, until: float) -> WeightUpdate:
        """Begin to go back to the versions before the last update that is still in effect.

        Raises ValueError if there is none, and while another update of the model is under way, or a
        run trains it.
        """
        last = self.last(model)
        if last is None:
            raise ValueError(f"models.{model}: no update of its weights is in effect")
        number = self._next(model)
        return self._start(
            WeightUpdate(
                model=model,
                number=number,
                versions=last.before,
                before=last.versions,
                who=who,
                reverts=last.number,
            ),
            until,
        )

    def is_under_way(self, update: WeightUpdate) -> bool:
        """Return whether an update was neither served nor abandoned."""
        return self._arriving.get(update.model, (None,))[0] is update

    def hold(self, update: WeightUpdate) -> None:
        """Keep an update until it is served or abandoned, however long that takes.

        Raises ValueError if it was abandoned, or if no host holds one of its experts.
        """
        self._check(update, in_file=False)
        self._arriving[update.model] = update, math.inf

    def serve(self, update: WeightUpdate, *, in_file: bool) -> None:
        """Serve the update's versions from the next placement on.

        ``in_file`` says whether its weights were saved, so that hosts can read them again. Raises
        ValueError if the update was abandoned, or if neither a host nor a file has an expert of it.
        """
        self._check(update, in_file=in_file)
        del self._arriving[update.model]
        self._remember(update)
        if in_file:
            self._saved.update(new_weights(update))
        self._view.serve(self._view.versions.updated(update.versions))

    def replay(self, model: str, updates: Sequence[WeightUpdate], last_number: int) -> None:
        """Serve what the updates of a model's folder lead to.

        No number up to ``last_number`` is given to an update, because the folder has a file of it.
        """
        self.past = [one for one in self.past if one.model != model]
        others = {k: v for k, v in self._view.versions.experts.items() if k.model != model}
        versions = WeightVersions(self._view.versions.models, others)
        for update in updates:
            self._remember(update)
            self._saved.update(new_weights(update))
            versions = versions.updated(update.versions)
        self._numbers[model] = max(self._numbers.get(model, FIRST_VERSION), last_number)
        self._view.serve(versions)

    def forget(self, model: str) -> None:
        """Forget the updates of a model that is not served any more; its numbers stay used."""
        self.past = [one for one in self.past if one.model != model]
        self._saved -= {one for one in self._saved if one.key.model == model}
        self._view.serve(self._view.versions.without(model))

    def abandon(self, update: WeightUpdate) -> None:
        """Give an update up; hosts evict what has arrived of it."""
        if self.is_under_way(update):
            del self._arriving[update.model]

    def advance(self, now: float) -> None:
        """Abandon updates whose time is over."""
        for update, until in list(self._arriving.values()):
            if now >= until:
                self.abandon(update)

    def reserve(self, model: str) -> int:
        """Return the next number of a model; it is not given out again."""
        self._numbers[model] = self._numbers.get(model, FIRST_VERSION) + 1
        return self._numbers[model]

    # ---- queries --------------------------------------------------------------------------------

    def last_number(self, model: str) -> int | None:
        """Return the number of the newest update of a model, also of a revert; None: no update."""
        mine = [update.number for update in self.past if update.model == model]
        return mine[-1] if mine else None

    def last(self, model: str) -> WeightUpdate | None:
        """Return the newest update of a model that was not taken back, or None.

        Those before the last training step are in effect no more.
        """
        trained = self._view.versions.models.get(model, FIRST_VERSION)
        taken_back = {update.reverts for update in self.past if update.model == model}
        left = [
            update
            for update in self.past
            if update.model == model
            and update.reverts is None
            and update.number not in taken_back
            and update.number > trained
        ]
        return left[-1] if left else None

    def arriving(self) -> dict[ExpertKey, int]:
        """Return the versions of the updates that are under way."""
        return {
            key: version
            for update, _ in self._arriving.values()
            for key, version in update.versions.items()
        }

    def is_updating(self, model: str) -> bool:
        """Return whether an update of a model is under way."""
        return model in self._arriving

    def missing(self, update: WeightUpdate) -> list[ExpertVersion]:
        """Return what no host holds yet of an update."""
        return [one for one in update.weights if not self._view.holders(one.key, one.version)]

    def is_ready(self, update: WeightUpdate) -> bool:
        """Return whether each host that serves an expert of it has the update's version as well."""
        return not self.missing(update) and all(
            set(self._view.holders(one.key)) <= set(self._view.holders(one.key, one.version))
            for one in update.weights
        )

    # ---- for later controllers ------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Return what a later controller must know, as JSON values."""
        versions = self._view.versions
        return {
            "numbers": dict(self._numbers),
            "models": dict(versions.models),
            "experts": _to_json(versions.experts),
            "past": [
                {
                    "model": update.model,
                    "number": update.number,
                    "versions": _to_json(update.versions),
                    "before": _to_json(update.before),
                    "who": update.who,
                    "reverts": update.reverts,
                }
                for update in self.past
            ],
            "saved": [[*key, version] for key, version in sorted(self._saved)],
        }

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Take over what `snapshot` of an earlier controller returned."""
        self._numbers = dict(kept["numbers"])
        self.past = [
            WeightUpdate(
                **{
                    **one,
                    "versions": _from_json(one["versions"]),
                    "before": _from_json(one["before"]),
                }
            )
            for one in kept["past"]
        ]
        self._saved.update(ExpertVersion(ExpertKey(*key), v) for *key, v in kept["saved"])
        self._view.serve(WeightVersions(dict(kept["models"]), _from_json(kept["experts"])))

    # ---- steps ----------------------------------------------------------------------------------

    def _next(self, model: str) -> int:
        if model in self._arriving:
            number = self._arriving[model][0].number
            raise ValueError(
                f"models.{model}: update {number} is under way; try again when it ends"
            )
        if model in self.trained_by:
            raise ValueError(
                f"models.{model}: run {self.trained_by[model]} trains it, and only that run may "
                "change its weights; end the run first"
            )
        # A number is used once, also by an update that is abandoned: hosts may have its weights.
        return self.reserve(model)

    def _check(self, update: WeightUpdate, *, in_file: bool) -> None:
        if not self.is_under_way(update):
            raise ValueError(f"update {update.number} of {update.model} has already ended")
        missing = [] if in_file else self.missing(update)
        if missing:
            raise ValueError(f"no host holds {missing[0]}, and {len(missing) - 1} more")

    def _remember(self, update: WeightUpdate) -> None:
        self.past.append(update)
        mine = [one for one in self.past if one.model == update.model]
        if len(mine) > _KEPT:
            self.past.remove(mine[0])

    def _start(self, update: WeightUpdate, until: float) -> WeightUpdate:
        self._arriving[update.model] = update, until
        return update


def new_weights(update: WeightUpdate) -> list[ExpertVersion]:
    """Return the versions that the update itself brings; a revert brings none."""
    return [one for one in update.weights if one.version == update.number]


def _to_json(versions: Mapping[ExpertKey, int]) -> list[list[Any]]:
    return [[*key, version] for key, version in versions.items()]


def _from_json(versions: list[list[Any]]) -> dict[ExpertKey, int]:
    return {ExpertKey(*key): version for *key, version in versions}
