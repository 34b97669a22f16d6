"""Check a model's folder before anything starts.

No tensor is read, and nothing outside the folder is looked at, so that a model of any size takes
seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...models.folder.generation import generation_config
from ...models.folder.tokenizer import read_tokenizer
from ...models.trunk.config import read_config
from ...models.trunk.describe import ModelDescription, describe
from ...models.trunk.folder_check import check_folder
from ...proto.errors import CheckpointError, MoesaicError, RequestError, describe_error
from ..text.chat_template import ChatTemplate
from .findings import Finding, Severity, finding_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How many tokens one finding names.
_NAMED = 3
# The text that tokenizers are tried with.
_SAID = "Hello"


@dataclass(frozen=True, slots=True)
class CheckedModel:
    """The findings about one model's folder, and what its configuration describes."""

    findings: list[Finding]
    described: ModelDescription | None  # None: the configuration does not describe a model


def check_model(
    folder: Path, dtype: torch.dtype, *, key: str, tokenizer: Severity | None
) -> CheckedModel:
    """Return all that is wrong with the model in ``folder``, and what it is.

    ``key`` names the folder in each finding. ``tokenizer`` is the severity of a missing or
    broken tokenizer; None: nothing needs one.
    """
    findings, described = _check_tensors(folder, dtype, key)
    if described is not None:
        findings += _check_generation_config(folder, key)
        if tokenizer is not None:
            findings += _check_tokenizer(folder, key, tokenizer)
    return CheckedModel(findings, described)


def _check_tensors(
    folder: Path, dtype: torch.dtype, key: str
) -> tuple[list[Finding], ModelDescription | None]:
    try:
        found = check_folder(folder, dtype=dtype)
    except MoesaicError as error:
        wrong = [finding_of(error, key)]
    else:
        odd = [Finding(severity="warning", path=key, message=text) for text in found.warnings]
        return odd, found.described
    try:
        # Its configuration alone tells how much memory it needs.
        return wrong, describe(folder, dtype)
    except MoesaicError:
        return wrong, None  # the same error, which is in the list already


def _check_generation_config(folder: Path, key: str) -> Iterator[Finding]:
    try:
        generation_config(folder)
    except CheckpointError as error:
        yield finding_of(error, key)


def _check_tokenizer(folder: Path, key: str, severity: Severity) -> Iterator[Finding]:
    try:
        tokenizer = read_tokenizer(folder)
    except CheckpointError as error:
        yield Finding(severity=severity, path=key, message=str(error), code=error.code)
        return
    if problem := _encoding_problem(tokenizer):
        code = CheckpointError.__name__
        yield Finding(severity=severity, path=key, message=f"{folder}: {problem}", code=code)
        return
    yield from _check_vocabulary(folder, tokenizer, key, severity)
    template = ChatTemplate(folder.name, tokenizer)
    if not template.exists:
        text = f"{folder}: the model has no chat template: requests to /v1/chat/completions are "
        text += "refused; "
        text += "/v1/completions works"
        yield Finding(severity="warning", path=key, message=text)
        return
    try:
        template.probe()
    except RequestError as error:
        wrong = f"{folder}: the chat template fails on a single user message: "
        wrong += " ".join(str(error).split())
        yield Finding(severity=severity, path=key, message=wrong, code=CheckpointError.__name__)


def _encoding_problem(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return why a text does not become tokens; "" if it does."""
    try:
        ids = tokenizer(_SAID, add_special_tokens=False).input_ids
    except Exception as error:
        # A field of the wrong type only shows when it is used, as any kind of exception.
        return f"the tokenizer fails on {_SAID!r}: {_in_a_line(error)}"
    return "" if ids else f"the tokenizer makes no token of {_SAID!r}; check tokenizer.json"


def _check_vocabulary(
    folder: Path, tokenizer: PreTrainedTokenizerBase, key: str, severity: Severity
) -> Iterator[Finding]:
    """Find tokens for which the model has no embedding."""
    rows = getattr(read_config(folder).get_text_config(), "vocab_size", None)
    if not isinstance(rows, int):
        return
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    beyond = [(number, token) for number, token in beyond if number >= rows]
    if not beyond:
        return
    named = ", ".join(f"{token!r} ({number})" for number, token in beyond[:_NAMED])
    more = f" and {len(beyond) - _NAMED:,} more" if len(beyond) > _NAMED else ""
    text = f"{folder}: the model has {rows:,} embeddings, none of them for these tokens of the "
    text += f"tokenizer: {named}{more}"
    known: Any = tokenizer
    added: dict[str, int] = known.get_added_vocab()
    if all(token in added for _, token in beyond):
        # Publishers add tokens, for padding for example, that occur in no text.
        yield Finding(
            severity="warning", path=key, message=f"{text}; prompts with these tokens are refused"
        )
    else:
        text += "; the tokenizer is another model's: copy this model's tokenizer files"
        yield Finding(severity=severity, path=key, message=text, code=CheckpointError.__name__)


def _in_a_line(error: Exception) -> str:
    return " ".join(describe_error(error).split())[:400]
