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
    """``special``: the text of each special token, which clients do not see, by its id.

    A token is special by its id, not by its text: the same text spelled with ordinary tokens is
    ordinary.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        ids = tokenizer.get_vocab()
        self.longest_token = max(map(len, ids), default=1)  # characters
        # A model's vocabulary may be larger; what its tokenizer does not know writes nothing.
        self.last = max(ids.values(), default=-1)
        self.special = special_tokens(tokenizer)

    def decode(self, token_ids: Sequence[int], *, visible: bool = False) -> str:
        """The text of tokens up to ``last``; special ones are left out where it is ``visible``."""
        text = self._tokenizer.decode(
            list(token_ids),
            skip_special_tokens=visible,
            clean_up_tokenization_spaces=False,
        )
        assert isinstance(text, str)
        return text

    def own_bytes(self, token_id: int) -> bytes | None:
        """What an ordinary token stands for that need not be whole characters; None where the
        vocabulary does not say it (its tokens are whole characters then)."""
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
        """What the tokenizer puts before every text by itself: mostly the begin of text, if any."""
        bare = self._ids("a", special=False)
        whole = self._ids("a", special=True)
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return whole[:start]
        return []

    def encode(self, text: str) -> list[int]:
        """With the tokens that the tokenizer adds by itself. Where the text begins with them
        already, they are there once."""
        ids = self._ids(text, special=True)
        size = len(self.prefix)
        twice = size > 0 and ids[size : 2 * size] == self.prefix
        return ids[size:] if twice else ids

    def _ids(self, text: str, *, special: bool) -> list[int]:
        encoded = self._tokenizer(text, add_special_tokens=special, truncation=False, verbose=False)
        return list(encoded.input_ids)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The text of each special token, by its id."""
    special = {
        token_id: token.content
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    for token_id in tokenizer.all_special_ids:
        special.setdefault(token_id, str(tokenizer.convert_ids_to_tokens(token_id)))
    return special


def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level vocabularies write each byte as one character: printable ones as themselves, the
    others, in their order, as those from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(0x100 + n): byte for n, byte in enumerate(others)
    }


_BYTE_LEVEL = _byte_level_alphabet()
