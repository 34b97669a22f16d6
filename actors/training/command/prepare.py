"""What happens before the first worker starts: all checks, and the file of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ....cluster.placement import ModelRef
from ....cluster.train_command.train_spec import TrainSpec
from ....kernels.training.update_rules import UpdateRule
from ....models.data.dealt import Dealt
from ....models.data.made_from import made_from
from ....models.data.packing import Packed, pack
from ....models.data.sources import Source, documents
from ....models.data.token_file import TokenFile, is_current, write_token_file
from ....models.folder.tokenizer import read_tokenizer
from ....models.training.language_loss import has_balance_loss
from ....models.trunk.config import read_config
from ....proto.errors import BadInput, CheckpointError, SpecError
from .run_folder import RunFolder

# How often the progress of packing is told, in documents.
_TOLD = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What a run has to learn from."""

    documents: int
    tokens: int
    sequences: int  # that are learned from, in an epoch
    held_out: int

    def words(self, spec: TrainSpec) -> str:
        """All of it, for people."""
        length, each = spec.data.sequence_length, spec.batch.sequences
        return (
            f"{self.tokens:,} tokens of {self.documents:,} documents: {self.sequences:,} sequences "
            f"of {length}, and {self.held_out:,} held out; {spec.steps} steps of {each} are "
            f"{spec.steps * each / self.sequences:.2g} epochs"
        )


def check(spec: TrainSpec, ref: ModelRef) -> None:
    """Check what the spec says of the model and the optimizer. Raises BadInput."""
    if not ref.learns:
        raise SpecError(
            f"model: {ref.name!r} was opened to be served alone; set train: true for it in the "
            "cluster's spec (models), and start the cluster again"
        )
    if ref.path is None:
        raise SpecError(
            f"model: {ref.name!r} was attached from memory; `moesaic train` needs a model of the "
            "cluster's spec"
        )
    try:
        UpdateRule(spec.optimizer.name, **spec.optimizer.settings)
    except BadInput as error:
        raise SpecError(f"optimizer: {error}") from error
    config = read_config(Path(ref.path))
    if spec.balance_loss is not None and not has_balance_loss(config):
        raise SpecError(
            f"balance_loss: models of type {config.model_type!r} do not tell what their gates "
            "have computed, so they have no auxiliary loss; leave it out"
        )


def prepare(
    spec: TrainSpec,
    ref: ModelRef,
    folder: RunFolder,
    *,
    resume: bool = False,
    packed: Callable[[int], None] = lambda _: None,
) -> Prepared:
    """Pack the documents, unless that was done, and count what there is.

    A run that goes on has the tokens with which it was begun. ``packed`` is told how many documents
    are packed, from time to time. Raises BadInput, CheckpointError and OSError.
    """
    assert ref.path is not None, "it was checked"
    given, model = spec.data, Path(ref.path)
    if resume and not folder.tokens.exists():
        raise CheckpointError(
            f"{folder.tokens}: the packed documents of the run are gone, so it cannot go on with "
            "the same sequences; begin one in another folder"
        )
    if not resume:
        source = Source(Path(given.path).absolute(), given.format, given.pattern)
        about = made_from(source, model, given.learn)
        if not is_current(folder.tokens, about):
            with folder.writing():
                folder.path.mkdir(parents=True, exist_ok=True)
            found = pack(documents(source), read_tokenizer(model), learn=given.learn)
            write_token_file(folder.tokens, _told(found, packed), about=about)
    with TokenFile(folder.tokens) as tokens:
        try:
            dealt = Dealt(
                tokens,
                length=given.sequence_length,
                per_step=spec.batch.sequences,
                held_out=given.held_out,
                seed=given.seed,
            )
        except BadInput as error:
            raise BadInput(f"data.path: {given.path}: {error}") from error
        _check_vocabulary(model, dealt.largest_token)
        if spec.evaluation is not None and not dealt.held_out:
            raise SpecError(
                "evaluation: no sequences are held out for it; set data.held_out above 0, or "
                "evaluation to null"
            )
        return Prepared(
            documents=tokens.documents,
            tokens=len(tokens),
            sequences=len(dealt),
            held_out=len(dealt.held_out),
        )


def _check_vocabulary(model: Path, largest: int) -> None:
    size = getattr(read_config(model).get_text_config(), "vocab_size", None)
    if isinstance(size, int) and largest >= size:
        raise CheckpointError(
            f"{model}: the tokenizer makes token {largest}, and the model has a vocabulary of "
            f"{size} (vocab_size in config.json); use the tokenizer that belongs to the model"
        )


def _told(found: Iterable[Packed], told: Callable[[int], None]) -> Iterator[Packed]:
    number = 0
    for number, one in enumerate(found, start=1):
        if number % _TOLD == 0:
            told(number)
        yield one
    told(number)
