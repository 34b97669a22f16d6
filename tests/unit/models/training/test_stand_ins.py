"""Stand-ins of experts' parameters: names, state dicts, saves, and that they leave no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moesaic.models.training.stand_ins import StandIns
from moesaic.models.training.trainable_trunk import TrainableTrunk, trainable_trunk_of
from moesaic.models.trunk.adapters import adapt
from moesaic.models.trunk.experts_layers import experts_layers
from moesaic.models.trunk.trunk import meta_model, strip_experts
from moesaic.proto.errors import BadInput, InternalError
from tests.helpers.models.architectures import ADAPTED, tiny_config, tiny_model

NAMES = ["mixtral", "gpt_oss", "nemotron_h", "qwen2_moe", "openmoe", *ADAPTED]


def trunk_of(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, nn.Module]:
    """Return a trunk, and the model on the meta device that has its experts."""
    model = tiny_model(name, dtype=dtype)
    adapt(model)
    strip_experts(model)
    return model, meta_model(tiny_config(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_trunk_has_the_parameters_of_the_whole_model_by_name(name: str) -> None:
    trunk, meta = trunk_of(name, torch.bfloat16)
    before, state = dict(trunk.named_parameters()), list(trunk.state_dict())
    layers = experts_layers(meta)
    opened = TrainableTrunk(trunk, layers, torch.bfloat16)
    found, whole = dict(trunk.named_parameters()), dict(meta.named_parameters())
    assert found.keys() == whole.keys()
    stand_ins = list(opened.stand_ins)
    assert {one.target for one in stand_ins} == found.keys() - before.keys() != set()
    for one in stand_ins:
        assert found[one.target] is one.parameter
        assert one.parameter.requires_grad
        assert one.parameter.dtype == torch.bfloat16
        assert one.parameter.shape == (1,) * whole[one.target].dim()
        assert one.name in {"up", "down", "up_bias", "down_bias"}
    assert list(opened.stand_ins.layers) == [layer.layer for layer in layers]
    assert list(trunk.state_dict()) == state

    assert trainable_trunk_of(trunk) is opened
    opened.close()
    assert dict(trunk.named_parameters()).keys() == before.keys()
    assert "save_pretrained" not in vars(trunk)
    with pytest.raises(BadInput, match="it is not open for training"):
        trainable_trunk_of(trunk)
    TrainableTrunk(trunk, layers, torch.bfloat16).close()


class Normed(nn.Module):
    """An experts module with a norm that its experts share."""

    _is_expert_parallel = False
    has_gate = True
    is_transposed = False
    has_post_expert_norm = True

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 12, 8))
        self.down_proj = nn.Parameter(torch.zeros(4, 8, 6))
        self.post_expert_norm = nn.RMSNorm(8)


def test_what_experts_share_has_a_stand_in_under_its_name() -> None:
    layer = experts_layers(nn.Sequential(Normed()))[0]
    trunk: Any = nn.Sequential(Normed(), nn.Linear(2, 2))
    strip_experts(trunk)
    stand_ins = StandIns(trunk, [layer], torch.float32)
    assert {one.name: one.target for one in stand_ins} == {
        "up": "0.gate_up_proj",
        "down": "0.down_proj",
        "norm": "0.post_expert_norm.weight",
    }
    assert trunk.state_dict().keys() == {"1.weight", "1.bias"}
    trunk.load_state_dict(trunk.state_dict())
    stand_ins.close()
    assert dict(trunk.named_parameters()).keys() == {"1.weight", "1.bias"}


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_is_loaded_without_them(assign: bool) -> None:
    trunk, meta = trunk_of("mixtral")
    other, _ = trunk_of("mixtral")
    opened = TrainableTrunk(trunk, experts_layers(meta), torch.float32)
    parameters = [one.parameter for one in opened.stand_ins]
    state = {name: one + 1 for name, one in other.state_dict().items()}
    trunk.load_state_dict(state, assign=assign)
    assert all(torch.equal(one, state[name]) for name, one in trunk.state_dict().items())
    whole = tiny_model("mixtral").state_dict()
    found = trunk.load_state_dict(whole, strict=False, assign=assign)
    assert not found.missing_keys
    assert set(found.unexpected_keys) == {one.target for one in opened.stand_ins}
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*down_proj"):
        trunk.load_state_dict(whole)
    now = dict(trunk.named_parameters())
    for one, parameter in zip(opened.stand_ins, parameters, strict=True):
        assert now[one.target] is parameter
        assert parameter.numel() == 1 and parameter.item() == 0.0


def test_it_is_opened_once_and_has_one_optimizer() -> None:
    trunk, meta = trunk_of("mixtral")
    layers = experts_layers(meta)
    opened = TrainableTrunk(trunk, layers, torch.float32)
    names = dict(trunk.named_parameters()).keys()
    with pytest.raises(BadInput, match="gate_up_proj is in the model: it is open for training"):
        TrainableTrunk(trunk, layers, torch.float32)
    assert dict(trunk.named_parameters()).keys() == names
    opened.claim(lambda *_: None)
    with pytest.raises(BadInput, match="another PoolOptimizer trains it; close"):
        opened.claim(lambda *_: None)
    opened.release()
    opened.claim(lambda *_: None)
    with pytest.raises(InternalError, match="its parameters are stripped"):
        opened.close()
        TrainableTrunk(trunk, _stripped(layers), torch.float32)


def _stripped(layers: list[Any]) -> list[Any]:
    for layer in layers:
        strip_experts(layer.module)
    return layers


def test_a_save_has_the_experts_or_does_not_happen(tmp_path: Path) -> None:
    trunk, meta = trunk_of("mixtral")
    opened = TrainableTrunk(trunk, experts_layers(meta), torch.float32)
    saved: list[tuple[Path, int | str | None]] = []
    with pytest.raises(BadInput, match="no PoolOptimizer is there to save them"):
        trunk.save_pretrained(tmp_path / "a")
    opened.claim(lambda folder, size: saved.append((folder, size)))
    trunk.save_pretrained(tmp_path / "b", max_shard_size="1GB")
    trunk.save_pretrained(str(tmp_path / "c"), state_dict=trunk.state_dict())
    trunk.save_pretrained(tmp_path / "d", is_main_process=False)
    assert saved == [(tmp_path / "b", "1GB"), (tmp_path / "c", None)]
    refused: dict[str, Any] = {
        "push_to_hub": True,
        "variant": "fp16",
        "distributed_checkpoint": True,
        "safe_serialization": False,
        "save_original_format": False,
        "state_dict": {name: one.clone() for name, one in trunk.state_dict().items()},
    }
    for name, value in refused.items():
        with pytest.raises(BadInput, match=f"save_pretrained: {name}"):
            trunk.save_pretrained(tmp_path / "e", **{name: value})
    with pytest.raises(BadInput, match=r"save_pretrained of model: .* save the whole model"):
        trunk.model.save_pretrained(tmp_path / "f")
    assert len(saved) == 2 and not list(tmp_path.iterdir())
    opened.close()
    trunk.model.save_pretrained(tmp_path / "g")
    assert (tmp_path / "g" / "config.json").exists()
