"""The bundle for machines with a GPU has what the product needs and they lack, as pinned."""

from __future__ import annotations

import re

from tests.gpu.machine import direct_dependencies, pins
from tests.helpers.paths import ROOT

# What docs/gpu.md asks of the machine, of the dependencies of pyproject.toml.
THERE = {
    *("torch", "transformers", "accelerate", "safetensors", "numpy", "scipy"),
    *("pyyaml", "psutil", "xxhash"),
}


def test_every_dependency_is_in_the_bundle_or_on_the_machine() -> None:
    wanted = set(map(plain, direct_dependencies()))
    assert {"ray", "torch", "grpcio-health-checking"} <= wanted
    assert wanted - THERE <= carried()
    assert THERE & carried() == set()


def test_constraints_name_a_version_of_each_package_in_the_bundle() -> None:
    named = {package for package in carried() if "==" not in package}
    assert named <= set(map(plain, pins()))


def carried() -> set[str]:
    text = (ROOT / "tests/gpu/bundle.sh").read_text()
    (block,) = re.findall(r"^SITE=\(\n(.*?)^\)", text, re.MULTILINE | re.DOTALL)
    lines = (line for line in block.splitlines() if not line.strip().startswith("#"))
    return {plain(package) for line in lines for package in line.split()}


def plain(package: str) -> str:
    return package.lower().replace("_", "-")
