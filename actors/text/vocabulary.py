"""What the tokens of one tokenizer write: the text of several, the name and the bytes of one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """The tokens of one tokenizer.

    ``special`` has the text of each special token, which clients do not see, by its id. A token
    is special because of its id, not its text: the same text spelled with ordinary tokens is
    ordinary.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        ids = tokenizer.get_vocab()
        self.longest_token = max(map(len, ids), default=1)  # characters
        # A model's vocabulary may be larger; tokens that the tokenizer lacks write nothing.
        self.last = max(ids.values(), default=-1)
        self.special = special_tokens(tokenizer)

    def decode(self, token_ids: Sequence[int], *, visible: bool = False) -> str:
        """Return the text of tokens up to ``last``; where ``visible``, without special tokens."""
        text = self._tokenizer.decode(
            list(token_ids),
            skip_special_tokens=visible,
            clean_up_tokenization_spaces=False,
        )
        assert isinstance(text, str)
        return text

    def own_bytes(self, token_id: int) -> bytes | None:
        """Return the bytes of an ordinary token, which need not be whole characters.

        Returns None where the vocabulary does not tell; its tokens are whole characters
        then.
        """
        name = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(name, str):
            return None
        if found := _BYTE_FALLBACK.fullmatch(name):
            return bytes([int(found[1], 16)])
        try:
            return bytes(map(_BYTE_LEVEL.__getitem__, name))
        except KeyError:
            return None

    @cached_property
    def prefix(self) -> list[int]:
        """The tokens that the tokenizer puts before every text: mostly one that begins a text."""
        bare = self._ids("a", special=False)
        whole = self._ids("a", special=True)
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return whole[:start]
        return []

    def encode(self, text: str) -> list[int]:
        """Return the text's tokens, with those that the tokenizer adds by itself.

        Where the text itself begins with those, they are not added twice.
        """
        ids = self._ids(text, special=True)
        size = len(self.prefix)
        twice = size > 0 and ids[size : 2 * size] == self.prefix
        return ids[size:] if twice else ids

    def _ids(self, text: str, *, special: bool) -> list[int]:
        encoded = self._tokenizer(text, add_special_tokens=special, truncation=False, verbose=False)
        return list(encoded.input_ids)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the text of each special token, by its id."""
    special = {
        token_id: token.content
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    for token_id in tokenizer.all_special_ids:
        special.setdefault(token_id, str(tokenizer.convert_ids_to_tokens(token_id)))
    return special


def _byte_level_alphabet() -> dict[str, int]:
    """Map the characters of byte-level vocabularies to bytes.

    Such vocabularies write each byte as one character: printable bytes as themselves, the
    others, in their order, as the characters from U+0100 on.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(0x100 + n): byte for n, byte in enumerate(others)
    }


_BYTE_LEVEL = _byte_level_alphabet()
