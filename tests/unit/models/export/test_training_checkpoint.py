"""Training checkpoints: what was written is what is read, and no damage is taken for weights."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.models.export.manifest import MANIFEST_FILE, read_manifest, stored_file
from moesaic.models.export.plan import plan_export
from moesaic.models.export.training_checkpoint import (
    TrainingCheckpoint,
    keep_last,
    list_checkpoints,
    read_checkpoint,
)
from moesaic.models.export.write_checkpoint import write_checkpoint
from moesaic.proto.errors import CheckpointError
from tests.helpers.effort import tries
from tests.helpers.models.model_folders import checkpoint, experts_of, saved, trunk_of
from tests.helpers.models.tiny import tiny_tokenizer

RUN = {"run": "a", "step": 7, "attempt": 2, "schedule": {"lr": 0.1}, "data": [1, 2, 3]}
TRUNK_STATE = {
    "lm_head.weight.exp_avg": torch.arange(6.0),
    "lm_head.weight.step": torch.tensor(7.0),
}


def state_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A master and the moments of each tensor of an expert."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        found[f"{name}.master"] = tensor.float() + 1e-4
        found[f"{name}.exp_avg"] = tensor.float() * 2
        found[f"{name}.step"] = torch.tensor(7.0)
    return found


def written(
    target: Path,
    model: Path,
    *,
    step: int = 7,
    dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> Path:
    found = checkpoint(model, dtype)

    def state(layer: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
        for expert, tensors in experts_of(found)(layer):
            yield expert, state_of(tensors)

    given: dict[str, Any] = {
        "experts": experts_of(found),
        "state": state,
        "trunk_state": TRUNK_STATE.items(),
        "run": RUN,
        "max_part_bytes": 50_000,
    }
    trunk = trunk_of(model, dtype)
    plan = plan_export(trunk, max_shard_bytes=20_000)
    write_checkpoint(target, plan, trunk, step=step, **(given | options))
    return target


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "source"
    saved(folder, "qwen3_moe", model={"dtype": torch.bfloat16})
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("made") / "step-7", source, source=source)


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "step-7"))


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


# ---- what was written is read -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "granitemoe", "dbrx", "nemotron_h"])
def test_everything_is_read_as_it_was(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    saved(tmp_path / "source", name, model={"dtype": dtype})
    found = read_checkpoint(written(tmp_path / "found", tmp_path / "source", dtype=dtype))
    assert (found.step, found.run, found.dtype) == (7, RUN, dtype)
    model = checkpoint(tmp_path / "source", dtype)
    assert found.experts == [(la, e) for la in sorted(model.layers) for e in range(8)]
    for place in reversed(found.experts):
        expected = model.read(*place).tensors()
        assert same(found.weights(*place), expected)
        assert same(found.state(*place), state_of(expected))
    assert same(dict(found.trunk_state()), TRUNK_STATE)
    found.check()
    expected = trunk_of(tmp_path / "source", dtype).state_dict()
    assert same(trunk_of(found.path, dtype).state_dict(), expected)


def test_files_of_state_are_small_and_the_manifest_says_where_each_expert_is(made: Path) -> None:
    manifest = read_manifest(made)
    parts = {file.name for file in (made / "state").iterdir()}
    assert {"layer-00000-00001.safetensors", "layer-00000-00002.safetensors"} <= parts
    assert max(file.stat().st_size for file in (made / "state").iterdir()) < 50_000 + 5_000
    assert manifest.files.keys() == {
        file.relative_to(made).as_posix() for file in made.rglob("*") if file.is_file()
    } - {MANIFEST_FILE}
    for (layer, expert), one in manifest.experts.items():
        assert one.state is not None
        (file,) = one.state.files
        assert f"{layer}.{expert}.up.master" in load_file(made / file)
        keys = {key for name in one.weights.files for key in load_file(made / name)}
        prefix = f"model.layers.{layer}.mlp.experts.{expert}."
        assert {key for key in keys if key.startswith(prefix)} == {
            f"{prefix}{part}_proj.weight" for part in ("gate", "up", "down")
        }
    assert (made / "tokenizer.json").is_file()


def test_a_checkpoint_may_have_weights_alone(source: Path, tmp_path: Path) -> None:
    found = read_checkpoint(written(tmp_path / "a", source, state=None, trunk_state=()))
    assert found.state(0, 3) == {}
    assert dict(found.trunk_state()) == {}
    some = written(tmp_path / "b", source, state=lambda layer: ((e, {}) for e in range(8)))
    assert read_checkpoint(some).state(1, 3) == {}
    assert [path.name for path in (some / "state").iterdir()] == ["trunk-00001.safetensors"]


def test_the_state_of_a_run_is_read_as_json_has_it(source: Path, tmp_path: Path) -> None:
    run = {"losses": {1: 0.5, 10: 0.25, 2: float("inf")}, "name": "größe", "pair": (1, None)}
    found = read_checkpoint(written(tmp_path / "found", source, run=run))
    losses = {"1": 0.5, "10": 0.25, "2": float("inf")}
    assert found.run == {"losses": losses, "name": "größe", "pair": [1, None]}


def test_tensors_that_are_used_again_are_copied(source: Path, tmp_path: Path) -> None:
    buffer = torch.zeros(4)

    def state(layer: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
        for expert in range(8):
            buffer.fill_(10 * layer + expert)
            yield expert, {"up.master": buffer, "up.exp_avg": buffer[1:]}

    found = read_checkpoint(written(tmp_path / "found", source, state=state))
    assert found.state(1, 4)["up.master"].tolist() == [14.0] * 4
    assert found.state(1, 4)["up.exp_avg"].tolist() == [14.0] * 3


def test_many_threads_read_while_one_writes(source: Path, made: Path, tmp_path: Path) -> None:
    found = read_checkpoint(made)
    expected = checkpoint(source, torch.bfloat16)
    trunk = trunk_of(source, torch.bfloat16)
    plan = plan_export(trunk)
    found.weights(0, 0)
    wrong: list[object] = []

    def read() -> None:
        for place in found.experts:
            if not same(found.weights(*place), expected.read(*place).tensors()):
                wrong.append(place)

    def write() -> None:
        target = tmp_path / "other"
        write_checkpoint(target, plan, trunk, experts_of(expected), step=1, run=RUN)

    threads = [threading.Thread(target=target) for target in (read, read, write)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong
    read_checkpoint(tmp_path / "other").check()


# ---- what is refused when it is written ---------------------------------------------------------


def test_state_that_is_incomplete_leaves_nothing(source: Path, tmp_path: Path) -> None:
    for state, match in (
        (lambda layer: [(e, {"a": torch.ones(1)}) for e in range(7)], "expert 7 of layer 0 is"),
        (lambda layer: [(1, {"a": torch.ones(1)})] * 2, "expert 1 of layer 0 was given twice"),
        (lambda layer: [(8, {"a": torch.ones(1)})], "expert 8 of layer 0 is not one of 8"),
    ):
        with pytest.raises(CheckpointError, match=match):
            written(tmp_path / "found", source, state=state)
    with pytest.raises(CheckpointError, match="trunk_state: a was given twice"):
        written(tmp_path / "found", source, trunk_state=[("a", torch.ones(1))] * 2)
    with pytest.raises(CheckpointError, match="run: its state cannot be written as JSON"):
        written(tmp_path / "found", source, run={"a": {1, 2}})
    assert list(tmp_path.iterdir()) == []


# ---- damage -------------------------------------------------------------------------------------


def read_all(folder: Path) -> None:
    found = read_checkpoint(folder)
    for place in found.experts:
        found.weights(*place)
        found.state(*place)
    list(found.trunk_state())


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest as a faulty writer would, with good checksums."""
    manifest = read_manifest(folder)
    parts: dict[str, Any] = {
        "files": dict(manifest.files),
        "experts": dict(manifest.experts),
        "layers": dict(manifest.layers),
    }
    change(parts)
    replace(manifest, **parts).write(folder)


def forget_state(folder: Path) -> None:
    """The file is whole, and lacks an expert."""
    name = state_file_of(folder, 1, 2)
    tensors = load_file(folder / name)
    save_file({k: t for k, t in tensors.items() if not k.startswith("1.2.")}, folder / name)
    rewrite(folder, lambda parts: parts["files"].update({name: stored_file(folder / name)}))


def flip(folder: Path, name: str, place: int, bit: int = 0) -> None:
    file = folder / name
    octets = bytearray(file.read_bytes())
    octets[place] ^= 1 << bit
    file.write_bytes(octets)


def file_of(folder: Path, layer: int, expert: int) -> str:
    return read_manifest(folder).experts[layer, expert].weights.files[0]


def state_file_of(folder: Path, layer: int, expert: int) -> str:
    state = read_manifest(folder).experts[layer, expert].state
    assert state is not None
    return state.files[0]


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no-manifest": (
        lambda f: (f / MANIFEST_FILE).unlink(),
        r"manifest\.json: missing, so .* no training checkpoint, or not a whole one; copy",
    ),
    "truncated-manifest": (
        lambda f: (f / MANIFEST_FILE).write_text((f / MANIFEST_FILE).read_text()[:-9]),
        r"manifest\.json: truncated or damaged: .*; copy the folder again",
    ),
    "empty-manifest": (
        lambda f: (f / MANIFEST_FILE).write_text(""),
        r"manifest\.json: truncated or damaged",
    ),
    "manifest-of-text": (
        lambda f: (f / MANIFEST_FILE).write_text('"x"'),
        r"manifest\.json: truncated or damaged",
    ),
    "another-step": (
        lambda f: (f / MANIFEST_FILE).write_text(
            (f / MANIFEST_FILE).read_text().replace('"step": 7', '"step": 8')
        ),
        r"manifest\.json: was changed after it had been written",
    ),
    "another-format": (
        lambda f: (f / MANIFEST_FILE).write_text(
            (f / MANIFEST_FILE).read_text().replace('"format": 1', '"format": 2')
        ),
        r"manifest\.json: format: 2, and this version of Moesaic reads format 1; use",
    ),
    "expert-not-listed": (
        lambda f: rewrite(f, lambda parts: parts["experts"].pop((1, 3))),
        r"manifest\.json: expert 3 of layer 1 is missing; copy",
    ),
    "file-not-listed": (
        lambda f: rewrite(f, lambda parts: parts["files"].pop(file_of(f, 0, 0))),
        r"manifest\.json: not a manifest: .* is not among the files",
    ),
    "file-elsewhere": (
        lambda f: rewrite(
            f, lambda parts: parts["files"].update({"../a": parts["files"]["config.json"]})
        ),
        r"manifest\.json: not a manifest: .*'\.\./a' is not in the folder",
    ),
    "weights-gone": (
        lambda f: (f / file_of(f, 1, 5)).unlink(),
        r"model-\S+: missing .*; it has tensors of expert \d of layer \d.*; copy the folder",
    ),
    "state-gone": (
        lambda f: (f / "state/layer-00001-00001.safetensors").unlink(),
        r"layer-00001-00001\.safetensors: missing .* of expert 0 of layer 1, expert 1 of layer 1",
    ),
    "trunk-gone": (
        lambda f: (f / "state/trunk-00001.safetensors").unlink(),
        r"trunk-00001\.safetensors: missing \(.*\); copy",
    ),
    "config-gone": (lambda f: (f / "config.json").unlink(), r"config\.json: missing"),
    "config-changed": (
        lambda f: flip(f, "config.json", 40),
        r"config\.json: its bytes are not those that were written; copy",
    ),
    "weights-truncated": (
        lambda f: (f / file_of(f, 0, 0)).write_bytes((f / file_of(f, 0, 0)).read_bytes()[:-1]),
        r"model-\S+: has \d+ bytes instead of \d+; it has tensors of expert",
    ),
    "weights-flipped": (
        lambda f: flip(f, file_of(f, 0, 0), -1),
        r"model-\S+: damaged weights of expert \d of layer 0: the checksum .*; copy",
    ),
    "state-flipped": (
        lambda f: flip(f, "state/layer-00001-00002.safetensors", -1),
        r"layer-00001-00002\S+: damaged state of expert \d of layer 1: the checksum",
    ),
    "trunk-state-flipped": (
        lambda f: flip(f, "state/trunk-00001.safetensors", -1),
        r"trunk-00001\.safetensors: its bytes are not those that were written",
    ),
    "header-flipped": (
        lambda f: flip(f, "state/layer-00001-00001.safetensors", 0),
        r"layer-00001-00001\S+: unreadable state of expert 0 of layer 1: .*; copy",
    ),
    "weights-header-flipped": (
        lambda f: flip(f, file_of(f, 0, 0), 0),
        r"model-\S+: unreadable weights of expert 0 of layer 0: .*; copy",
    ),
    "state-lacks-an-expert": (
        forget_state,
        r"layer-00001-\S+: unreadable state of expert 2 of layer 1: .*not contain",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(damage: str, copied: Path) -> None:
    change, match = DAMAGE[damage]
    change(copied)
    with pytest.raises(CheckpointError, match=match):
        read_all(copied)


@given(data=st.data())
@settings(max_examples=tries(160), deadline=None)
def test_no_flipped_bit_is_read_as_a_weight(
    data: st.DataObject, made: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = Path(shutil.copytree(made, tmp_path_factory.mktemp("flipped") / "step-7"))
    names = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
    name = data.draw(st.sampled_from(names))
    size = (folder / name).stat().st_size
    flip(folder, name, data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 7)))
    good = read_checkpoint(made)
    try:
        found = read_checkpoint(folder)
    except CheckpointError as error:
        assert not name.endswith(".safetensors")
        assert name in str(error)
        return
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        found.check()
    for place in found.experts:
        for kind in (TrainingCheckpoint.weights, TrainingCheckpoint.state):
            try:
                tensors = kind(found, *place)
            except CheckpointError as error:
                assert f"expert {place[1]} of layer {place[0]}" in str(error)
            else:
                assert same(tensors, kind(good, *place))
    shutil.rmtree(folder)


def test_an_expert_that_the_model_does_not_have_is_named(made: Path) -> None:
    with pytest.raises(CheckpointError, match="the model has no expert 8 of layer 1"):
        read_checkpoint(made).weights(1, 8)


# ---- several of them ----------------------------------------------------------------------------


@pytest.fixture
def several(made: Path, tmp_path: Path) -> Path:
    """Checkpoints of the steps 9, 10 and 100 under names that say something else."""
    for name, step in (("z", 9), ("step-99", 10), ("a", 100)):
        shutil.copytree(made, tmp_path / name)
        replace(read_manifest(tmp_path / name), step=step).write(tmp_path / name)
    (tmp_path / "logs").mkdir()
    (tmp_path / "notes.txt").write_text("")
    return tmp_path


def names_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_manifest_says_which_is_the_newest(several: Path) -> None:
    assert [one.path.name for one in list_checkpoints(several).whole] == ["z", "step-99", "a"]
    assert keep_last(several, 2) == [several / "z"]
    assert keep_last(several, 2) == []
    assert keep_last(several, 1) == [several / "step-99"]
    assert keep_last(several, 1) == []
    assert names_of(several) == ["a", "logs", "notes.txt"]
    with pytest.raises(ValueError, match="count: 0; at least the newest"):
        keep_last(several, 0)


def test_a_damaged_one_does_not_count_as_the_newest(several: Path) -> None:
    (several / "a" / "config.json").unlink()
    found = list_checkpoints(several)
    assert [one.step for one in found.whole] == [9, 10]
    assert "config.json: missing" in str(found.damaged[several / "a"])
    assert keep_last(several, 1) == [several / "z"]
    assert names_of(several) == ["a", "logs", "notes.txt", "step-99"]


def test_a_half_removed_one_is_not_taken_for_whole(
    several: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:

        def refuse(*args: object, **kwargs: object) -> None:
            raise OSError("the disk is gone")

        patched.setattr(shutil, "rmtree", refuse)
        with pytest.raises(OSError, match="the disk is gone"):
            keep_last(several, 2)
    left = next(name for name in names_of(several) if name.startswith(".z."))
    assert read_checkpoint(several / left).step == 9  # nothing of it is gone yet
    assert [one.step for one in list_checkpoints(several).whole] == [10, 100]
    assert keep_last(several, 2) == []
    assert names_of(several) == ["a", "logs", "notes.txt", "step-99"]


def test_one_that_is_being_written_is_not_taken_for_whole(source: Path, several: Path) -> None:
    def state(layer: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
        assert [one.step for one in list_checkpoints(several).whole] == [9, 10, 100]
        keep_last(several, 3)
        yield from ((expert, {"a": torch.ones(1)}) for expert in range(8))

    written(several / "new", source, step=101, state=state)
    assert [one.step for one in list_checkpoints(several).whole] == [9, 10, 100, 101]


def test_the_manifest_is_json_that_others_can_read(made: Path) -> None:
    value = json.loads((made / MANIFEST_FILE).read_text())
    assert value["format"] == 1
    assert value["checkpoint"]["run"] == RUN
    one = value["checkpoint"]["experts"]["1.0"]
    assert one["state"]["files"] == ["state/layer-00001-00001.safetensors"]
