"""The files for `ray up`, as Ray itself checks them."""

from __future__ import annotations

import copy
import re
import textwrap
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from moesaic.cluster.spec.spec import parse_spec
from tests.helpers.paths import ROOT

FOLDER = ROOT / "deploy" / "ray"
CLUSTERS = [FOLDER / "machines.yaml", FOLDER / "aws.yaml"]


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def test_all_files_are_known() -> None:
    assert {*CLUSTERS, FOLDER / "spec.yaml"} == set(FOLDER.glob("*"))


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_ray_takes_it(path: Path) -> None:
    validate_config(prepare_config(read(path)))


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_ray_refuses_a_wrong_one(path: Path) -> None:
    config = copy.deepcopy(read(path))
    config["idle_minutes"] = 5
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(config))


def test_machines_of_a_cloud_come_in_two_groups() -> None:
    groups = prepare_config(read(FOLDER / "aws.yaml"))["available_node_types"]
    assert groups["head"]["resources"] == {"CPU": 0}
    assert "GPU" not in groups["cpu"]["resources"]
    assert groups["gpu"]["resources"]["GPU"] > 0
    assert groups["gpu"]["max_workers"] > 0


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_every_ray_asks_for_the_token(path: Path) -> None:
    config = read(path)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    for command in (one for one in starts if " start" in one):
        assert "RAY_AUTH_MODE=token" in command
        assert "chmod 600 ~/.ray/auth_token" in command


def test_the_spec_is_for_several_machines() -> None:
    spec = parse_spec(read(FOLDER / "spec.yaml"))
    assert spec.ray.address == "auto"
    assert spec.network.bind == "node"


def test_what_the_page_deploys_on_serve_is_good() -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    (block,) = re.findall(r"\n((?:    .*\n)*    applications:\n(?:    .*\n)+)", page)
    config = ServeDeploySchema.model_validate(yaml.safe_load(textwrap.dedent(block)))
    (application,) = config.applications
    spec = parse_spec(application.args)
    assert application.name == f"moesaic-{spec.name}"
    assert application.import_path == "moesaic.serve:build"
    assert application.route_prefix == "/"
    assert spec.endpoint is not None
    assert (config.http_options.host, config.http_options.port) == (
        spec.endpoint.host,
        spec.endpoint.port,
    )
