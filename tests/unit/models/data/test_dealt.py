"""Which sequences are learned from and which are held out, whatever the file has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.models.data.dealt import Dealt
from moesaic.models.data.packing import Packed
from moesaic.models.data.token_file import TokenFile, write_token_file
from moesaic.proto.errors import BadInput

LENGTH = 4


def written(folder: Path, learned: list[list[int]]) -> Path:
    """A file whose sequences have these flags."""
    path = folder / "tokens.safetensors"
    flags = np.array(learned, dtype=np.bool_).reshape(-1)
    tokens = np.arange(len(flags), dtype=np.int32)
    write_token_file(path, [Packed(tokens, flags)], about={})
    return path


def dealt(tokens: TokenFile, *, per_step: int = 2, held_out: float = 0.25, seed: int = 0) -> Dealt:
    return Dealt(tokens, length=LENGTH, per_step=per_step, held_out=held_out, seed=seed)


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.integers(0, 1), min_size=4, max_size=4), min_size=2, max_size=30),
    st.floats(0, 0.9),
    st.integers(0, 5),
)
def test_each_sequence_with_a_target_is_learned_from_or_held_out(
    tmp_path_factory: pytest.TempPathFactory,
    learned: list[list[int]],
    part: float,
    seed: int,
) -> None:
    path = written(tmp_path_factory.mktemp("tokens"), learned)
    usable = {number for number, flags in enumerate(learned) if any(flags[1:])}
    with TokenFile(path) as tokens:
        try:
            found = dealt(tokens, held_out=part, seed=seed)
        except BadInput as error:
            assert ("all of them are held out" in str(error)) == bool(usable)
            assert len(usable) <= 1 or round(part * len(usable)) >= len(usable)
            return
        epoch = [number for step in range(len(found)) for number in found.numbers(step)]
        again = dealt(tokens, held_out=part, seed=seed)
    # Two sequences a step: after so many steps there were two epochs.
    assert set(epoch) | set(found.held_out) == usable
    assert not set(epoch) & set(found.held_out)
    assert (again.held_out, again.numbers(3)) == (found.held_out, found.numbers(3))


def test_a_small_part_holds_out_one(tmp_path: Path) -> None:
    with TokenFile(written(tmp_path, [[1] * 4] * 10)) as tokens:
        assert len(dealt(tokens, held_out=0.001).held_out) == 1
        assert not dealt(tokens, held_out=0).held_out
        assert dealt(tokens, held_out=0).epoch(5) == 1.0
        assert dealt(tokens, seed=1).held_out != dealt(tokens, seed=2).held_out


def test_a_file_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    with (
        TokenFile(written(tmp_path, [[1, 0, 0, 0]] * 3)) as tokens,
        pytest.raises(BadInput, match="no sequence of 4 tokens has something to learn"),
    ):
        dealt(tokens)
