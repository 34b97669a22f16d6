"""Architectures of third parties, found by entry point: packages in a folder on the path."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.kernels.ffn import expert_ffn
from moesaic.models.trunk import extensions
from moesaic.models.trunk.adapters import UNUSED, PoolExperts, needs_adapter
from moesaic.models.trunk.checkpoint import Checkpoint
from moesaic.models.trunk.config import config_from_dict, read_config
from moesaic.models.trunk.experts_layers import experts_layers
from moesaic.models.trunk.folder_check import check_folder
from moesaic.models.trunk.in_pool import PoolFunction
from moesaic.models.trunk.trunk import connect_experts, is_unmodified
from moesaic.proto.errors import CheckpointError, UnsupportedModel
from tests.helpers.documented import blocks
from tests.helpers.models.model_folders import checkpoint, trunk_of
from tests.helpers.paths import ROOT

# Name of the package, its module's source, {name of an entry: attribute of the module}.
Install = Callable[[str, str, dict[str, str]], None]
TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "max_position_embeddings": 64,
}
IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def install(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a package on the path until the test ends, as pip would."""
    monkeypatch.setattr(extensions, "_registered", dict(extensions._registered))

    def install(name: str, source: str, entries: dict[str, str]) -> None:
        folder, module = tmp_path_factory.mktemp("site"), name.replace("-", "_")
        (folder / f"{module}.py").write_text(source)
        info = folder / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"{entry} = {module}:{attribute}" for entry, attribute in entries.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{extensions.GROUP}]", *lines, ""]))
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, module, raising=False)

    return install


def written(folder: Path, **values: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(TINY | values))
    return folder


def documented() -> str:
    """The example of docs/extensions.md."""
    (source,) = [text for page, text in blocks("python") if page == "extensions.md"]
    return source


def pool_of(found: Checkpoint) -> Callable[[int], PoolFunction]:
    """Computes each expert from the checkpoint, one choice after the other."""

    def layer_of(layer: int) -> PoolFunction:
        form = found.form(layer)

        def compute(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
            y_TH = torch.zeros_like(x_TH)
            for token, ids_K in enumerate(ids_TK.tolist()):
                for choice, expert in enumerate(ids_K):
                    if expert != UNUSED:
                        out = expert_ffn(form, found.read(layer, expert), x_TH[token : token + 1])
                        y_TH[token] += weights_TK[token, choice] * out[0]
            return y_TH

        return compute

    return layer_of


def test_the_documented_example_is_served_like_any_other(install: Install, tmp_path: Path) -> None:
    install("acme-moe", documented(), {"acme_moe": "ACME"})
    torch.manual_seed(0)
    acme = extensions.find("acme_moe")
    assert acme is not None
    model: Any = acme.model(acme.config(**TINY)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
    assert needs_adapter(model)
    model.save_pretrained(tmp_path)

    described = check_folder(tmp_path, dtype=torch.float32).described
    assert (described.architecture, described.layers) == ("acme_moe", {0: 4, 1: 4})
    assert described.expert_bytes == 2 * 32 * 48 * 4
    trunk: Any = trunk_of(tmp_path)
    assert not is_unmodified(trunk)
    assert all(isinstance(layer.mlp.experts, PoolExperts) for layer in trunk.model.layers)
    assert not any(".experts." in name for name, _ in trunk.named_parameters())
    found = checkpoint(tmp_path)
    connect_experts(trunk, experts_layers(found.model), pool_of(found))
    with torch.no_grad():
        torch.testing.assert_close(trunk(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_a_host_makes_it_of_what_a_trunk_describes(install: Install) -> None:
    install("acme-moe", documented(), {"acme_moe": "ACME"})
    config = config_from_dict({"model_type": "acme_moe"} | TINY)
    assert type(config).__name__ == "AcmeConfig"
    assert config_from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_a_class_beside_the_type_of_another_model(install: Install, tmp_path: Path) -> None:
    """As OpenMoE's checkpoints have it."""
    install("acme-moe", documented(), {"AcmeForCausalLM": "ACME"})
    folder = written(tmp_path, model_type="llama", architectures=["AcmeForCausalLM"])
    assert read_config(folder).model_type == "acme_moe"


def test_a_package_is_imported_for_its_own_models_alone(install: Install, tmp_path: Path) -> None:
    bomb = "raise SystemExit('imported')"
    install("bomb", bomb, {"mixtral": "A", "MixtralForCausalLM": "A", "bomb_moe": "A"})
    folder = written(tmp_path, model_type="mixtral", architectures=["MixtralForCausalLM"])
    assert type(read_config(folder)).__module__.startswith("transformers.")
    with pytest.raises(CheckpointError, match="nosuchmoe"):
        read_config(written(tmp_path, model_type="nosuchmoe"))
    assert "bomb" not in sys.modules


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "import no_such_module_at_all",
            r"'broken_moe' is provided by broken-moe 1\.0, whose broken_moe:IT cannot be imported: "
            r"ModuleNotFoundError: .*no_such_module_at_all",
        ),
        (
            "ELSE = 1",
            r"broken-moe 1\.0, whose broken_moe:IT cannot be imported: AttributeError: .*IT",
        ),
        ("IT = 'text'", r"broken-moe 1\.0, whose broken_moe:IT is of type str, not an Architect"),
        (
            "from moesaic.models.trunk.architecture import Architecture\n"
            "from transformers import LlamaConfig, LlamaForCausalLM\n"
            "IT = Architecture(config=LlamaConfig, model=LlamaForCausalLM)",
            r"broken-moe 1\.0, whose broken_moe:IT is of model_type 'llama' and class 'LlamaForC",
        ),
    ],
    ids=["import", "attribute", "type", "name"],
)
def test_an_entry_that_is_of_no_use(
    source: str, words: str, install: Install, tmp_path: Path
) -> None:
    install("broken-moe", source, {"broken_moe": "IT"})
    folder = written(tmp_path, model_type="broken_moe")
    for _ in range(2):  # the second time, too
        with pytest.raises(UnsupportedModel, match=words):
            read_config(folder)


def test_two_packages_for_one_model(install: Install, tmp_path: Path) -> None:
    for name in ("twin-b", "twin-a"):
        install(name, "raise SystemExit('imported')", {"twin_moe": "IT"})
    words = r"'twin_moe' is provided by twin-a 1\.0 and by twin-b 1\.0; uninstall all but one"
    with pytest.raises(UnsupportedModel, match=words):
        read_config(written(tmp_path, model_type="twin_moe"))


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "grok-1"},
        {"model_type": "openmoe"},
        {"model_type": "llama", "architectures": ["OpenMoeForCausalLM"]},
    ],
    ids=["grok-1", "openmoe", "published openmoe"],
)
def test_our_own_extension_is_named_where_it_is_not_installed(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(extensions, "_registered", {})
    monkeypatch.setattr(extensions, "entry_points", lambda **_: ())
    with pytest.raises(UnsupportedModel, match=r"pip install \./extensions/architectures"):
        read_config(written(tmp_path, **values))


def test_our_own_extension_is_installed_as_it_is_written() -> None:
    with (ROOT / "extensions" / "architectures" / "pyproject.toml").open("rb") as file:
        entries = tomllib.load(file)["project"]["entry-points"][extensions.GROUP]
    assert entries.keys() == set(extensions.OURS)
    for name in entries:
        found = extensions._find(name)
        assert found is not None
        assert name in (found.model_type, found.model.__name__)


PROBE = """
import sys
from moesaic.models.trunk.config import config_from_dict
config_from_dict({"model_type": "mixtral"})
print([name for name in sys.modules if name.startswith("moesaic_architectures")])
config_from_dict({"model_type": "grok-1"})
print("moesaic_architectures.grok1" in sys.modules, "moesaic_architectures.openmoe" in sys.modules)
"""


def test_a_fresh_process_loads_what_it_needs_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.returncode) == ("[]\nTrue False\n", 0), done.stderr
