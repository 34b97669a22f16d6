"""Wrong uses of every command, the exit codes, conversations, and logs of dead processes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import numpy as np
import pytest
import typer.main

from moesaic.actors.runtime.process_labels import announce, announced
from moesaic.bench import Percentiles, measure_load
from moesaic.cli import chat
from moesaic.cli.ending import EXIT_CODES
from moesaic.cli.main import app, main
from moesaic.clients.http_client import Client
from moesaic.cluster.control.status_views import expert_views
from moesaic.cluster.expert_keys import ExpertKey, LayerKey
from moesaic.cluster.load.meter import LoadReport
from moesaic.cluster.load.tracker import LoadTracker
from moesaic.cluster.placement import LayerPlacement, Replica
from moesaic.cluster.planner.plan import OperatorConstraints
from moesaic.logs import LogLine, read_logs
from moesaic.proto.errors import ClusterError, RequestError
from moesaic.session import ClusterSession, note_logs
from tests.helpers.documented import COMMANDS, rows

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No cluster is running, and the working folder is empty but for files that are wrong."""
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad.yaml").write_text("hosts: [")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    (tmp_path / "key.yaml").write_text("hosts: [{cuont: 2}]")
    (tmp_path / "model.yaml").write_text("models: [{name: m, path: nowhere/at-all}]")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00\x81" * 9)
    return tmp_path


NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens there
GONE = "no cluster 'local' of this user is running on this machine"

WRONG = [
    (["apply", "none.yaml"], 1, "none.yaml: cannot be read"),
    (["train", "none.yaml"], 1, "none.yaml: cannot be read"),
    (["train", "list.yaml"], 1, "a mapping is expected"),
    (["train"], 1, "data.path: name what to learn from"),
    (["train", "--data", "x"], 1, GONE),
    # of up, spec check
    (["up", "none.yaml"], 1, "none.yaml: cannot be read"),
    (["up", "-d", "none.yaml"], 1, "none.yaml: cannot be read"),
    (["up", "folder"], 1, "folder: no config.json; give the folder of a Hugging Face model"),
    (["up", "bytes"], 1, "bytes: cannot be read"),
    (["up", "/proc/self/mem"], 1, "/proc/self/mem: cannot be read"),
    (["up", "bad.yaml"], 1, "bad.yaml: not YAML"),
    (["up", "list.yaml"], 1, "a mapping is expected"),
    (["up", "key.yaml"], 1, "hosts.0.cuont: unknown key"),
    (["up", "model.yaml"], 1, "nowhere/at-all"),
    (["up", "a", "b"], 2, "unexpected extra argument"),
    (["spec", "check", "none.yaml"], 1, "cannot be read"),
    (["spec", "check", "folder", "--json"], 1, "cannot be read"),
    (["spec", "check"], 2, "Missing argument"),
    (["spec", "chekc"], 2, "No such command"),
    # without a cluster
    (["down"], 1, GONE),
    (["status", "--json"], 1, GONE),
    (["status", "--name", "../x"], 1, "'../x' is not the name of a cluster"),
    (["top", "--once"], 1, GONE),
    (["top", "--interval", "0"], 2, "--interval"),
    (["experts"], 1, GONE),
    (["experts", "--layer", "x"], 2, "--layer"),
    (["experts", "--hot", "0"], 2, "--hot"),
    (["page"], 1, GONE),
    (["logs"], 1, GONE),
    (["logs", "hots"], 2, "'hots' is not one of controller"),
    (["logs", "--tail", "-1"], 2, "--tail"),
    (["expert", "get", "0", "1", "x.safetensors"], 1, GONE),
    (["expert", "get", "0"], 2, "Missing argument"),
    (["expert", "put", "none.safetensors"], 1, "none.safetensors: damaged or truncated"),
    (["expert", "put"], 2, "Missing argument"),
    (["expert", "revert"], 1, GONE),
    (["plan"], 1, GONE),
    (["plan", "--budget", "lots"], 1, GONE),
    (["rebalance", "--yes"], 1, GONE),
    (["rebalance", "--json"], 2, "--yes"),
    (["rollback", "last"], 2, "'change'"),
    (["rollback"], 1, GONE),
    (["history"], 1, GONE),
    (["replicate", "0", "0"], 2, "--replicas"),
    (["replicate", "0", "0", "-n", "2"], 1, GONE),
    (["pin", "0", "0"], 2, "Missing argument"),
    (["pin", "0", "-1", "host-0"], 2, "-1"),
    (["pin", "0", "0", "host-0"], 1, GONE),
    (["unpin", "0", "0", "host-0"], 1, GONE),
    (["drain"], 2, "Missing argument"),
    (["drain", "host-0"], 1, GONE),
    (["undrain", "host-0"], 1, GONE),
    (["scale", "0"], 2, "'hosts'"),
    (["scale", "2"], 1, GONE),
    (["record", "trace"], 1, GONE),
    (["record", "folder"], 1, "already exists"),
    (["record", "none/trace"], 1, "there is no folder"),
    # the endpoint
    (["chat", "hi"], 1, GONE),
    (["chat", "hi", "--url", NOBODY], 1, "cannot be reached"),
    (["chat", "hi", "--url", "nonsense"], 1, "'nonsense' is not an endpoint's address"),
    (["bench", "--url", "http://x:y"], 1, "'http://x:y' is not an endpoint's address"),
    (["chat", "--json"], 2, "--json needs a message"),
    (["complete", "hi", "--url", NOBODY, "--model", "m"], 1, "cannot be reached"),
    (["complete"], 2, "Missing argument"),
    (["complete", "hi", "--temperature", "9"], 2, "--temperature"),
    (["bench"], 1, GONE),
    (["bench", "--url", NOBODY], 1, "cannot be reached"),
    (["bench", "--concurrency", "1,none"], 2, "'1,none'"),
    (["bench", "--concurrency", "0"], 2, "numbers above 0"),
    # files and models
    (["inspect", "nowhere/at-all"], 1, "nowhere/at-all"),
    (["inspect", "folder"], 1, "folder"),
    (["inspect", "demo", "--dtype", "int3"], 2, "--dtype"),
    (["upcycle", "nowhere", "out"], 1, "nowhere"),
    (["upcycle", "folder", "out"], 1, "folder"),
    (["upcycle", "bytes", "out"], 1, "bytes"),
    (["upcycle", "folder", "out", "--gate", "x"], 2, "'x' is neither random nor kmeans"),
    (["simulate", "--trace", "none"], 1, "none"),
    (["simulate", "--trace", "bytes"], 1, "bytes"),
    (["simulate", "--trace", "folder"], 1, "folder"),
    (["simulate", "--spec", "bad.yaml"], 1, "not YAML"),
    (["simulate", "--hosts", "1"], 2, "--hosts"),
    (["version", "--jsno"], 2, "--jsno"),
    (["spec", "schema", "x"], 2, "extra argument"),
    (["spec", "docs", "x"], 2, "extra argument"),
    (["nothing-like-this"], 2, "No such command"),
]


@pytest.mark.parametrize(("command", "code", "words"), WRONG, ids=lambda one: str(one)[:60])
def test_a_wrong_use_gets_one_clear_line(
    command: list[str], code: int, words: str, capsys: Capture
) -> None:
    assert main(command) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    # Wrong usage comes in a frame of several lines, with the way to the help.
    flat = " ".join(said.err.replace("│", " ").split())
    assert words in flat
    if code == 1:
        (line,) = [one for one in said.err.splitlines() if one.strip()]
        assert line.startswith("error: ")


def commands() -> Iterator[str]:
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        yield from [f"{name} {one}" for one in inner] if inner else [name]


def test_every_command_has_a_wrong_use_in_the_table() -> None:
    used = {" ".join(command[:2]) for command, _, _ in WRONG} | {c[0] for c, _, _ in WRONG}
    assert set(commands()) - used == set()


def test_exit_codes_stand_in_the_help_and_on_the_page(capsys: Capture) -> None:
    assert rows(COMMANDS, "Exit codes") == [[str(code), why] for code, why in EXIT_CODES.items()]
    assert main(["--help"]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(f"{code} {why}" in said for code, why in EXIT_CODES.items())


def test_ctrl_c_and_readers_that_went_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(error: BaseException) -> Any:
        def run(**_: Any) -> None:
            raise error

        return run

    monkeypatch.setattr("moesaic.cli.main.os.dup2", lambda *_: None)
    for error, code in ((KeyboardInterrupt(), 130), (BrokenPipeError(), 141), (OSError("x"), 1)):
        monkeypatch.setattr("moesaic.cli.main.app", raising(error))
        assert main([]) == code


# ---- conversations -------------------------------------------------------------------------------


class Endpoint:
    """Answers each chat with how many messages it has; can be interrupted in the middle."""

    def __init__(self) -> None:
        self.asked: list[list[dict[str, str]]] = []
        self.closed = 0
        self.press = False

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m", "max_model_len": 9}]})
        self.asked.append(json.loads(request.content)["messages"])
        if self.asked[-1][-1]["content"] == "fail":
            error = {"message": "it is busy", "code": "Busy"}
            return httpx.Response(429, json={"error": error})
        return httpx.Response(200, stream=_Stream(self))


class _Stream(httpx.SyncByteStream):
    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    def __iter__(self) -> Iterator[bytes]:
        for text in ("one ", "two"):
            delta = {"delta": {"content": text}, "finish_reason": None}
            yield f"data: {json.dumps({'choices': [delta]})}\n\n".encode()
            if self._endpoint.press:
                os.kill(os.getpid(), signal.SIGINT)
        yield b"data: [DONE]\n\n"

    def close(self) -> None:
        self._endpoint.closed += 1


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Endpoint:
    found = Endpoint()
    transport = httpx.MockTransport(found)
    monkeypatch.setattr(
        "moesaic.clients.http_client.Client",
        lambda url: Client(url, retries=0, transport=transport),
    )
    return found


def say(monkeypatch: pytest.MonkeyPatch, text: str, *options: str, terminal: bool = True) -> int:
    monkeypatch.setattr(sys, "stdin", (_Terminal if terminal else io.StringIO)(text))
    return main(["chat", "--url", "http://test", *options])


def test_a_conversation(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    script = 'hi\n\n/help\n/system be brief\na \\\nb\n/reset\n"""\nc\n/d\n"""\n/nothing\n/exit\nx\n'
    assert say(monkeypatch, script, "--system", "be kind") == 0
    kind, brief = ({"role": "system", "content": f"be {how}"} for how in ("kind", "brief"))
    answer = {"role": "assistant", "content": "one two"}
    hi, ab, cd = ({"role": "user", "content": text} for text in ("hi", "a \nb", "c\n/d"))
    assert endpoint.asked == [[kind, hi], [brief, hi, answer, ab], [brief, cd]]
    said = capsys.readouterr()
    assert said.out.splitlines() == ["one two"] * 3
    assert "there is no command /nothing" in said.err
    assert "/reset" in said.err


def test_ctrl_c_stops_the_answer_and_not_the_program(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    endpoint.press = True
    real = chat._show

    def show(chunk: Any) -> None:
        real(chunk)
        if len(endpoint.asked) > 1:
            endpoint.press = False

    monkeypatch.setattr(chat, "_show", show)
    # Whoever started the tests may have told them to ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert say(monkeypatch, "hi\nagain\n") == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert endpoint.closed == 2
    stopped = {"role": "assistant", "content": "one "}
    assert stopped in endpoint.asked[1]
    assert "stopped" in capsys.readouterr().err


def test_an_error_ends_a_script_and_not_a_conversation(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert say(monkeypatch, "fail\nhi\n") == 0
    assert [one[-1]["content"] for one in endpoint.asked] == ["fail", "hi"]
    assert len(endpoint.asked[1]) == 1, "what failed is not kept"
    assert "error: it is busy" in capsys.readouterr().err
    assert say(monkeypatch, "fail\nhi\n", terminal=False) == 1
    assert len(endpoint.asked) == 3


# ---- logs ----------------------------------------------------------------------------------------


def worker(folder: Path, number: int, kind: Any, name: str, lines: list[str]) -> None:
    out = folder / f"worker-{number:04x}-01000000-{number}.out"
    out.write_text(f":job_id:01\nmoesaic: {kind} {name} of c\n" + "".join(f"{x}\n" for x in lines))
    out.with_suffix(".err").write_text(f":actor_name:X\n{name} erred\nhalf a li")


@pytest.fixture
def session(tmp_path: Path) -> ClusterSession:
    folder = tmp_path / "logs"
    folder.mkdir()
    worker(folder, 7, "host", "host-0", [f"line {n}" for n in range(50_000)])
    worker(folder, 9, "host", "host-0", ["again"])
    worker(folder, 8, "controller", "controller", [])
    (folder / "worker-aa-01-3.out").write_text("somebody else's\n")
    (folder / "worker-ab-01-4.out").write_text("moesaic: host host-5 of another\n")
    return ClusterSession(name="c", pid=1, started=0.0, ray_address="", logs=str(folder))


def read(session: ClusterSession, *kinds: Any, **more: Any) -> list[LogLine]:
    settings: dict[str, Any] = {"tail": 2, "follow": False, "stop": Event(), **more}
    return list(read_logs(session, kinds, **settings))


def test_logs_of_processes_that_live_and_that_are_dead(session: ClusterSession) -> None:
    assert read(session, host="host-0") == [
        LogLine("host", "host-0", 7, "stderr", "host-0 erred"),
        LogLine("host", "host-0", 7, "stdout", "line 49998"),
        LogLine("host", "host-0", 7, "stdout", "line 49999"),
        LogLine("host", "host-0", 9, "stderr", "host-0 erred"),
        LogLine("host", "host-0", 9, "stdout", "moesaic: host host-0 of c"),
        LogLine("host", "host-0", 9, "stdout", "again"),
    ]
    assert {line.kind for line in read(session)} == {"controller", "host"}
    assert len(read(session, "host", tail=30_000)) == 30_000 + 2 + 2
    assert read(session, "controller", tail=0) == []


def test_a_line_of_our_own_log_names_its_process_itself() -> None:
    for text in ("2026-11-27T16:53:16.746Z info host-0[7] actors.host.host: m", '{"ts": "2026"}'):
        assert str(LogLine("host", "host-0", 7, "stderr", text)) == text
    assert str(LogLine("host", "host-0", 7, "stdout", "printed")) == "host-0 7: printed"


@pytest.mark.parametrize("variable", ["MOESAIC_LOG", "MOESAIC_LOG_FORMAT"])
def test_a_wrong_setting_of_the_log_ends_a_command(variable: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moesaic.cli.main", "version"],
        env={**os.environ, variable: "loud"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {variable}: 'loud' is")
    assert len(done.stderr.splitlines()) == 1


def test_logs_that_there_are_not(session: ClusterSession) -> None:
    with pytest.raises(ClusterError, match="no log of 'host-5'; it has logs of host-0"):
        read(session, host="host-5")
    with pytest.raises(ClusterError, match="no log of trunk"):
        read(session, "trunk")
    with pytest.raises(RequestError, match="'hots' is not one of"):
        read(session, "hots")


def test_logs_of_a_start_that_failed(session: ClusterSession, capsys: Capture) -> None:
    note_logs("c", session.logs or "")
    assert main(["logs", "host", "--tail", "1", "--name", "c"]) == 0
    assert "host-0 9: again" in capsys.readouterr().out
    assert main(["logs", "host", "--name", "d"]) == 1
    assert "no cluster 'd' of this user is running" in capsys.readouterr().err


def test_logs_are_followed_line_by_line(session: ClusterSession) -> None:
    folder, stop = Path(session.logs or ""), Event()
    lines = read_logs(session, host="host-0", tail=1, follow=True, stop=stop)
    assert [next(lines).text for _ in range(4)][-1] == "again"
    with (folder / "worker-0009-01000000-9.err").open("a") as file:
        file.write("ne\nhalf")
    assert next(lines).text == "half a line"
    worker(folder, 10, "host", "host-0", ["come back"])
    assert {next(lines).text for _ in range(3)} >= {"come back", "host-0 erred"}
    stop.set()
    assert list(lines) == []


def test_what_a_process_says_is_understood(capsys: Capture) -> None:
    announce("trunk", "org/model", "local")
    assert announced(capsys.readouterr().out) == ("trunk", "org/model", "local")
    assert announced("moesaic: something else") is None


# ---- experts, and a load -------------------------------------------------------------------------


def test_where_experts_stand() -> None:
    key = LayerKey("m", 3)
    placed = LayerPlacement(((Replica("a", 0.25), Replica("b", 0.75)), (Replica("b", 1.0),)))
    layers = {key: placed, LayerKey("n", 0): LayerPlacement(((Replica("a", 1.0),),))}
    loads = LoadTracker()
    loads.advance(0.0)
    loads.hear(LoadReport(router="r", placement_id=None, counts={key: np.array([10, 30])}))
    loads.advance(10.0)
    constraints = OperatorConstraints(
        min_replicas={ExpertKey("m", 3, 0): 2}, pins={ExpertKey("m", 3, 1): frozenset("b")}
    )
    first, second = expert_views(layers, loads, constraints, model="m")
    assert first.model_dump() == {
        "model": "m",
        "layer": 3,
        "expert": 0,
        "replicas": [{"host": "a", "share": 0.25}, {"host": "b", "share": 0.75}],
        "assignments_per_s": {"over_10_s": 1.0, "over_60_s": 1.0, "over_600_s": 1.0},
        "share_of_layer": 0.25,
        "min_replicas": 2,
        "pinned_to": [],
    }
    assert (second.pinned_to, second.min_replicas) == (["b"], 1)
    assert expert_views(layers, loads, constraints, hot=1) == [second]
    (other,) = expert_views(layers, loads, constraints, layer=0)
    assert (other.model, other.share_of_layer) == ("n", None)


def test_percentiles_by_nearest_rank() -> None:
    assert Percentiles.of([]) == Percentiles(p50=None, p99=None)
    assert Percentiles.of([3.0]) == Percentiles(p50=3.0, p99=3.0)
    assert Percentiles.of([float(n) for n in range(100, 0, -1)]) == Percentiles(p50=50.0, p99=99.0)


@pytest.mark.parametrize("name", ["requests", "prompt_tokens", "answer_tokens", "concurrency"])
async def test_a_load_of_nothing_is_refused(name: str) -> None:
    wrong: dict[str, Any] = {name: [0] if name == "concurrency" else 0}
    with pytest.raises(RequestError, match=f"{name}: 0 is below 1"):
        await measure_load(NOBODY, **wrong)
