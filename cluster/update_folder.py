"""The folder in which a model's updates are kept, so that the next cluster serves them, too.

Update 2 has a record, ``00000002.json``, and ``00000002.safetensors`` with its weights, unless it
is a revert. The weights are written first. The record makes the update count, and a placement
names the new versions only after the record is on the disk.

Each record says which one it follows. A controller that was taken for dead may still add a record.
The next update follows another one, so that it does not count from then on.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..proto.errors import CheckpointError, ClusterError, describe_error
from .expert_keys import ExpertKey
from .versions import WeightVersions
from .weight_updates import WeightUpdate, new_weights

_RECORD, _WEIGHTS = ".json", ".safetensors"
_SAME = "models[].updates must be the same folder on every machine"
_DRAFT = re.compile(r"\.\d+\.(json|safetensors)\.[0-9a-f]{16}")


class UpdateFolder:
    """The records of one model's updates, and where their weights are."""

    def __init__(self, path: str | Path, model: str) -> None:
        self.path = Path(path)
        self._model = model

    def weights(self, number: int) -> Path:
        """Return the file with the weights of an update."""
        return self.path / f"{number:08d}{_WEIGHTS}"

    def last_number(self) -> int:
        """Return the highest number that any file here has; 0 if there is none."""
        return max((*self._numbers(_RECORD), *self._numbers(_WEIGHTS)), default=0)

    def updates(self) -> list[WeightUpdate]:
        """Return the updates that count, the oldest first. Raises CheckpointError."""
        numbers = self._numbers(_RECORD)
        records = {number: self._read(number) for number in numbers}
        counting: list[int] = []
        number = max(records, default=None)
        while number is not None:
            if number not in records:
                raise CheckpointError(
                    f"{self.path}: record {number}{_RECORD} is missing, which "
                    f"{self._record(counting[0]).name} follows"
                )
            counting.insert(0, number)
            number = records[number]["follows"]
        served = WeightVersions()
        found = []
        for number in counting:
            one = records[number]
            versions = {ExpertKey(self._model, *place): v for *place, v in one["experts"]}
            found.append(
                WeightUpdate(
                    model=self._model,
                    number=number,
                    versions=versions,
                    before={key: served.of(key) for key in versions},
                    who=one["initiator"],
                    reverts=one["reverts"],
                )
            )
            served = served.updated(versions)
        return found

    def record(self, update: WeightUpdate, follows: int | None) -> None:
        """Make an update count. Raises ClusterError; the update does not count then."""
        value = {
            "model": update.model,
            "follows": follows,
            "reverts": update.reverts,
            "initiator": update.who,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "experts": [[k.layer, k.expert, v] for k, v in sorted(update.versions.items())],
        }

        def write(draft: Path) -> None:
            weights = self.weights(update.number)
            if new_weights(update) and not weights.is_file():
                raise ClusterError(f"{weights} is not on the controller's machine; {_SAME}")
            draft.write_text(json.dumps(value) + "\n")

        self._create(self._record(update.number), write)

    def write_weights(self, number: int, write: Callable[[Path], None]) -> None:
        """Let ``write`` make the file with the weights of an update. Raises ClusterError."""
        self._create(self.weights(number), write)

    def _create(self, file: Path, write: Callable[[Path], None]) -> None:
        try:
            with new_file(file) as draft:
                write(draft)
        except FileExistsError as error:
            raise ClusterError(
                f"{file} exists; another cluster writes to the same folder, so give each its own"
            ) from error
        except OSError as error:
            why = describe_error(error)
            raise ClusterError(f"{file} cannot be written: {why}; {_SAME}") from error

    def remove_weights(self, number: int) -> None:
        """Delete the weights of an update that has no record. Raises OSError."""
        if not self._record(number).exists():
            self.weights(number).unlink(missing_ok=True)

    def remove_unused(self) -> list[Path]:
        """Delete drafts, and weights that no record has; return them. Raises OSError."""
        unused = set(self._numbers(_WEIGHTS)) - set(self._numbers(_RECORD))
        files = [self.weights(number) for number in sorted(unused)]
        files += sorted(file for file in self.path.iterdir() if _DRAFT.fullmatch(file.name))
        for file in files:
            file.unlink(missing_ok=True)
        return files

    def _record(self, number: int) -> Path:
        return self.path / f"{number:08d}{_RECORD}"

    def _numbers(self, kind: str) -> list[int]:
        try:
            files = list(self.path.iterdir())
        except OSError as error:
            # An absent folder is not one without updates: a disk may not be mounted.
            raise CheckpointError(
                f"{self.path}: the folder of updates cannot be read: {describe_error(error)}"
            ) from error
        return sorted(
            int(file.stem) for file in files if file.suffix == kind and file.stem.isdecimal()
        )

    def _read(self, number: int) -> dict[str, Any]:
        file = self._record(number)
        try:
            value = json.loads(file.read_text())
            _check(value, number)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise CheckpointError(
                f"{file}: not a record of an update: {describe_error(error)}"
            ) from error
        if value["model"] != self._model:
            raise CheckpointError(
                f"{file} is an update of model {value['model']!r}, not {self._model!r}; give each "
                "model its own folder"
            )
        return value


def _check(value: Mapping[str, Any], number: int) -> None:
    """Raise ValueError if a record's fields are not of the types that they should be."""
    numbers = [n for place in value["experts"] for n in place]
    numbers += [n for n in (value["follows"], value["reverts"]) if n is not None]
    if not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError("experts, follows and reverts are whole numbers")
    if any(len(place) != 3 for place in value["experts"]):
        raise ValueError("experts are [layer, expert, version]")
    if not all(isinstance(value[name], str) for name in ("model", "initiator")):
        raise ValueError("model and initiator are text")
    if value["follows"] is not None and value["follows"] >= number:
        raise ValueError(f"it follows {value['follows']}, which is not an earlier one")


@contextmanager
def new_file(file: Path) -> Iterator[Path]:
    """Yield the path of a draft, which becomes ``file`` and is on the disk at the end.

    Raises OSError, and FileExistsError if the file exists; there is neither a draft nor a new file
    then.
    """
    draft = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:
        yield draft
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        os.link(draft, file)  # unlike a rename, it fails if the file exists
        try:
            _sync(file.parent)
        except OSError:
            file.unlink()
            raise
    finally:
        with suppress(OSError):
            draft.unlink()


def _sync(folder: Path) -> None:
    """Bring the names in a folder to the disk, where its file system can do that."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(opened)
