"""Parts of a GGUF that do not belong together, each refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from moesaic.models.upcycling.gguf_parts import join_parts
from moesaic.proto.errors import CheckpointError

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def write(folder: Path, number: int, count: int, tensor: str, architecture: str = "llama") -> Path:
    path = folder / f"m-{number:05}-of-{count:05}.gguf"
    writer = GGUFWriter(path, architecture)
    writer.add_uint16("split.no", max(number - 1, 0))
    writer.add_uint16("split.count", count)
    writer.add_int32("split.tensors.count", 2)
    writer.add_tensor(tensor, np.ones((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refused(path: Path, words: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(words)), join_parts(path):
        pass


def test_any_part_names_the_whole(tmp_path: Path) -> None:
    for given in (write(tmp_path, 1, 2, "a"), write(tmp_path, 2, 2, "b")):
        write(tmp_path, 2, 2, "b")
        with join_parts(given) as whole:
            assert [tensor.name for tensor in GGUFReader(whole).tensors] == ["a", "b"]


@pytest.mark.parametrize(("number", "count"), [(0, 0), (0, 2), (3, 2)])
def test_a_number_that_no_part_has(number: int, count: int, tmp_path: Path) -> None:
    write(tmp_path, 1, 2, "a")
    write(tmp_path, 2, 2, "b")
    refused(write(tmp_path, number, count, "c"), f"part {number} of {count} parts does not exist")


def test_parts_of_two_models(tmp_path: Path) -> None:
    path = write(tmp_path, 1, 2, "a")
    write(tmp_path, 2, 2, "b", architecture="gpt2")
    refused(path, "different architectures: gpt2, llama")
    write(tmp_path, 2, 2, "a")
    refused(path, "Duplicated tensor name 'a'")


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "damaged"), (b"x" * 99, "damaged"), (LFS, "Git LFS")]
)
def test_a_part_that_is_no_gguf(content: bytes, words: str, tmp_path: Path) -> None:
    path = write(tmp_path, 1, 2, "a")
    second = write(tmp_path, 2, 2, "b")
    second.write_bytes(content)
    refused(path, f"{second}: ")
    refused(path, words)
