"""What README and docs say can be typed: commands that there are, specs that are good, programs
that compile. Whether they do what they say is for the tests of the commands."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import typer.main
import yaml

from moesaic.cli.main import app
from moesaic.cluster.spec.spec import parse_spec
from moesaic.cluster.train_command.train_spec import TrainSpec
from tests.helpers.documented import blocks, written_commands
from tests.helpers.paths import ROOT

# Stand for a value.
_PLACEHOLDERS = {"N": "2", "I": "0", "ID": "1", "LAYER": "0", "EXPERT": "1", "COMMAND": "status"}


@pytest.mark.parametrize(("page", "command"), written_commands())
def test_a_command_that_is_written_down_exists_with_its_options(page: str, command: str) -> None:
    words = shlex.split(re.sub(r"[\[\]]", "", command))[1:]
    node: Any = typer.main.get_command(app)
    while words and hasattr(node, "commands"):
        if words[0].startswith("-"):
            break
        name = _PLACEHOLDERS.get(words[0], words[0])
        assert name in node.commands, f"{page}: no command {name!r}"
        node, words = node.commands[name], words[1:]
    known = {option for one in node.params for option in one.opts} | {"-h", "--help"}
    said = [word for word in words if word.startswith("-")]
    assert set(said) <= known, f"{page}: no option like this: {set(said) - known}"


def test_commands_are_found() -> None:
    found = {command for _, command in written_commands()}
    assert {"moesaic down", "moesaic logs controller trunk", "moesaic history"} <= found
    assert len(found) > 30


@pytest.mark.parametrize(("page", "text"), list(blocks("yaml")))
def test_a_spec_that_is_written_down_is_good(page: str, text: str) -> None:
    values = yaml.safe_load(text)
    if "data" in values:
        assert TrainSpec.model_validate(values).model_fields_set == values.keys()
        return
    assert parse_spec(values, source=page).model_fields_set == values.keys()


@pytest.mark.parametrize(("page", "text"), list(blocks("python")))
def test_a_program_that_is_written_down_compiles(page: str, text: str) -> None:
    compile(text, page, "exec")


def test_the_table_of_versions_is_that_of_the_pins() -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    rows = re.findall(
        r"^\| (\w+) \| [^|]+ \| ([\d.]+) \|$",
        (ROOT / "docs" / "running.md").read_text(),
        re.MULTILINE,
    )
    found = {name.lower(): version for name, version in rows if name != "Python"}
    assert found.keys() == {"ray", "torch", "transformers", "grpcio", "protobuf"}
    assert found == {name: pins[name] for name in found}
