"""`moesaic train`: checks, packs, lets workers train, and tells how far they are."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from ....cluster.placement import ModelRef
from ....cluster.reports.training import TrainReport
from ....cluster.train_command.records import HeldOutRecord, Record, ReturnRecord, history
from ....cluster.train_command.train_spec import TrainSpec
from .crew import WorkerCrew
from .events import Events
from .prepare import check, prepare
from .run_folder import RunFolder
from .worker import Work

log = logging.getLogger(__name__)

# How often records are read and workers looked at.
_LOOK_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Watcher:
    """Who is told how a run goes."""

    said: Callable[[str], None] = log.info  # a line for people
    packed: Callable[[int], None] = lambda _: None  # how many documents are packed
    ready: Callable[[], None] = lambda: None  # all is checked; it may wait for another run's end
    recorded: Callable[[Record], None] = lambda _: None
    began: Callable[[WorkerCrew], None] = lambda _: None
    # The balancedness of the model's hosts, if it is known; it is asked for now and then.
    balancedness: Callable[[], float | None] = lambda: None


def run_command(
    namespace: str,
    ref: ModelRef,
    spec: TrainSpec,
    *,
    resume: bool,
    only_check: bool = False,
    stop: Event,
    watcher: Watcher,
) -> TrainReport:
    """Train a model of the cluster as a spec says, until it is done or ``stop`` is set.

    With ``only_check`` everything is checked and packed, and nothing starts. Raises SpecError and
    BadInput before anything starts, and what ends a run.
    """
    folder = RunFolder(Path(spec.checkpoints.folder).absolute())
    check(spec, ref)
    with folder.claimed():
        folder.check(spec, resume=resume, told=watcher.said)
        prepared = prepare(spec, ref, folder, resume=resume, packed=watcher.packed)
        watcher.said(prepared.words(spec))
        if not only_check and not stop.is_set():
            watcher.ready()
            folder.begin(spec)
            work = Work(namespace=namespace, model=ref, spec=spec, folder=folder.path)
            _follow(work, folder, stop, watcher)
        return _report(folder, spec, ref.name)


def _follow(work: Work, folder: RunFolder, stop: Event, watcher: Watcher) -> None:
    """Start the workers, and tell what they record, until they have ended."""
    _, place = folder.records()  # those of before were told already
    step, told_to_stop = 0, False
    with Events(folder.events) as events:
        if not events.writes:
            watcher.said("TensorBoard is not installed, so no events are written for it")
        count = work.spec.workers.count
        watcher.said(f"starting {count} worker{'s' if count > 1 else ''}")
        crew = WorkerCrew(work, told=watcher.said)
        try:
            watcher.began(crew)
            ended = False
            while not ended:
                # In this order: what they have recorded before the end is told, too.
                ended = crew.look(step, _LOOK_S)
                records, place = folder.records(place)
                for record in records:
                    if isinstance(record, ReturnRecord):
                        watcher.said(record.words)
                    if not isinstance(record, HeldOutRecord):
                        step = record.step
                    events.add(record, watcher.balancedness())
                    watcher.recorded(record)
                if stop.is_set() and not told_to_stop:
                    told_to_stop = True
                    crew.stop()
        finally:
            crew.close()


def _report(folder: RunFolder, spec: TrainSpec, model: str) -> TrainReport:
    found, _ = folder.records()
    steps, held_out = history(found)
    newest = folder.newest()
    seconds = sum(one.seconds for one in steps)
    return TrainReport(
        model=model,
        steps=steps[-1].step if steps else 0,
        wanted_steps=spec.steps,
        loss=steps[-1].loss if steps else None,
        first_perplexity=held_out[0].perplexity if held_out else None,
        perplexity=held_out[-1].perplexity if held_out else None,
        tokens_per_s=sum(one.tokens for one in steps) / seconds if seconds else None,
        folder=str(folder.path),
        checkpoint=str(newest.path) if newest is not None else None,
        collapsed=steps[-1].collapsed if steps else None,
    )
