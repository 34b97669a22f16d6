"""Documents as tokens, and which of them are learned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...proto.errors import BadInput
from .chats import Span, answer_spans, render
from .sources import Chat, Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Learn = Literal["answers", "all"]

# A tokenizer needs up to 100 bytes for each character of a text while it encodes the text.
MAX_CHARS = 2**26
# Documents that are encoded together, which fast tokenizers do on all cores.
_BATCH_CHARS, _BATCH_DOCUMENTS = 2**20, 1024


class Packed(NamedTuple):
    """One document of n tokens."""

    tokens: NDArray[np.int32]  # (n,)
    learned: NDArray[np.bool_]  # (n,): whether the loss of predicting this token counts


def pack(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, *, learn: Learn = "answers"
) -> Iterator[Packed]:
    """Encode ``documents``, in their order.

    All tokens of a text are learned. The name of a special token in a text is encoded as any other
    word, and no token is added but the end-of-text token after it. A chat is what the tokenizer's
    chat template writes, with its special tokens, and nothing else; whoever writes the name of
    a special token into a message writes that token. With ``learn`` "answers" only the tokens of
    the assistant are learned (`answer_spans`), with "all" all tokens of the chat.

    Raises BadInput for a document that cannot be encoded, or of which nothing is learned, and for a
    tokenizer that lacks what the document needs: an end-of-text token, or a chat template.
    """
    batch: list[tuple[Document, str]] = []
    chars = 0
    for document in documents:
        text = render(document, tokenizer) if isinstance(document, Chat) else document.text
        if len(text) > MAX_CHARS:
            raise BadInput(
                f"{document.place}: the document has {len(text)} characters, and at most "
                f"{MAX_CHARS} are encoded at once; split it into several documents"
            )
        if batch and (
            isinstance(document, Chat) != isinstance(batch[0][0], Chat)
            or chars + len(text) > _BATCH_CHARS
            or len(batch) == _BATCH_DOCUMENTS
        ):
            yield from _encode(batch, tokenizer, learn)
            batch, chars = [], 0
        batch.append((document, text))
        chars += len(text)
    if batch:
        yield from _encode(batch, tokenizer, learn)


def _encode(
    batch: Sequence[tuple[Document, str]], tokenizer: PreTrainedTokenizerBase, learn: Learn
) -> Iterator[Packed]:
    """Encode documents that are either all texts or all chats."""
    chats = isinstance(batch[0][0], Chat)
    masked = chats and learn == "answers"
    end = tokenizer.eos_token_id
    if not chats and not isinstance(end, int):
        raise BadInput(
            "tokenizer: there is no end-of-text token, which follows each text; set eos_token in "
            "tokenizer_config.json"
        )
    if masked and not getattr(tokenizer, "is_fast", False):
        raise BadInput(
            f"tokenizer: {type(tokenizer).__name__} does not tell which characters a token stands "
            "for, so answers cannot be found; set learn to all, or use a tokenizer that has a "
            "tokenizer.json"
        )
    encoded = tokenizer(
        [text for _, text in batch],
        add_special_tokens=False,
        split_special_tokens=not chats,
        return_offsets_mapping=masked,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids: Any = encoded["input_ids"]
    offsets: Any = encoded["offset_mapping"] if masked else None
    for number, (document, text) in enumerate(batch):
        if not isinstance(document, Chat):
            tokens = np.array([*ids[number], end], dtype=np.int32)
            yield Packed(tokens, np.ones(len(tokens), dtype=np.bool_))
            continue
        tokens = np.array(ids[number], dtype=np.int32)
        learned = np.ones(len(tokens), dtype=np.bool_)
        if masked:
            learned = _tokens_of(answer_spans(document, text, tokenizer), offsets[number])
        if not learned.any():
            raise BadInput(
                f"{document.place}: nothing is learned of this chat: it has no message of the role "
                "assistant that says something; remove the chat, or set learn to all"
            )
        yield Packed(tokens, learned)


def _tokens_of(spans: Sequence[Span], offsets: Sequence[Span]) -> NDArray[np.bool_]:
    """Return which tokens stand for at least one character of ``spans``.

    ``offsets``: the characters that each token stands for. Some tokenizers leave spaces out of
    them, so that a token for spaces alone has none; it stands for those since the token before it.
    """
    learned = np.zeros(len(offsets), dtype=np.bool_)
    if not len(offsets):
        return learned
    begins, ends = np.array(offsets, dtype=np.int64).T
    before = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]])
    begins = np.where(begins == ends, np.minimum(before, begins), begins)
    # A token that stands for nothing at all belongs to what follows it.
    ends = np.maximum(ends, begins + 1)
    for begin, end in spans:
        if begin < end:
            learned |= (begins < end) & (ends > begin)
    return learned
