"""The logs of a cluster's processes: every one follows the owner's environment, one request leads
through all of them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest

import moesaic
from moesaic.actors.runtime.log_lines import is_log_line
from moesaic.actors.runtime.ray_border import namespace_of
from moesaic.actors.store.cluster_secret import router_key_of, secret_of
from moesaic.cli.main import main
from moesaic.handle import Cluster
from moesaic.proto.errors import SpecError
from moesaic.session import need_session
from tests.helpers.processes.live import ON_RAY
from tests.helpers.processes.logged import Line, assert_followed, of, steps_of

PROMPT = "zebra xylophone quartz"
TOKENS = 4

pytestmark = [*ON_RAY, pytest.mark.slow]


def lines_of(pool: Cluster) -> list[Line]:
    """Moesaic's own lines of all processes."""
    texts = [line.text for line in pool.logs(tail=1_000_000)]
    return [json.loads(text) for text in texts if is_log_line(text)]


def ask(pool: Cluster, request_id: str) -> str:
    asked: dict[str, Any] = {"model": "m", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    headers = {"x-request-id": request_id}
    url = f"{pool.url}/v1/completions"
    answer = httpx.post(url, json=asked, headers=headers, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def test_every_process_says_what_it_is_once(pool: Cluster) -> None:
    started = [line for line in lines_of(pool) if line["message"].endswith("has started")]
    names = sorted(line["process"] for line in started)
    *others, trunk = names
    assert others == ["controller", "host-0", "host-1", "ingress", "router-service"]
    assert trunk.startswith("trunk-m-")
    assert len({line["pid"] for line in started}) == 6
    assert {line["cluster"] for line in started} == {pool.name}
    # This process is the test's, and only uses the library.
    ours = logging.getLogger("moesaic")
    assert (ours.level, ours.handlers) == (logging.NOTSET, [])


def test_a_request_is_followed_from_the_endpoint_to_the_hosts(pool: Cluster) -> None:
    ask(pool, "trace-1")
    lines = lines_of(pool)
    assert_followed(lines, "trace-1-0", layers=2, steps=TOKENS)
    of_request = of(lines, "actors.endpoint.http.edge", request_id="trace-1")
    assert {line["process"] for line in of_request} == {"ingress"}
    (_, step), *_ = steps_of(lines, "trace-1-0")
    (trunk,) = {
        line["process"]
        for line in of(lines, "actors.engine.step_log", step=step)
        if "trace-1-0" in line["requests"]
    }
    assert trunk.startswith("trunk-m-")
    batches = [line for line in of(lines, "actors.host.host_loop") if "took_ms" in line]
    assert {line["process"] for line in batches} == {"host-0", "host-1"}
    assert all(line["process"] == line["host"] for line in batches)


def test_a_clients_call_has_the_ids_of_the_router_service(pool: Cluster) -> None:
    import torch

    with moesaic.connect(pool.router or "") as client:
        hidden = client.models()[0].layers[0].hidden
        x_TH = torch.randn(3, hidden)
        client.experts("m", 0)(x_TH, torch.tensor([[0, 1]] * 3), torch.ones(3, 2))
    lines = lines_of(pool)
    (came,) = of(lines, "actors.router_service.merged_calls")
    assert came["process"] == "router-service"
    # Rows of an expert that the service did not know yet were in an earlier step, too.
    *_, (router, step) = steps_of(lines, came["request_id"])
    assert router == "router-service"
    batches = [line for line in lines if f"{router}/{step}/0" in line.get("calls", ())]
    assert {line["logger"] for line in batches} == {"actors.host.host_loop"}


def test_the_command_passes_json_lines_on_as_they_are(
    pool: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["logs", "controller", "--name", pool.name]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert shown
    assert {json.loads(line)["process"] for line in shown} == {"controller"}
    assert main(["logs", "controller", "--name", pool.name, "--json"]) == 0
    wrapped = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["kind"] for line in wrapped} == {"controller"}
    assert [one["text"] for one in wrapped if is_log_line(one["text"])] == shown


def test_no_secret_and_no_text_is_in_any_log(pool: Cluster) -> None:
    text = ask(pool, "trace-2")
    namespace = namespace_of(pool.name)
    secret = secret_of(namespace).reveal()
    files = list(Path(need_session(pool.name).logs or "").glob("worker-*"))
    written = b"".join(file.read_bytes() for file in files)
    assert b"trace-2-0" in written
    words = [router_key_of(namespace), secret.hex(), *PROMPT.split()]
    for word in (*(word.encode() for word in words), secret, text.encode(), _as_json(text)):
        assert word not in written


def _as_json(text: str) -> bytes:
    return json.dumps(text).strip('"').encode()


def test_a_wrong_value_ends_up_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC_LOG", "loud")
    with pytest.raises(SpecError, match="MOESAIC_LOG: 'loud' is not a level"):
        moesaic.up({"name": "wrong", "models": []})
