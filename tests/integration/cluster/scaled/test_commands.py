"""Every command against one running cluster: the JSON whose keys `docs/command-line.md` promises,
and all that README and docs print, as printed, or with the reason why not."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
from pathlib import Path

import pytest

from moesaic import Client
from moesaic.cli.main import main
from moesaic.handle import Cluster
from tests.helpers.documented import json_keys, written_commands
from tests.helpers.paths import ROOT
from tests.helpers.processes.live import ON_RAY, processes_of, text_of, wait_replaced

pytestmark = ON_RAY

Capture = pytest.CaptureFixture[str]
KEYS = json_keys()
LOAD = ["--concurrency", "2", "--requests", "4", "--answer-tokens", "8"]


@pytest.fixture(scope="module", autouse=True)
def load(pool: Cluster) -> None:
    """What some commands show."""
    with Client(pool.url or "") as client:
        text_of(client, "m", 20)


SHOWN = [
    ("status", []),
    ("top", []),
    ("experts", ["--hot", "3"]),
    ("plan", []),
    ("rebalance", ["--yes"]),
    ("replicate", ["0", "0", "-n", "2"]),
    ("pin", ["0", "1", "host-1"]),
    ("unpin", ["0", "1", "host-1"]),
    ("history", []),
    ("rollback", []),
    ("scale", ["2"]),
    ("drain", ["host-1"]),
    ("undrain", ["host-1"]),
    ("logs", ["--tail", "3"]),
    ("bench", LOAD),
    ("chat", ["hello", "--max-tokens", "3"]),
    ("complete", ["hello", "--max-tokens", "3"]),
    ("record", ["trace", "--seconds", "1"]),
    ("expert get", ["0", "1", "expert.safetensors"]),
]
# What needs no cluster, or has one of its own; `up` and `down` are not run here.
ELSEWHERE = {"up", "down", "inspect", "upcycle", "simulate", "spec check", "version"}
ELSEWHERE |= {"apply"}  # test_applying.py
ELSEWHERE |= {"train"}  # test_train_on_ray.py
ELSEWHERE |= {"expert put", "expert revert"}  # test_kept_updates.py


def test_the_page_and_this_table_have_the_same_commands() -> None:
    assert {command for command, _ in SHOWN} | ELSEWHERE == KEYS.keys()


@pytest.mark.parametrize(("command", "arguments"), SHOWN, ids=[command for command, _ in SHOWN])
def test_json_has_the_keys_of_the_page(
    pool: Cluster,
    capsys: Capture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    arguments: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*command.split(), *arguments, "--name", pool.name, "--json"]) == 0
    said = capsys.readouterr().out
    found = (
        [json.loads(line) for line in said.splitlines()] if command == "logs" else json.loads(said)
    )
    for one in found if isinstance(found, list) else [found]:
        assert set(one) == KEYS[command]
    assert found


def test_experts_by_name(pool: Cluster, capsys: Capture) -> None:
    pool.wait_for(pool.pin("m", 1, 3, "host-0"))
    found = pool.experts("m", 1)
    assert [(row.layer, row.expert) for row in found] == [(1, n) for n in range(8)]
    assert (found[3].pinned_to, found[0].pinned_to) == (["host-0"], [])
    assert sum(row.share_of_layer or 0.0 for row in found) == pytest.approx(1.0, abs=0.01)
    assert main(["experts", "--layer", "1", "--name", pool.name]) == 0
    assert "pinned" in capsys.readouterr().out
    for wrong, words in (
        (["--model", "x"], "model: 'x' does not exist; choose one of ['m']"),
        (["--layer", "9"], "layer: 9 of m has no experts"),
    ):
        assert main(["experts", *wrong, "--name", pool.name]) == 1
        assert words in capsys.readouterr().err
    pool.wait_for(pool.unpin("m", 1, 3, "host-0"))


def test_a_short_load(pool: Cluster, capsys: Capture) -> None:
    assert main(["bench", *LOAD, "--prompt-tokens", "5", "--name", pool.name, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["concurrency"], found["requests"], found["errors"]) == (2, 4, {})
    assert (found["prompt_tokens"], found["answer_tokens"]) == (20, 32)
    for figures in (found["time_to_first_token_s"], found["inter_token_latency_s"]):
        assert 0 < figures["p50"] <= figures["p99"] < found["seconds"]
    # What no request can have is said before any is measured.
    wrong = ["bench", *LOAD, "--answer-tokens", "5000", "--name", pool.name]
    assert main(wrong) == 1
    assert "max_tokens (5000) make 5032; at most 512 are possible" in capsys.readouterr().err


# ---- as they are written down --------------------------------------------------------------------

NO_CLUSTER = {"inspect", "spec", "version", "--help", "COMMAND"}
# What is typed in the place of a word in capitals.
TYPED = {
    "HOST": "host-1",
    "LAYER": "0",
    "EXPERT": "1",
    "N": "2",
    "I": "0",
    "ID": "1",
    "COMMAND": "status",
    "FILE": str(ROOT / "deploy" / "local.yaml"),
    "deploy/local.yaml": str(ROOT / "deploy" / "local.yaml"),
}
# What an endless or asking command needs beside what is printed.
BESIDE = {
    "moesaic top": ["--once"],
    "moesaic page": ["--print"],
    "moesaic rebalance": ["--yes"],
    "moesaic record OUT": ["--seconds", "1"],
    "moesaic complete ...": ["--max-tokens", "3"],
    "moesaic chat ...": ["--max-tokens", "3"],
}
NOT_RUN = {
    "moesaic up [SPEC or MODEL]": "stays until Ctrl-C; see tests/e2e/test_up_and_down.py",
    "moesaic up": "as above",
    "moesaic up MODEL": "as above; its spec: tests/unit/face/test_about.py",
    "moesaic up allenai/OLMoE-1B-7B-0924-Instruct": "as above, and needs a hub",
    "moesaic up -d SPEC": "as above",
    "moesaic apply": "the command's name, in a sentence",
    "moesaic apply SPEC": "`test_applying.py` does",
    "moesaic apply SPEC --dry-run": "`test_applying.py` does",
    "moesaic apply /etc/moesaic/spec.yaml": "a file in a pod of the chart",
    "moesaic up deploy/training.yaml": "as above; trained: test_training_on_ray.py",
    "moesaic train": "the command's name, in a sentence",
    "moesaic train [SPEC]": "test_train_on_ray.py",
    "moesaic train notes.yaml": "as above",
    "moesaic train --data my-texts": "as above",
    "moesaic up -d deploy/training.yaml": "stays until `moesaic down`",
    "moesaic down": "tests/e2e/test_up_and_down.py",
    "moesaic down --name NAME": "as above",
    "moesaic down --name chat": "as above",
    "moesaic chat": "a conversation: tests/unit/face/test_command_line.py",
    "moesaic bench": "its defaults take minutes: test_a_short_load",
    "moesaic expert put FILE": "needs weights: tests/integration/cluster/test_kept_updates.py",
    "moesaic expert put": "as above",
    "moesaic expert revert": "as above",
    "moesaic expert get": "the command's name, in a sentence",
    "moesaic simulate": "its defaults take minutes: tests/unit/face/test_traces.py",
    "moesaic simulate --trace OUT": "needs a recording: tests/unit/face/test_traces.py",
    "moesaic simulate --faults 1": "test_simulator.py runs the same seeds",
    "moesaic upcycle DENSE OUT": "needs a dense model: tests/unit/models/upcycling/test_upcycle.py",
    "moesaic inspect": "the command's name, in a sentence",
    "moesaic drain": "the command's name, in a sentence",
    "moesaic undrain": "the command's name, in a sentence",
    "moesaic record": "the command's name, in a sentence",
    "moesaic pin": "the command's name, in a sentence",
    "moesaic replicate": "the command's name, in a sentence",
    "moesaic scale": "the command's name, in a sentence",
    "moesaic unpin": "the command's name, in a sentence",
}
COMMANDS = sorted({re.sub(r'\[?"\.\.\."\]?', "...", text) for _, text in written_commands()})


def test_the_reasons_are_for_commands_that_are_written() -> None:
    assert set(NOT_RUN) | set(BESIDE) <= set(COMMANDS)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in NOT_RUN])
def test_a_written_command_runs(
    pool: Cluster, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    typed = {**TYPED, "MODEL": str(folder), "OUT": "trace", "...": "hello"}
    words = [typed.get(word, word) for word in shlex.split(re.sub(r"[\[\]]", "", command))[1:]]
    name = [] if NO_CLUSTER & {words[0], command.split()[1]} else ["--name", pool.name]
    assert main([*words, *BESIDE.get(command, []), *name]) == 0
    if words[0] == "drain":
        pool.wait_for(pool.undrain(TYPED["HOST"]))


def test_logs_of_a_host_that_died(pool: Cluster, capsys: Capture) -> None:
    before = processes_of(pool)["host-1"].pid
    os.kill(before, signal.SIGKILL)
    wait_replaced(pool, "host-1", before)
    assert {line.pid for line in pool.logs(host="host-1")} == {
        before,
        processes_of(pool)["host-1"].pid,
    }
    assert {line.kind for line in pool.logs()} == {"controller", "ingress", "trunk", "host"}
    assert {line.name for line in pool.logs(["trunk"])} == {"m"}
    assert main(["logs", "--host", "host-7", "--name", pool.name]) == 1
    assert "no log of 'host-7'; it has logs of host-0, host-1" in capsys.readouterr().err


def test_a_model_that_there_is_not(pool: Cluster, capsys: Capture) -> None:
    for command in (["chat", "hi"], ["complete", "hi"], ["bench"]):
        assert main([*command, "--model", "x", "--name", pool.name]) == 1
        assert "the model 'x' does not exist" in capsys.readouterr().err
    for command in (["pin", "0", "0", "host-9"], ["pin", "7", "0", "host-0"], ["drain", "host-9"]):
        assert main([*command, "--name", pool.name]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
