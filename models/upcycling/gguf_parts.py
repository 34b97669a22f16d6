"""A GGUF model that is split into numbered files, as llama.cpp's gguf-split writes it.

NAME-00001-of-00003.gguf has the fields of the whole. Each file has its part's number (`split.no`,
from 0), the number of parts (`split.count`), and the number of tensors of the whole
(`split.tensors.count`). transformers reads only one file, so the parts are joined into one.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gguf import GGUFReader, GGUFValueType, GGUFWriter, Keys
from gguf.constants import GGUFEndian

from ...proto.errors import CheckpointError
from ..folder.files import lfs_pointer

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_COUNT = Keys.Split.LLM_KV_SPLIT_COUNT
_READ_ERRORS = (OSError, ValueError, RuntimeError, KeyError, IndexError)


def is_part(path: Path) -> bool:
    return _PART.fullmatch(path.name) is not None


@contextmanager
def join_parts(path: Path) -> Iterator[Path]:
    """Join the parts of the model of which ``path`` is one, in a temporary folder.

    Raises CheckpointError when a part is missing, damaged or another model's, or when the
    temporary folder has no room.
    """
    match = _PART.fullmatch(path.name)
    assert match is not None, path
    stem, count = match[1], int(match[3])
    if not 1 <= int(match[2]) <= count:
        raise CheckpointError(f"{path}: part {int(match[2])} of {count} parts does not exist")
    files = [path.with_name(f"{stem}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{path}: of {count} parts {', '.join(missing[:3])} "
            f"{'are' if missing[1:] else 'is'} missing from its folder"
        )
    readers = [_opened(file) for file in files]
    for number, (file, reader) in enumerate(zip(files, readers, strict=True)):
        said = _value(reader, Keys.Split.LLM_KV_SPLIT_NO), _value(reader, _COUNT)
        if said != (number, count):
            raise CheckpointError(
                f"{file}: split.no and split.count are {said[0]} and {said[1]}, its name says "
                f"{number} and {count}; it belongs to another set of parts"
            )
    # Parts after the first need not name it.
    named = {_value(reader, Keys.General.ARCHITECTURE) for reader in readers} - {None}
    if len(named) > 1:
        raise CheckpointError(
            f"{path}: its parts are of different architectures: {', '.join(sorted(named))}"
        )
    held = sum(len(reader.tensors) for reader in readers)
    wanted = _value(readers[0], Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT)
    if held != wanted:
        raise CheckpointError(
            f"{path}: its parts hold {held} tensors, split.tensors.count says {wanted}; "
            "one of them belongs to another model"
        )
    need = sum(file.stat().st_size for file in files)
    with TemporaryDirectory(prefix="moesaic-gguf-") as folder:
        free = shutil.disk_usage(folder).free
        if need > free:
            raise CheckpointError(
                f"{path}: joining its parts needs {need / 1e9:.1f} GB in {folder}, which has "
                f"{free / 1e9:.1f} GB free; set TMPDIR to a folder with more space"
            )
        whole = Path(folder) / f"{stem}.gguf"
        try:
            _write(whole, readers)
        except _READ_ERRORS as error:
            raise CheckpointError(f"{path}: cannot join its parts in {whole}: {error}") from error
        yield whole


def _opened(file: Path) -> GGUFReader:
    try:
        return GGUFReader(file)
    except _READ_ERRORS as error:
        why = lfs_pointer(file) or f"truncated or damaged GGUF: {error}"
        raise CheckpointError(f"{file}: {why}") from error


def _value(reader: GGUFReader, key: str) -> Any:
    found = reader.get_field(key)
    return None if found is None else found.contents()


def _write(whole: Path, readers: list[GGUFReader]) -> None:
    """Write the fields of the first part, and the tensors of all parts, copied file by file."""
    first = readers[0]
    arch = str(_value(first, Keys.General.ARCHITECTURE))
    writer = GGUFWriter(whole, arch, endianess=first.endianess or GGUFEndian.LITTLE)
    for name, field in first.fields.items():
        if name.startswith(("GGUF.", "split.")) or name == Keys.General.ARCHITECTURE:
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    for reader in readers:
        for tensor in reader.tensors:
            writer.add_tensor_info(
                tensor.name,
                tensor.data.shape,
                tensor.data.dtype,
                tensor.data.nbytes,
                tensor.tensor_type,
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for reader in readers:
        for tensor in reader.tensors:
            writer.write_tensor_data(tensor.data)
    writer.close()
