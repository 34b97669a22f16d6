"""Upcycling that is refused: each error names the field, and nothing is left."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file

from moesaic.models.upcycling.upcycle import upcycle
from moesaic.proto.errors import (
    BadInput,
    CheckpointError,
    MoesaicError,
    UnsupportedModel,
)
from tests.helpers.models.dense import (
    LETTERS,
    load,
    make_dense,
    make_gguf,
)

DOWN = "model.layers.1.mlp.down_proj.weight"


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """Arguments of upcycle, or a damage to the dense folder, and what must be said of it."""

    error: type[MoesaicError]
    says: str
    arguments: dict[str, Any] = field(default_factory=dict)
    damage: Callable[[Path], Path | None] = lambda _dense: None


def edit(file: str, **changes: Any) -> Callable[[Path], None]:
    def damage(dense: Path) -> None:
        raw = json.loads((dense / file).read_text())
        (dense / file).write_text(json.dumps(raw | changes))

    return damage


def retensor(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(dense: Path) -> None:
        tensors = load_file(dense / "model.safetensors")
        change(tensors)
        save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})

    return damage


def broken_json(dense: Path) -> None:
    (dense / "config.json").write_text("{")


def truncate(dense: Path) -> None:
    path = dense / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def lose_shard(dense: Path) -> None:
    names = list(load_file(dense / "model.safetensors"))
    (dense / "model.safetensors").rename(dense / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    index["weight_map"][DOWN] = "model-00002-of-00002.safetensors"
    (dense / "model.safetensors.index.json").write_text(json.dumps(index))


def truncated_gguf(dense: Path) -> Path:
    path = make_gguf(dense / "tiny.gguf", dense)
    os.truncate(path, path.stat().st_size // 2)
    return path


def not_gguf(dense: Path) -> Path:
    (dense / "x.gguf").write_bytes(b"PK\x03\x04")
    return dense / "x.gguf"


def scaled_gguf(dense: Path) -> Path:
    return make_gguf(dense / "x.gguf", dense, **{"llama.rope.scaling.type": "yarn"})


def missing_part(dense: Path) -> Path:
    make_gguf(dense / "x.gguf", dense, 8)
    (dense / "x-00002-of-00003.gguf").unlink()
    return dense / "x-00001-of-00003.gguf"


def truncated_part(dense: Path) -> Path:
    make_gguf(dense / "x.gguf", dense, 8)
    part = dense / "x-00002-of-00003.gguf"
    os.truncate(part, part.stat().st_size // 2)
    return dense / "x-00001-of-00003.gguf"


def exchanged_part(dense: Path) -> Path:
    make_gguf(dense / "x.gguf", dense, 8)
    shutil.copyfile(dense / "x-00003-of-00003.gguf", dense / "x-00002-of-00003.gguf")
    return dense / "x-00001-of-00003.gguf"


def foreign_part(dense: Path) -> Path:
    make_gguf(dense / "x.gguf", dense, 8)
    writer = GGUFWriter(dense / "y.gguf", "llama", split_max_tensors=1)
    for number in range(3):
        writer.add_tensor(f"t{number}", np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (dense / "y-00002-of-00003.gguf").rename(dense / "x-00002-of-00003.gguf")
    return dense / "x-00001-of-00003.gguf"


def folder_of_gguf(dense: Path) -> None:
    make_gguf(dense / "x.gguf", dense)
    (dense / "model.safetensors").unlink()


KMEANS = {"gate": "kmeans"}
WRONG = {
    "one expert": Wrong(error=BadInput, says="experts: 1", arguments={"experts": 1}),
    "top_k 0": Wrong(error=BadInput, says="top_k: 0", arguments={"top_k": 0}),
    "top_k 9 of 8": Wrong(error=BadInput, says="top_k: 9.*experts=8", arguments={"top_k": 9}),
    "noise < 0": Wrong(error=BadInput, says="noise: -0.1", arguments={"noise": -0.1}),
    "noise nan": Wrong(error=BadInput, says="noise: nan", arguments={"noise": float("nan")}),
    "dtype": Wrong(error=BadInput, says="dtype: 'int8'.*bfloat16", arguments={"dtype": "int8"}),
    "seed": Wrong(error=BadInput, says="seed: -1", arguments={"seed": -1}),
    "tokens": Wrong(error=BadInput, says="tokens: 0", arguments={"tokens": 0}),
    "gate": Wrong(error=BadInput, says="gate: 'topk'.*kmeans", arguments={"gate": "topk"}),
    "no texts": Wrong(error=BadInput, says="texts: gate='kmeans' needs", arguments=KMEANS),
    "idle texts": Wrong(
        error=BadInput,
        says="texts: gate='random' reads none|no texts",
        arguments={"texts": {"a": ["b"]}},
    ),
    "bare text": Wrong(
        error=BadInput,
        says="texts.prose: 'once'.*list",
        arguments=KMEANS | {"texts": {"prose": "once"}},
    ),
    "text file": Wrong(
        error=BadInput,
        says="texts.prose: cannot read .*absent.txt",
        arguments=KMEANS | {"texts": {"prose": [Path("absent.txt")]}},
    ),
    "empty corpus": Wrong(
        error=BadInput,
        says="texts.prose: no text",
        arguments=KMEANS | {"texts": {"prose": ["", "a"]}},
    ),
    "too little text": Wrong(
        error=BadInput,
        says="texts: 11 tokens in 1 corpora.*experts=8.*128",
        arguments=KMEANS | {"texts": {"prose": ["twelve bytes"]}},
    ),
    "absent": Wrong(
        error=CheckpointError, says="dense: .*absent does not exist", damage=lambda d: d / "absent"
    ),
    "no config": Wrong(
        error=CheckpointError,
        says="not a model folder: it has no config.json",
        damage=lambda d: (d / "config.json").unlink(),
    ),
    "bad json": Wrong(
        error=CheckpointError,
        says="config.json: not JSON",
        damage=broken_json,
    ),
    "bad field": Wrong(
        error=CheckpointError,
        says="configuration is not valid.*hidden_size",
        damage=edit("config.json", hidden_size="wide"),
    ),
    "qwen2": Wrong(
        error=UnsupportedModel,
        says="model_type: 'qwen2'.*biases.*llama, mistral",
        damage=edit("config.json", model_type="qwen2"),
    ),
    "attention bias": Wrong(
        error=UnsupportedModel,
        says="attention_bias: true",
        damage=edit("config.json", attention_bias=True),
    ),
    "mlp bias": Wrong(
        error=UnsupportedModel, says="mlp_bias: true", damage=edit("config.json", mlp_bias=True)
    ),
    "quantised": Wrong(
        error=UnsupportedModel,
        says="quantization_config.*'gptq'",
        damage=edit("config.json", quantization_config={"quant_method": "gptq"}),
    ),
    "no safetensors": Wrong(
        error=CheckpointError,
        says="no \\*.safetensors; pickled weights are never read",
        damage=lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin") and None,
    ),
    "truncated": Wrong(
        error=CheckpointError, says="model.safetensors: truncated or damaged", damage=truncate
    ),
    "missing shard": Wrong(
        error=CheckpointError,
        says=r"cannot read its weights.*model-00002-of-00002",
        damage=lose_shard,
    ),
    "missing tensor": Wrong(
        error=CheckpointError,
        says=f"tensors are missing: {DOWN}",
        damage=retensor(lambda t: t.pop(DOWN)),
    ),
    "unknown tensor": Wrong(
        error=UnsupportedModel,
        says="cannot hold these tensors: model.layers.0.extra",
        damage=retensor(lambda t: t.update({"model.layers.0.extra": torch.ones(1)})),
    ),
    "wrong shape": Wrong(
        error=CheckpointError,
        says=f"{DOWN} has shape \\(3, 3\\).* says \\(32, 48\\)",
        damage=retensor(lambda t: t.update({DOWN: torch.ones(3, 3)})),
    ),
    "foreign tokenizer": Wrong(
        error=CheckpointError,
        says="vocab_size: the tokenizer gives token",
        arguments=KMEANS | {"texts": {"prose": [LETTERS]}},
        damage=lambda d: make_dense(d, vocab_size=20, eos_token_id=1) and None,
    ),
    "not a GGUF": Wrong(error=CheckpointError, says="x.gguf is not a GGUF", damage=not_gguf),
    "truncated GGUF": Wrong(error=CheckpointError, says="tiny.gguf", damage=truncated_gguf),
    "part missing": Wrong(
        error=CheckpointError, says=r"of 3 parts x-00002-of-00003\.gguf is m", damage=missing_part
    ),
    "part truncated": Wrong(
        error=CheckpointError, says=r"x-00002-of-00003\.gguf: trunc", damage=truncated_part
    ),
    "part of another number": Wrong(
        error=CheckpointError, says=r"split\.no and split\.count are 2 and 3", damage=exchanged_part
    ),
    "part of another model": Wrong(
        error=CheckpointError, says=r"hold \d+ tensors, split\.tensors", damage=foreign_part
    ),
    "folder of a GGUF": Wrong(
        error=CheckpointError, says=r"give its GGUF file, .*x\.gguf", damage=folder_of_gguf
    ),
    "scaled GGUF": Wrong(
        error=UnsupportedModel, says="rope.scaling.type: 'yarn'", damage=scaled_gguf
    ),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_errors_name_the_field_and_leave_nothing(tmp_path: Path, dense: Path, wrong: Wrong) -> None:
    copy = Path(shutil.copytree(dense, tmp_path / "dense"))
    source = wrong.damage(copy) or copy
    with pytest.raises(wrong.error, match=wrong.says) as caught:
        upcycle(source, tmp_path / "out", **wrong.arguments)
    assert type(caught.value) is wrong.error
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_too_uniform_texts(tmp_path: Path, dense: Path) -> None:
    with pytest.raises(BadInput, match=r"texts: layer 0 sees fewer than experts=8"):
        # One byte, read in windows of two: each row is the same byte at the same position.
        upcycle(dense, tmp_path / "out", gate="kmeans", texts={"a": ["aa"] * 200}, tokens=400)


def test_out_is_never_clobbered(
    tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    upcycle(dense, out, experts=2)  # an empty folder is welcome
    (out / "mine.txt").write_text("keep")
    with pytest.raises(BadInput, match=r"out is not empty.*overwrite=True"):
        upcycle(dense, out)
    with pytest.raises(BadInput, match=r"out: .* holds the dense checkpoint"):
        upcycle(dense, dense.parent, overwrite=True)
    with pytest.raises(BadInput, match=r"mine\.txt is a file"):
        upcycle(dense, out / "mine.txt")

    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("moesaic.models.upcycling.upcycle.save_file", fail)
        with pytest.raises(CheckpointError, match=r"out: cannot write .*No space left"):
            upcycle(dense, out, overwrite=True)
    assert (out / "mine.txt").read_text() == "keep"

    with monkeypatch.context() as patch:
        patch.setattr("moesaic.models.upcycling.upcycle.SHARD_BYTES", 1)
        patch.setattr("shutil.disk_usage", lambda _p: shutil._ntuple_diskusage(9, 9, 0))
        with pytest.raises(BadInput, match=r"needs .* GB free"):
            upcycle(dense, tmp_path / "other")

    upcycle(dense, out, experts=4, overwrite=True)
    assert not (out / "mine.txt").exists()
    assert load(out).config.num_local_experts == 4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
