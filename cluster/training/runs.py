"""Which run trains a pool's model, whether it still lives, and which of its versions is served.

One run trains at a time. It lives as long as it is heard: when its lease is over, it has ended, and
hosts forget what they keep for it. All versions of the model from the number of its next step on
are its own, and stay on hosts while it lives. `publish` names one of them, which is served as soon
as every replica in the placement has it; before that nothing changes for anybody.

Numbers of runs and of versions, and the run itself, outlive the controller (`snapshot`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

from ...proto.errors import ClusterError, NoRun, Superseded
from ..expert_keys import ExpertKey, ExpertVersion, LayerKey
from ..placement import HostEntry, LayerPlacement, ModelShape, PlacementId, every_expert
from ..versions import WeightVersions
from ..weight_updates import WeightUpdates
from .orders import RunId
from .progress import RunProgress

# How long a run lives without being heard.
RUN_LEASE_S = 30.0


class TrainingRequest(NamedTuple):
    """A process asks to train a model."""

    model: str
    who: str
    # Whether it takes the place of a process that is gone.
    succeed: bool = False
    workers: int = 1  # that train together; all of them ask


@dataclass(frozen=True, slots=True, kw_only=True)
class BegunTraining:
    """What a run has to know when it begins."""

    run: RunId
    first: RunId  # the number under which it began; another one, if it goes on for others
    since: RunId | None  # the same, if this process is to go on with what they have done
    versions: WeightVersions  # of the model, as they are served
    next_version: int  # that its first step brings; each further step adds one
    redundancy: int  # how many owners of a key may be lost at once, as the spec says
    lease_s: float  # how long it lives without asking for news


class NewsRequest(NamedTuple):
    """A run asks for news of its pool, and tells that it lives."""

    run: RunId
    skip: int | None = None  # a version of it that is never to be served
    knows: PlacementId | None = None  # the last placement that it was told
    tells: RunProgress | None = None  # None: nothing new


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingNews:
    """What a run has to know of its pool, again and again."""

    entries: Mapping[str, HostEntry]  # of the hosts that are up
    domains: Mapping[str, str]  # in which each of these fails
    leaving: frozenset[str]  # of these, which must become empty
    versions: WeightVersions  # of the model, as they are served
    # Versions that are served no more, or belonged to earlier runs, and that some host still has. A
    # host has room for the next one when they are gone.
    old_versions: frozenset[int]
    placed: PlacementId | None  # None: the run knows the newest placement
    layers: Mapping[LayerKey, LayerPlacement]  # of the model, in this placement


class Held(Protocol):
    """What one host holds."""

    @property
    def holdings(self) -> Mapping[LayerKey, Mapping[int, Collection[int]]]: ...


class Pool(Protocol):
    """What hosts hold, and which versions are served."""

    @property
    def versions(self) -> WeightVersions: ...

    @property
    def observations(self) -> Mapping[str, Held]: ...

    def serve(self, versions: WeightVersions) -> None: ...


@dataclass(slots=True, kw_only=True)
class LivingRun:
    """The run that trains now."""

    run: RunId
    model: str
    who: str
    began_at: float  # seconds since 1970
    next_version: int  # which its next step brings
    steps: int = 0  # versions of it that were published
    since: RunId = 0  # the number with which it began, before others followed; 0: this one
    workers: int = 1  # that it is meant for; with 1 the process that trains decides, too
    entered: int = 1  # of these, so far

    @property
    def first(self) -> RunId:
        return self.since or self.run

    def __str__(self) -> str:
        return f"run {self.run} ({self.who}) that trains {self.model}"


@dataclass(slots=True, kw_only=True)
class Publication:
    """A version that is to be served; it is under way until it is served or has an error."""

    model: str
    version: int
    until: float
    served: bool = False
    whole: bool = False  # whether each replica in the placement has it
    error: str = ""

    @property
    def under_way(self) -> bool:
        return not self.served and not self.error


class TrainingRuns:
    """The runs of one pool, one after the other."""

    def __init__(self, pool: Pool, updates: WeightUpdates) -> None:
        """Start without a run; ``updates`` gives out the numbers of versions."""
        self.alive: LivingRun | None = None
        self.last_run: RunId = 0
        self._pool = pool
        self._updates = updates
        self._publication: Publication | None = None
        self.told = RunProgress()  # by the run that lives
        self.ending = ""  # why the last run has ended
        self.expired = False  # whether it has because its lease was over
        # A lease is measured in the time that the controller has listened. One that was frozen has
        # heard no run, so the time between two rounds counts for at most a third of a lease.
        self._listened_s = 0.0
        self._looked: float | None = None
        self._heard_s = 0.0

    # ---- a run ----------------------------------------------------------------------------------

    def begin(
        self,
        model: str,
        layers: Mapping[LayerKey, LayerPlacement],
        *,
        who: str,
        unix_s: float,
        now: float,
        workers: int = 1,
    ) -> LivingRun:
        """Begin to train a model; ``layers`` are published, and ``unix_s`` is the time of day.

        ``workers`` are meant to take part; the others `join`. Raises ClusterError.
        """
        if self.alive is not None:
            raise ClusterError(
                f"model {model!r}: {self.alive} lives, since "
                f"{max(0.0, unix_s - self.alive.began_at):.0f} s; one run trains at a time, so end "
                f"it, or wait {RUN_LEASE_S:g} s after its process has ended"
            )
        if self._updates.is_updating(model):
            raise ClusterError(
                f"model {model!r}: an update of its weights is under way; try again when it ends"
            )
        placed = {key: layer for key, layer in layers.items() if key.model == model}
        nowhere = [
            key.expert(expert)
            for key, layer in placed.items()
            for expert, replicas in enumerate(layer.replicas)
            if not replicas
        ]
        if nowhere or not placed:
            what = f"no host holds {nowhere[0]}" if nowhere else "it is not placed yet"
            raise ClusterError(f"model {model!r}: {what}; see `moesaic status`, and try again")
        self.last_run += 1
        self.alive = LivingRun(
            run=self.last_run,
            model=model,
            who=who,
            began_at=unix_s,
            # Hosts may still have what an earlier run has brought and not published.
            next_version=self._updates.reserve(model),
            workers=workers,
        )
        self._updates.trained_by[model] = self.last_run
        self._heard_s = self._listened(now)
        return self.alive

    def join(self, asked: TrainingRequest) -> LivingRun | None:
        """Return the run of several workers that this one belongs to; None: there is none."""
        found, (model, who, late, workers) = self.alive, asked
        if found is None or (found.model, found.who, found.workers) != (model, who, workers):
            return None
        if workers == 1 or not (late or found.entered < workers):
            return None
        found.entered += 1
        return found

    def succeed(self, model: str, *, who: str, now: float) -> LivingRun:
        """Let another process go on with the run that lives, under the next number.

        The process before is superseded, whether or not it is gone. Raises NoRun if none trains the
        model.
        """
        found = self.alive
        if found is None or found.model != model:
            last = f"; the last one has ended: {self.ending}" if self.ending else ""
            raise NoRun(f"model {model!r}: no run that trains it lives{last}; begin a new one")
        self.last_run += 1
        found.since = found.first
        found.run, found.who = self.last_run, who
        self._updates.trained_by[model] = self.last_run
        if self._publication is not None:
            self._publication.error = f"{found} has followed the run that asked"
        self._publication = None
        self._heard_s = self._listened(now)
        self.told = RunProgress()
        return found

    def known(self, run: RunId) -> LivingRun:
        """Return a run that lives. Raises Superseded if a newer one rules, and ClusterError."""
        if self.alive is not None and self.alive.run == run:
            return self.alive
        if run < self.last_run:
            newer = f"run {self.last_run}" if self.alive is None else str(self.alive)
            raise Superseded(f"run {run} was followed by {newer}; begin to train anew")
        why = (run == self.last_run and self.ending) or "the controller does not know it"
        raise Superseded(f"run {run} does not live: {why}; begin to train anew")

    def renew(self, run: RunId, now: float, tells: RunProgress | None = None) -> LivingRun:
        """Renew a run's lease, and take note of what it tells. Raises as `known`."""
        found = self.known(run)
        self._heard_s = self._listened(now)
        self.told = tells or self.told
        return found

    def end(self, run: RunId) -> None:
        """End a run; one that has ended already stays so."""
        if self.alive is not None and self.alive.run == run:
            self._end("it was ended", expired=False)

    # ---- its versions ---------------------------------------------------------------------------

    def publish(self, run: RunId, version: int, *, until: float, now: float) -> Publication:
        """Serve a version as soon as the replicas in the placement have it.

        From ``until`` on those that have it suffice, if each expert has one. Raises as `known`,
        and ClusterError for another version than the run's next one. One that is served already
        may be named again.
        """
        found = self.renew(run, now)
        again = self._publication
        if again is not None and again.version == version:
            again.until = max(again.until, until)
            return again
        served = self._pool.versions.models.get(found.model)
        if version == served and version == found.next_version - 1:
            return Publication(model=found.model, version=version, until=until, served=True)
        if version != found.next_version:
            raise ClusterError(
                f"version {version} of {found.model}: the next one of run {run} is "
                f"{found.next_version}; no number is used twice"
            )
        self._publication = Publication(model=found.model, version=version, until=until)
        return self._publication

    def skip(self, run: RunId, version: int) -> None:
        """Never serve a run's next version, of which some hosts have a part; another one follows.

        It may be said again. Raises as `known`.
        """
        found = self.known(run)
        if version == found.next_version:
            self._publication = None
            found.next_version = self._updates.reserve(found.model)

    def advance(self, layers: Mapping[LayerKey, LayerPlacement], now: float) -> Publication | None:
        """End the run if its lease is over, and serve the version that is to be served.

        ``layers`` are published. Return what is served from now on.
        """
        self._listened_s, self._looked = self._listened(now), now
        if self.alive is not None and self._listened_s - self._heard_s >= RUN_LEASE_S:
            self._end(f"nothing was heard of it for {RUN_LEASE_S:g} s", expired=True)
        asked, run = self._publication, self.alive
        if asked is None or run is None:
            return None
        placed = {key: layer for key, layer in layers.items() if key.model == asked.model}
        asked.whole, lagging, nowhere = self._spread(asked.version, placed)
        missing = self._missing(asked.version, nowhere)
        if (lagging or missing or not placed) and now < asked.until:
            return None
        self._publication = None
        if missing or not placed:
            what = f"no host has it of {missing[0]}" if missing else "the model is not placed"
            asked.error = (
                f"version {asked.version} of {asked.model}: {what} at the deadline, so the version "
                f"before stays ({len(missing)} experts lack it)"
            )
            return None
        self._pool.serve(self._pool.versions.trained(asked.model, asked.version))
        run.steps += 1
        run.next_version = self._updates.reserve(asked.model)
        asked.served = True
        return asked

    # ---- queries --------------------------------------------------------------------------------

    @property
    def is_publishing(self) -> bool:
        return self._publication is not None

    def is_alive(self, run: RunId) -> bool:
        """Return whether hosts are to keep what they have of a run; 0: they have nothing."""
        alive = self.alive
        # Hosts hear of a successor after the controller.
        return not run or (alive is not None and alive.first <= run <= alive.run)

    def is_arriving(self, weights: ExpertVersion) -> bool:
        """Return whether a version is one that the living run brings."""
        run = self.alive
        return (
            run is not None
            and weights.key.model == run.model
            and weights.version >= run.next_version
        )

    def arriving(self, models: Iterable[ModelShape]) -> dict[ExpertKey, int]:
        """Return what is about to be served, so that hosts without it may load it."""
        asked = self._publication
        if asked is None:
            return {}
        shapes = [shape for shape in models if shape.model == asked.model]
        return dict.fromkeys(every_expert(shapes), asked.version)

    def old_versions(self) -> frozenset[int]:
        """Return the versions of the trained model on hosts that are served no more.

        They take the room of the versions to come.
        """
        run = self.alive
        if run is None:
            return frozenset()
        served = self._pool.versions
        return frozenset(
            version
            for seen in self._pool.observations.values()
            for layer, experts in seen.holdings.items()
            if layer.model == run.model
            for expert, versions in experts.items()
            for version in versions
            if version < run.next_version and version != served.of(layer.expert(expert))
        )

    # ---- for later controllers ------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Return what a later controller must know, as JSON values."""
        return {"last": self.last_run, "alive": None if self.alive is None else asdict(self.alive)}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Take over what `snapshot` of an earlier controller returned, before the first round."""
        self.last_run = kept["last"]
        if kept["alive"] is not None:
            self.alive = LivingRun(**kept["alive"])
            self._updates.trained_by[self.alive.model] = self.alive.run

    # ---- steps ----------------------------------------------------------------------------------

    def _end(self, why: str, *, expired: bool) -> None:
        assert self.alive is not None
        del self._updates.trained_by[self.alive.model]
        self.ending, self.expired = why, expired
        if self._publication is not None:
            self._publication.error = f"run {self.alive.run} does not live: {why}"
        self.alive = self._publication = None
        self.told = RunProgress()

    def _listened(self, now: float) -> float:
        """Return for how many seconds the controller has listened to runs."""
        passed_s = 0.0 if self._looked is None else now - self._looked
        return self._listened_s + min(passed_s, RUN_LEASE_S / 3)

    def _spread(
        self, version: int, placed: Mapping[LayerKey, LayerPlacement]
    ) -> tuple[bool, bool, list[ExpertKey]]:
        """Return how far a version has come.

        That is whether all replicas have it, whether some that are served lack it, and the experts
        of which none has it.
        """
        seen, served = self._pool.observations, self._pool.versions
        whole, lagging, nowhere = True, False, []
        for key, layer in placed.items():
            held = {host: one.holdings.get(key, {}) for host, one in seen.items()}
            for expert, replicas in enumerate(layer.replicas):
                there = [held.get(replica.host, {}).get(expert, ()) for replica in replicas]
                without = [versions for versions in there if version not in versions]
                if without:
                    whole = False
                    lagging |= any(served.of(key.expert(expert)) in one for one in without)
                if len(without) == len(there):
                    nowhere.append(key.expert(expert))
        return whole and not nowhere, lagging, nowhere

    def _missing(self, version: int, nowhere: list[ExpertKey]) -> list[ExpertKey]:
        """Return those of ``nowhere`` that no other host holds, either."""
        return [
            key
            for key in nowhere
            if not any(
                version in seen.holdings.get(LayerKey(key.model, key.layer), {}).get(key.expert, ())
                for seen in self._pool.observations.values()
            )
        ]
