"""The cluster's secret, proofs and the router service's key are where the documents say, and
nowhere else: not in arguments, environments, logs, reports, errors, or in what Ray tells."""

from __future__ import annotations

import base64
import json
import os
import select
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from google.protobuf.text_encoding import CEscape

from moesaic.actors.runtime.embedded_ray import processes_of
from moesaic.clients.router_keys import VARIABLE
from moesaic.proto.keys import ClusterSecret
from tests.e2e.owner_of_secrets import NAME, ROUTER_KEY, SECRET
from tests.integration.conftest import save_model

pytestmark = [pytest.mark.alone, pytest.mark.slow, pytest.mark.timeout(300)]
START_S = 200.0


def forms(value: bytes) -> set[bytes]:
    """How bytes are written by whatever prints, logs or encodes them."""
    plain = base64.b64encode(value)
    return {
        value,
        value.hex().encode(),
        value.hex().upper().encode(),
        plain.rstrip(b"="),
        base64.urlsafe_b64encode(value).rstrip(b"="),
        repr(value)[2:-1].encode(),
        json.dumps(value.decode("latin1")).strip('"').encode(),
        CEscape(value, as_utf8=False).encode(),
    }


@dataclass
class Marks:
    """What is searched for."""

    secret: bytes
    router_key: str
    proofs: dict[str, bytes]

    def found_in(self, text: bytes) -> set[str]:
        values = {
            "the secret": self.secret,
            "the key": self.router_key.encode(),
            "the operator key": ClusterSecret(self.secret).operator_key.encode(),
            **self.proofs,
        }
        return {what for what, value in values.items() if any(f in text for f in forms(value))}


@dataclass
class Running:
    owner: psutil.Process
    told: dict[str, Any]  # by the owner, as JSON
    output: Path
    cache: Path
    marks: Marks

    @property
    def children(self) -> list[psutil.Process]:
        (file,) = (self.cache / "run").glob("*.json")
        return processes_of(Path(json.loads(file.read_text())["ray_folder"]).name)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("secrets")
    folder = save_model(root / "model", "mixtral")
    told, output, cache = root / "told.json", root / "output", root / "cache"
    with output.open("wb") as sink:
        owner = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.owner_of_secrets", str(folder), str(told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=sink,
            env={
                **os.environ,
                VARIABLE: ROUTER_KEY,
                "MOESAIC_CACHE": str(cache),
                "MOESAIC_LOG": "debug",  # every process logs all that it can
            },
        )
    assert owner.stdin is not None
    assert owner.stdout is not None
    try:
        assert select.select([owner.stdout], [], [], START_S)[0], output.read_text()[-3000:]
        assert owner.stdout.readline() == b"ready\n", output.read_text()[-3000:]
        found = json.loads(told.read_text())
        proofs = {what: bytes.fromhex(text) for what, text in found.pop("proofs").items()}
        assert len(proofs) == 2 * 3 * 2
        marks = Marks(SECRET, ROUTER_KEY, proofs)
        yield Running(psutil.Process(owner.pid), found, output, cache, marks)
    finally:
        owner.stdin.close()
        try:
            owner.wait(60)
        finally:
            owner.kill()
            owner.stdout.close()


def test_in_no_process_but_the_owner(running: Running) -> None:
    children = running.children
    assert len(children) >= 6, "hosts, controller, trunk, ingress, router service, Ray"
    wrong = {}
    for process in children:
        for part in ("cmdline", "environ"):
            try:
                text = Path(f"/proc/{process.pid}/{part}").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if marks := running.marks.found_in(text):
                wrong[f"{part} of {process.pid} {process.name()}"] = marks
            assert VARIABLE.encode() not in text
    assert not wrong
    # Where the user put it, and there alone.
    owner = Path(f"/proc/{running.owner.pid}")
    assert running.marks.found_in((owner / "environ").read_bytes()) == {"the key"}
    assert not running.marks.found_in((owner / "cmdline").read_bytes())
    assert VARIABLE not in running.told["environment"]


def test_in_no_report_and_in_nothing_that_ray_tells(running: Running) -> None:
    assert len(running.told["list_actors"]) >= 6
    assert any("RayExpertHost" in actor for actor in running.told["list_actors"])
    assert running.told["list_tasks"]
    assert "Unauthenticated" in running.told["another key"]
    for question, answer in running.told.items():
        assert not running.marks.found_in(json.dumps(answer).encode()), question


def test_in_no_log(running: Running) -> None:
    """Nor in anything else that Ray writes for its session."""
    session = Path(running.told["logs"]).parent
    files = [file for file in session.rglob("*") if file.is_file() and not file.is_symlink()]
    assert any("worker" in file.name for file in files)
    assert any(file.stat().st_size for file in files)
    for file in [*files, running.output]:
        assert not running.marks.found_in(file.read_bytes()), file


def test_the_session_file_has_the_keys_alone_for_its_user_alone(running: Running) -> None:
    (file,) = running.cache.rglob(f"{NAME}.json")
    assert running.marks.found_in(file.read_bytes()) == {"the key", "the operator key"}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    for other in running.cache.rglob("*"):
        if other.is_file() and other != file:
            assert not running.marks.found_in(other.read_bytes()), other


def test_the_search_finds_what_it_looks_for(running: Running) -> None:
    what, proof = next(iter(running.marks.proofs.items()))
    for value, name in ((SECRET, "the secret"), (ROUTER_KEY.encode(), "the key"), (proof, what)):
        for form in forms(value):
            assert running.marks.found_in(b"before " + form + b" behind") == {name}
