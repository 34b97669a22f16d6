"""Joining a Ray that runs: each reason why it cannot be has its own words, within seconds."""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import pytest
import ray
import ray._raylet
from ray._private.authentication_test_utils import reset_auth_token_state
from ray.core.generated import gcs_service_pb2

from moesaic.actors.preflight.check_machine import check_token
from moesaic.actors.runtime import joining, ray_border
from moesaic.actors.runtime.embedded_ray import EmbeddedRay
from moesaic.actors.runtime.joining import join
from moesaic.actors.runtime.ports import free_port
from moesaic.actors.runtime.ray_border import start_ray
from moesaic.actors.runtime.ray_token import make_token, need_token
from moesaic.cluster.spec.spec import parse_spec
from moesaic.proto.errors import ClusterError
from tests.e2e.test_two_nodes import end_group
from tests.helpers.paths import ROOT
from tests.helpers.processes.apart import ray_environment
from tests.helpers.processes.live import ON_RAY

pytestmark = ON_RAY

RAY = str(Path(sys.executable).parent / "ray")
messages: Any = gcs_service_pb2
Answer = Callable[[grpc.ServicerContext], Any]


@contextmanager
def gcs(answer: Answer | None) -> Iterator[str]:
    """The address of a GCS that only says whether it lives; None: of another gRPC server."""

    server = grpc.server(ThreadPoolExecutor(2))
    if answer is not None:

        def check_alive(request: Any, context: grpc.ServicerContext) -> Any:
            return answer(context)

        method = grpc.unary_unary_rpc_method_handler(
            check_alive,
            request_deserializer=messages.CheckAliveRequest.FromString,
            response_serializer=messages.CheckAliveReply.SerializeToString,
        )
        service = grpc.method_handlers_generic_handler(
            "ray.rpc.NodeInfoGcsService", {"CheckAlive": method}
        )
        server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)


def wants_a_token(context: grpc.ServicerContext) -> Any:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")


def sleeps(context: grpc.ServicerContext) -> Any:
    time.sleep(1.0)
    return messages.CheckAliveReply()


def older(context: grpc.ServicerContext) -> Any:
    return messages.CheckAliveReply(ray_version="2.9.3")


def same(context: grpc.ServicerContext) -> Any:
    return messages.CheckAliveReply(ray_version=ray.__version__)


@pytest.fixture(autouse=True)
def no_token(tmp_path: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patched:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
            patched.delenv(name, raising=False)
        patched.setenv("HOME", str(tmp_path))
        patched.setattr(joining, "_show_token", lambda: None)
        patched.setattr(joining, "ANSWER_S", 0.3)
        # Ray reads once in a process whether it shows a token, and which: what Rays of earlier
        # tests have shown is nothing to these, and theirs nothing to later ones.
        reset_auth_token_state()
        yield tmp_path
    reset_auth_token_state()


def reason(address: str, init: Callable[..., Any] | None = None, *, insecure: bool = True) -> str:
    def never(**options: Any) -> None:
        raise AssertionError("Ray is not to be asked")

    with pytest.raises(ClusterError) as caught:
        join(address, init or never, insecure=insecure)
    assert str(caught.value).startswith(f"ray.address: {address}: ")
    return str(caught.value)


def test_no_token() -> None:
    with gcs(wants_a_token) as address:
        assert "wants a token, and this process has none; set RAY_AUTH_TOKEN" in reason(address)


@pytest.mark.parametrize("source", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token"])
def test_another_token(source: str, no_token: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if source.startswith("RAY"):
        monkeypatch.setenv(source, "abcd")
    else:
        (no_token / ".ray").mkdir()
        (no_token / ".ray" / "auth_token").write_text("abcd")
    with gcs(wants_a_token) as address:
        said = reason(address)
        assert "is not the token of this Ray" in said
        assert source in said
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        assert "RAY_AUTH_MODE=disabled keeps this process from showing one" in reason(address)


def test_another_version_of_ray() -> None:
    with gcs(older) as address:
        assert f"version 2.9.3 at this address, and {ray.__version__} on this" in reason(address)


def test_another_version_of_python() -> None:
    def init(**options: Any) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Python: 3.9.1\n")

    with gcs(same) as address:
        assert "Version mismatch: The cluster was started with: Python: 3.9.1" in reason(
            address, init
        )


def test_what_listens_is_not_ray() -> None:
    with gcs(None) as address:
        said = reason(address)
        assert "does not answer as Ray does" in said
        assert "6379 by default" in said


def test_it_does_not_answer_in_time() -> None:
    with gcs(sleeps) as address:
        assert "does not answer within 0.3 s" in reason(address)


def test_nobody_listens() -> None:
    assert "no Ray answers at this address" in reason(f"127.0.0.1:{free_port('127.0.0.1')}")


def test_no_ray_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(address: str) -> str | None:
        return None

    monkeypatch.setattr(joining, "canonicalize_bootstrap_address", find)
    assert "no Ray runs on this machine; `ray start --head` starts one" in reason("auto")


# ---- one that asks for no token ------------------------------------------------------------------


def asked_with_a_token_alone() -> Answer:
    """This process shows no token, whatever it has (`no_token`): the first question stands for one
    that does."""
    asked = count()

    def answer(context: grpc.ServicerContext) -> Any:
        return wants_a_token(context) if next(asked) else same(context)

    return answer


def test_a_ray_without_a_token_is_refused_unless_the_spec_says_so() -> None:
    joined: list[dict[str, Any]] = []
    with gcs(same) as address:
        said = reason(address, insecure=False)
        assert "this Ray asks for no token" in said
        assert "RAY_AUTH_MODE=token" in said
        assert "`ray: {insecure: true}`" in said
        join(address, lambda **options: joined.append(options), insecure=True)
    with gcs(asked_with_a_token_alone()) as address:
        join(address, lambda **options: joined.append(options), insecure=False)
    assert len(joined) == 2
    assert "insecure" not in joined[0]


def test_what_cannot_be_told_is_refused() -> None:
    def busy(context: grpc.ServicerContext) -> Any:
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy")

    with gcs(busy) as address:
        need_token(address, insecure=True)
        with pytest.raises(ClusterError, match=r"cannot determine .*RESOURCE_EXHAUSTED"):
            need_token(address, insecure=False)


def test_a_program_that_is_on_a_ray_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own `ray.init`, or one that a cluster of it was let to use."""
    monkeypatch.setattr(ray_border.ray, "is_initialized", lambda: True)
    models = [{"name": "m", "path": "p"}]
    with gcs(same) as address:
        monkeypatch.setattr(ray_border, "ray_address", lambda: address)
        for named in ("local", "auto", address):
            spec = parse_spec({"models": models, "ray": {"address": named}})
            with pytest.raises(ClusterError, match=f"{named}: this Ray asks for no token"):
                start_ray(spec)
            taken = {"address": named, "insecure": True}
            assert not start_ray(parse_spec({"models": models, "ray": taken}))


def test_an_embedded_ray_without_a_token_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    running = False

    def run(to: bool) -> None:
        nonlocal running
        running = to

    def start(*_: object, **__: object) -> EmbeddedRay:
        run(True)
        return EmbeddedRay(address, Path("/r"))

    monkeypatch.setattr(ray_border.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_border, "start_embedded", start)
    monkeypatch.setattr(ray_border, "end_embedded", lambda folder: run(False))
    monkeypatch.setattr(
        ray_border, "join", lambda at, *, insecure, **_: need_token(at, insecure=insecure)
    )
    models = [{"name": "m", "path": "p"}]
    with gcs(same) as address:
        with pytest.raises(ClusterError, match="asks for no token"):
            start_ray(parse_spec({"models": models}))
        assert not running
        assert start_ray(parse_spec({"models": models, "ray": {"insecure": True}}))
        assert running


def test_the_environment_is_not_to_switch_the_token_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(**ray_spec: Any) -> list[tuple[str, str]]:
        spec = parse_spec({"models": [{"name": "m", "path": "p"}], "ray": ray_spec})
        local = spec.ray.address == "local"
        return [(one.severity, one.path) for one in check_token(spec, local=local)]

    assert found() == []
    for mode in ("disabled", "", "DISABLED"):
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        assert found() == [("error", "ray.address")]
        assert found(address="auto") == []  # shows when it is joined
        assert found(insecure=True) == [("warning", "ray.insecure")]
    monkeypatch.setenv("RAY_AUTH_MODE", "Token")
    assert found() == []


# ---- the token's file ----------------------------------------------------------------------------


def test_the_token_that_is_made_is_its_users_alone(no_token: Path) -> None:
    before = os.umask(0)
    try:
        make_token()
    finally:
        os.umask(before)
    file = no_token / ".ray" / "auth_token"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    made = file.read_text()
    assert re.fullmatch("[0-9a-f]{64}", made)
    make_token()
    assert file.read_text() == made
    assert list(file.parent.iterdir()) == [file]


def test_a_token_that_others_could_read_is_taken_from_them(
    no_token: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = no_token / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("abcd")
    file.chmod(0o644)
    with gcs(wants_a_token) as address:
        reason(address)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text() == "abcd"
    assert f"{file} had mode 0644" in caplog.text
    assert "abcd" not in caplog.text


def test_no_token_is_made_where_there_is_one(
    no_token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "RAY_AUTH_TOKEN": "abcd",
        "RAY_AUTH_TOKEN_PATH": "/token",
        "RAY_AUTH_MODE": "disabled",
    }.items():
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            make_token()
    assert list(no_token.iterdir()) == []
    (no_token / ".ray").write_text("no folder")
    with pytest.raises(ClusterError, match="set RAY_AUTH_TOKEN_PATH to"):
        make_token()


# ---- a real one ---------------------------------------------------------------------------------

# Ray reads RAY_AUTH_MODE when it is imported, and keeps a token: one process for each.
JOINER = """
import json, os, sys, time
from moesaic.actors.runtime.ray_border import join_ray
from moesaic.proto.errors import ClusterError
found = {}
for what, token in json.loads(sys.argv[2]).items():
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.environ["RAY_AUTH_TOKEN"] = token
        start = time.monotonic()
        try:
            join_ray(sys.argv[1], "t")
            said = ""
        except ClusterError as error:
            said = str(error)
        os.write(writer, json.dumps([said, time.monotonic() - start]).encode())
        os._exit(0)
    os.close(writer)
    found[what] = json.loads(os.read(reader, 65536))
print("REPORT " + json.dumps(found))
"""


@contextmanager
def head_node(tmp_path: Path, **environment: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The address of a Ray that `ray start` started, and an environment without a token."""
    without = {
        name: value
        for name, value in ray_environment(tmp_path).items()
        if not name.startswith("RAY_AUTH")
    } | {"HOME": str(tmp_path), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    without |= {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    log = tmp_path / "head.log"
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    with TemporaryDirectory(prefix="moe", dir="/tmp") as ray_dir, log.open("wb") as sink:
        words = [
            *("--head", "--block", "--node-ip-address=127.0.0.1", f"--port={address[10:]}"),
            *("--include-dashboard=false", f"--temp-dir={ray_dir}", "--num-cpus=1"),
            *("--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0"),
            f"--ray-client-server-port={free_port('127.0.0.1')}",
        ]
        head = subprocess.Popen(
            [RAY, "start", *words],
            env=without | environment,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
        try:
            while "Ray runtime started" not in log.read_text():
                assert head.poll() is None, log.read_text()
                time.sleep(0.1)
            yield address, without
        finally:
            end_group(head)


def said_by(code: str, environment: dict[str, str], *words: str) -> dict[str, Any]:
    joiner = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    report = re.search("^REPORT (.*)$", joiner.stdout, re.MULTILINE)
    assert report, joiner.stdout + joiner.stderr
    return json.loads(report[1])


@pytest.mark.slow
def test_a_token_in_the_environment_is_enough(tmp_path: Path) -> None:
    token = secrets.token_hex(32)
    tokens = {"right": token, "wrong": secrets.token_hex(32), "none": ""}
    with head_node(tmp_path, RAY_AUTH_TOKEN=token) as (address, environment):
        said = said_by(JOINER, environment, address, json.dumps(tokens))
    assert said["right"][0] == ""
    assert "the token in RAY_AUTH_TOKEN is not the token of this Ray" in said["wrong"][0]
    assert "this process has none" in said["none"][0]
    assert max(said["wrong"][1], said["none"][1]) < joining.REACH_S + 10


# The program's own `ray.init` comes first, and both have a token that this Ray does not ask for.
STARTER = """
import json, sys
import ray
from moesaic.actors.runtime.ray_border import start_ray
from moesaic.cluster.spec.spec import parse_spec
from moesaic.proto.errors import ClusterError
said = {}
def tried(what, **ray_spec):
    spec = {"models": [{"name": "m", "path": "p"}], "ray": {"address": sys.argv[1], **ray_spec}}
    try:
        start_ray(parse_spec(spec))
        said[what] = ""
    except ClusterError as error:
        said[what] = str(error)
tried("joined")
assert not ray.is_initialized()
tried("joined insecurely", insecure=True)
ray.shutdown()
ray.init(address=sys.argv[1], log_to_driver=False)
tried("its own")
tried("its own, insecurely", insecure=True)
print("REPORT " + json.dumps(said))
"""


@pytest.mark.slow
def test_a_real_ray_that_asks_for_no_token(tmp_path: Path) -> None:
    with head_node(tmp_path, RAY_AUTH_MODE="disabled") as (address, environment):
        shown = {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
        said = said_by(STARTER, environment | shown, address)
    assert said["joined insecurely"] == said["its own, insecurely"] == ""
    for what in ("joined", "its own"):
        assert said[what].startswith(f"ray.address: {address}: this Ray asks for no token")
