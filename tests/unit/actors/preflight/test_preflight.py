"""The whole of a preflight: all findings at once, before anything starts."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moesaic.actors.preflight.findings import Finding, raise_errors, severity_counts
from moesaic.actors.preflight.preflight import preflight
from moesaic.cli.main import main
from moesaic.proto.errors import CheckpointError, ClusterError
from tests.helpers.models.preflight_specs import (
    TEMPLATE,
    TOKENIZER,
    found,
    remove,
    spec_of,
    without,
)
from tests.helpers.models.sparse import sparse_deepseek
from tests.helpers.models.tiny import tiny_tokenizer

Capture = pytest.CaptureFixture[str]


def test_nothing_is_found_where_nothing_is_wrong(whole: Path) -> None:
    checked = preflight(spec_of(whole))
    assert checked.findings == []
    assert checked.folders == {"m": whole}
    assert checked.described["m"].layers == {0: 4, 1: 4}


def test_all_errors_are_told_at_once(folder: Path) -> None:
    remove(*TOKENIZER)(folder)
    spec = spec_of(folder, hosts=[{"count": 1, "slots": 1}], network={"bind": "203.0.113.1"})
    with pytest.raises(ClusterError) as caught:
        raise_errors(preflight(spec).findings)
    head, *lines = str(caught.value).splitlines()
    assert head == "3 things keep the cluster from starting:"
    paths = ["models.0.path", "hosts", "network.bind"]
    assert [line.split(":")[0].strip() for line in lines] == paths


def test_up_does_not_start_ray_where_an_error_is_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moesaic.actors.serve import launch

    def started(*_: Any) -> bool:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(launch, "start_ray", started)
    remove(*TOKENIZER)(folder)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        launch.launch(spec_of(folder), lambda *_: None)
    odd: list[str] = []
    tiny_tokenizer(chat=False).save_pretrained(folder)
    (folder / TEMPLATE).unlink()
    with pytest.raises(AssertionError, match="Ray was started"):
        launch.launch(spec_of(folder), lambda *_: None, odd.append)
    assert [text.partition(":")[0] for text in odd] == ["warning"]


def test_numbers_of_findings() -> None:
    def some(*severities: Any) -> str:
        return severity_counts([Finding(severity=one, path="a", message="b") for one in severities])

    assert some() == "no problem"
    assert some("warning", "error", "warning", "unchecked") == "1 error, 2 warnings, 1 unchecked"


def test_spec_check_and_inspect(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(f"models: [{{name: m, path: {folder}}}]\nendpoint: {{port: 0}}\n")
    assert main(["spec", "check", str(file)]) == 0
    assert "is valid: cluster local, 2 hosts, m" in " ".join(capsys.readouterr().out.split())
    (folder / TEMPLATE).unlink()
    assert main(["spec", "check", str(file)]) == 0
    said_ = capsys.readouterr()
    assert said_.out.startswith("warning: models.0.path: ")
    assert "can be started (1 warning)" in " ".join(said_.out.split())
    remove(*TOKENIZER)(folder)
    assert main(["spec", "check", str(file)]) == 1
    said_ = capsys.readouterr()
    assert said_.out.startswith("error: models.0.path: ")
    assert said_.err == f"error: {file}: cannot be started: 1 error\n"
    assert main(["spec", "check", str(file), "--json"]) == 1
    (one,) = json.loads(capsys.readouterr().out)["findings"]
    assert (one["severity"], one["path"], one["code"]) == (
        "error",
        "models.0.path",
        "CheckpointError",
    )
    assert main(["inspect", str(folder)]) == 0
    assert f"warning: model: {folder}: no tokenizer" in capsys.readouterr().out
    without("model.norm.weight")(folder)
    assert main(["inspect", str(folder), "--json"]) == 1
    said_ = capsys.readouterr()
    assert json.loads(said_.out)["findings"][0]["severity"] == "error"
    assert "model.norm.weight" in said_.err


def test_a_model_of_any_size_takes_seconds(tmp_path: Path) -> None:
    """160 files of 90,000 tensors; CPU time, since other tests may run beside this one."""
    sparse_deepseek(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = {"dtype": "bfloat16"}
    spec = spec_of(tmp_path, model=model, hosts=[{"count": 64, "memory_gb": 40}])
    began = time.process_time()
    checked = preflight(spec)
    assert time.process_time() - began < 5.0
    # 1.3 TB in bfloat16 are more than this machine has, and 64 x 40 GB is room enough.
    (one,) = checked.findings
    assert (one.severity, one.path) == ("error", "hosts")
    assert "the models' weights need 1,342.1 GB" in one.message
    assert (
        found(spec_of(tmp_path, model=model, hosts=[{"count": 64}], ray={"address": "auto"})) == []
    )


def test_the_command_imports_only_what_a_check_needs(whole: Path, tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(f"models: [{{name: m, path: {whole}}}]\nendpoint: {{port: 0}}\n")
    # Python writes a line for each import: times, and the module's name after the last bar.
    command = [sys.executable, "-X", "importtime", "-m", "moesaic.cli.main", "spec", "check", file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"transformers.modeling_utils", "safetensors"} <= imported
    assert not imported & {
        *("ray", "grpc", "vllm", "fastapi", "scipy", "sklearn"),
        *("torch._dynamo", "torch._dynamo.symbolic_convert", "torch._inductor.test_operators"),
        *("transformers.trainer", "transformers.pipelines", "transformers.image_processing_utils"),
    }
