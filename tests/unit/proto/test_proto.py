"""The generated code is what today's generator makes of today's proto files."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.helpers.paths import ROOT


def _makefile_command() -> list[str]:
    """What `make proto` runs, without the Python in front of it."""
    recipe = re.search(r"^proto:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    return shlex.split(recipe[1].replace("\\\n", " ").strip().lstrip("@"))[1:]


def test_generated_code_is_committed_byte_for_byte(tmp_path: Path) -> None:
    sources = sorted((ROOT / "proto").glob("*.proto"))
    assert sources
    command = [part.replace("_out=src", f"_out={tmp_path}") for part in _makefile_command()]
    for source in sources:
        assert f"moesaic/proto/{source.name}" in command, "`make proto` leaves it out"
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made = {file.name: file.read_bytes() for file in (tmp_path / "moesaic" / "proto").iterdir()}
    committed = {file.name: file.read_bytes() for file in (ROOT / "proto").glob("*_pb2*.py*")}
    assert made.keys() == committed.keys()
    assert len(made) == 3 * len(sources)
    for name, content in made.items():
        assert content == committed[name], f"{name}: run `make proto` and commit"
