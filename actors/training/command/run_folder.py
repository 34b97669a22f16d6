"""The folder of a run of `moesaic train`: its tokens, records, checkpoints, and spec."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ....cluster.train_command.records import Record, StepRecord, line_of, record_of
from ....cluster.train_command.train_spec import TrainSpec, differences
from ....models.export.training_checkpoint import TrainingCheckpoint, keep_last, list_checkpoints
from ....proto.errors import CheckpointError, SpecError, describe_error

log = logging.getLogger(__name__)


class RunFolder:
    """Names of what is in the folder, and how it is read and written.

    Only one process at a time adds records.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokens = path / "tokens.safetensors"
        self.checkpoints = path / "checkpoints"
        self.events = path / "tensorboard"
        self._records = path / "steps.jsonl"
        self._begun_with = path / "run.json"
        self._pending = path / "step.pending"
        self._adds = False

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Have the folder for oneself. Raises SpecError if another process has it."""
        with self.writing():
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                raise SpecError(
                    f"checkpoints.folder: {self.path}: another `moesaic train` works there; wait "
                    "until it has ended, or name another folder"
                ) from error
        try:
            yield
        finally:
            lock.release()

    def check(
        self, spec: TrainSpec, *, resume: bool, told: Callable[[str], None] = log.info
    ) -> None:
        """Check that a run can begin here, or that the one that was begun can go on.

        ``told`` gets a line for each key of the spec that has changed. Raises SpecError if there is
        a run already and ``resume`` is false, or none and it is true, or if what has changed would
        change which sequences a step has, or what is trained; and CheckpointError.
        """
        there = self._records.is_file() or self._has_checkpoints
        where = f"checkpoints.folder: {self.path}"
        if there and not resume:
            raise SpecError(
                f"{where}: it has a run already; go on with it (--resume), or name another folder"
            )
        if resume and not there:
            raise SpecError(f"{where}: it has no run to resume; begin one without --resume")
        if there:
            for path, old, new, is_fixed in differences(self._spec(), spec):
                if is_fixed:
                    raise SpecError(
                        f"{path}: {new!r}, and the run in {self.path} was begun with {old!r}; "
                        "with another value it would not be the same run. Begin one in another "
                        "folder"
                    )
                told(f"{path}: {old!r} before, and {new!r} from now on")
            if (newest := self.newest()) is not None and newest.step > spec.steps:
                raise SpecError(
                    f"steps: {spec.steps}: the run in {self.path} has done {newest.step} already; "
                    "give it more, or name another folder"
                )

    def begin(self, spec: TrainSpec) -> None:
        """Take note of what the run goes on with. Raises SpecError if that cannot be written."""
        with self.writing():
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            _replace(self._begun_with, json.dumps(spec.model_dump(mode="json"), indent=2))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Raise SpecError for an error of the system, which names the key."""
        try:
            yield
        except OSError as error:
            raise SpecError(
                f"checkpoints.folder: {self.path}: cannot be written: {describe_error(error)}"
            ) from error

    def _spec(self) -> TrainSpec:
        try:
            return TrainSpec.model_validate(json.loads(self._begun_with.read_text()))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self._begun_with}: no spec of a run: {describe_error(error)}; name another "
                "folder (checkpoints.folder)"
            ) from error

    @property
    def _has_checkpoints(self) -> bool:
        return self.checkpoints.is_dir() and any(self.checkpoints.iterdir())

    # ---- checkpoints ----------------------------------------------------------------------------

    def checkpoint(self, step: int) -> Path:
        """Return the folder for the checkpoint after ``step`` steps."""
        return self.checkpoints / f"step-{step:08d}"

    def newest(self) -> TrainingCheckpoint | None:
        """Return the newest complete checkpoint, or None."""
        if not self.checkpoints.is_dir():
            return None
        found = list_checkpoints(self.checkpoints)
        for path, error in found.damaged.items():
            log.warning("%s is left out: %s", path, error)
        return found.whole[-1] if found.whole else None

    def keep_last(self, count: int) -> None:
        keep_last(self.checkpoints, count)

    # ---- records --------------------------------------------------------------------------------

    def add(self, record: Record) -> None:
        """Add a record."""
        with self._records.open("ab+") as file:
            if not self._adds and file.tell():
                file.seek(-1, 2)
                # A process that was killed may have left a part of a line.
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(line_of(record).encode() + b"\n")
        self._adds = True

    def pend(self, record: StepRecord) -> None:
        """Keep the record of a step that is about to be committed."""
        _replace(self._pending, line_of(record))

    def pending(self) -> Record | None:
        """Return the last one that was kept."""
        try:
            return record_of(self._pending.read_text())
        except (OSError, CheckpointError):
            return None  # there was none

    def records(self, since: int = 0) -> tuple[list[Record], int]:
        """Return the records from byte ``since`` on, and where the next ones will begin."""
        try:
            with self._records.open("rb") as file:
                file.seek(since)
                found = file.read()
        except FileNotFoundError:
            return [], since
        whole = found[: found.rfind(b"\n") + 1]
        records: list[Record] = []
        for line in whole.decode().splitlines():
            try:
                records.append(record_of(line))
            except CheckpointError as error:
                log.warning("%s: a line is left out: %s", self._records, error)
        return records, since + len(whole)


def _replace(path: Path, text: str) -> None:
    """Write a file that has either all of the text or what it had before."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text + "\n")
    draft.replace(path)
