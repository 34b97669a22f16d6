"""Joins a running Ray, or says why it cannot be joined.

Ray itself tries for a long time, and then reports only that it failed.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import ray
from ray._private import ray_constants
from ray._private.authentication.authentication_token_setup import (
    maybe_enable_token_auth_if_token_available,
)
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import canonicalize_bootstrap_address
from ray._private.utils import read_ray_address
from ray.core.generated import gcs_service_pb2
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

from ...proto.errors import ClusterError
from .ray_token import close_token, need_token, token_file

REACH_S = 5.0
ANSWER_S = 10.0


def join(
    address: str, init: Callable[..., Any] = ray.init, *, insecure: bool, **options: Any
) -> None:
    """Connect to a running Ray with `ray.init`. Raises ClusterError with the cause.

    A Ray that asks for no token is joined only if ``insecure``.
    """
    try:
        close_token()
        _show_token()
        with _as_it_is(address):
            where = _find(address)
            check_reachable(where)
            _check_answer(where)
            need_token(where, insecure=insecure)
            init(address=address, **options)
    except ClusterError as error:
        raise ClusterError(f"ray.address: {address}: {error}") from error.__cause__
    except Exception as error:
        # Ray raises errors of many types here.
        words = " ".join(str(error).split()) or type(error).__name__
        raise ClusterError(f"ray.address: {address}: {words}") from error


@contextmanager
def _as_it_is(address: str) -> Iterator[None]:
    """Let Ray use a loopback address as it is, also if Ray was imported before `up`.

    It would replace it by the machine's own address, unless a variable says otherwise that Ray
    reads when it is imported (`session.stay_on_loopback`).
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    if address.startswith(("127.", "[::1]", "localhost:")):
        ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def ray_is_here() -> bool:
    """Return whether this process has joined a Ray, or is told of one: by `ray start`, or so.

    The Ray may have ended meanwhile.
    """
    told = os.environ.get("RAY_ADDRESS") or read_ray_address()
    return ray.is_initialized() or bool(told)


def _show_token() -> None:
    """Make Ray's client show the token that it finds.

    By itself it does so only if RAY_AUTH_MODE is unset and the address is `auto`. A Ray that asks
    for no token ignores it.
    """
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _find(address: str) -> str:
    """Return host:port of the GCS."""
    found = canonicalize_bootstrap_address(address)
    if found is None:
        raise ClusterError(
            "no Ray runs on this machine; `ray start --head` starts one; for one elsewhere, set "
            "RAY_ADDRESS=host:port"
        )
    return found


def check_reachable(address: str) -> None:
    """Check that something listens at host:port. Raises ClusterError if not."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray answers at this address ({error}); check the address, and that Ray runs there"
        ) from error


def _check_answer(address: str) -> None:
    """Ask the GCS for its version, with the token if there is one."""
    messages: Any = gcs_service_pb2
    channel = init_grpc_channel(address, [("grpc.enable_http_proxy", 0)])
    try:
        asked = messages.CheckAliveRequest()
        answer = NodeInfoGcsServiceStub(channel).CheckAlive(asked, timeout=ANSWER_S)
    except grpc.RpcError as error:
        raise ClusterError(_refused(error)) from error
    finally:
        channel.close()
    if answer.ray_version != ray.__version__:
        raise ClusterError(
            f"Ray has version {answer.ray_version} at this address, and {ray.__version__} on this "
            "machine; install the same version on all machines"
        )


def _refused(error: grpc.RpcError) -> str:
    assert isinstance(error, grpc.Call)
    if error.code() == grpc.StatusCode.UNAUTHENTICATED:
        source = token_source()
        if source is None:
            return (
                "this Ray wants a token, and this process has none; set RAY_AUTH_TOKEN, or copy "
                "~/.ray/auth_token from its head node"
            )
        if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
            return (
                f"this Ray wants a token, and RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']} keeps "
                "this process from showing one; unset it"
            )
        return (
            f"the token in {source} is not the token of this Ray; copy the token of its head node "
            "(`ray get-auth-token` prints it)"
        )
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"the Ray at this address does not answer within {ANSWER_S:g} s; try again"
    return (
        # Users mistake two other ports of a head node for its address.
        f"the process at this address does not answer as Ray does ({error.details()}). Give the "
        "port of `ray start --head`, 6379 by default, and not that of the dashboard (8265) or of "
        "the Ray client (10001)"
    )


def token_source() -> str | None:
    """Return where Ray finds a token, in the order in which Ray looks; None: nowhere."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    if os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return "the file of RAY_AUTH_TOKEN_PATH"
    return "~/.ray/auth_token" if token_file().exists() else None
