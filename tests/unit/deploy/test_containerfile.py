"""The image's recipe: who it runs as, what is in it, and what is not."""

from __future__ import annotations

import re

from tests.helpers.paths import ROOT

RECIPE = ROOT / "deploy" / "Containerfile"
IGNORE = ROOT / ".containerignore"
PINS = (ROOT / "constraints.txt").read_text()


def instructions() -> list[tuple[str, str]]:
    lines = [line for line in RECIPE.read_text().splitlines() if not line.startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ")
    found = [line.partition(" ") for line in whole.splitlines() if line.strip()]
    return [(word, re.sub(r"\s+", " ", rest).strip()) for word, _, rest in found]


def of(word: str) -> list[str]:
    return [rest for name, rest in instructions() if name == word]


def test_only_known_instructions() -> None:
    # ADD fetches, VOLUME makes paths writable behind the reader's back, and SHELL is dropped from
    # images of the OCI format.
    known = {"ARG", "FROM", "USER", "RUN", "COPY", "ENV", "WORKDIR", "EXPOSE", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in instructions()} == known


def test_the_base_is_ray_of_the_pinned_version() -> None:
    (ray,) = re.findall(r"^ray==(\S+)$", PINS, re.MULTILINE)
    assert of("ARG")[0] == f"BASE=docker.io/rayproject/ray:{ray}-py311"
    assert of("FROM") == ["${BASE}"]
    images = re.findall(r"rayproject/ray:(\S+)", RECIPE.read_text())
    assert {image.partition("-")[0] for image in images} == {ray}


def test_it_ends_as_a_user_without_rights() -> None:
    assert of("USER") == ["root", "10001:10001"]
    names = [name for name, _ in instructions()]
    after = names[len(names) - names[::-1].index("USER") :]
    assert "RUN" not in after
    assert "COPY" not in after


def test_each_command_stops_at_its_first_error() -> None:
    assert all(command.startswith("set -eu; ") for command in of("RUN"))


def test_packages_are_pinned_and_leave_no_cache() -> None:
    installs = [part for run in of("RUN") for part in run.split("; ") if "pip install" in part]
    assert len(installs) == 2
    for install in installs:
        assert "--no-cache-dir -c /opt/src/constraints.txt" in install


def test_it_starts_moesaic() -> None:
    assert of("ENTRYPOINT") == ['["moesaic"]']


def test_no_secret_is_built_in() -> None:
    for words in [*of("ARG"), *of("ENV")]:
        assert not re.search(r"(?i)(token|password|secret|_key)", words)


def test_the_context_is_what_is_named() -> None:
    lines = [line for line in IGNORE.read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    named = [line.removeprefix("!") for line in lines if line.startswith("!")]
    assert all((ROOT / path).exists() for path in named)
    assert {"src", "actors", "cluster", "kernels", "models", "proto"} <= set(named)
    assert not {"tests", ".git", ".venv", "shared"} & set(named)
    for path in of("COPY"):
        source = path.split()[0]
        assert source == "." or source in named
