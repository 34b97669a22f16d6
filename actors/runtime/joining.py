"""Whether a Ray that runs can be joined, and if not, why: Ray itself tries for long, and then says
no more than that it failed."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import grpc
import ray
from ray._private.authentication.authentication_token_setup import (
    maybe_enable_token_auth_if_token_available,
)
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import canonicalize_bootstrap_address
from ray.core.generated import gcs_service_pb2
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

from ...proto.errors import ClusterError
from .ray_token import close_token, need_token, token_file

REACH_S = 5.0
ANSWER_S = 10.0
# What a head node listens at besides, and users take for its address.
_OTHER_PORTS = "the dashboard's is 8265, the Ray client's 10001, and neither is meant"


def join(
    address: str, init: Callable[..., Any] = ray.init, *, insecure: bool, **options: Any
) -> None:
    """`ray.init` with the address of a Ray that runs. Raises ClusterError with the cause; one that
    asks for no token is joined only if ``insecure``."""
    try:
        close_token()
        _show_token()
        where = _find(address)
        check_reachable(where)
        _check_answer(where)
        need_token(where, insecure=insecure)
        init(address=address, **options)
    except ClusterError as error:
        raise ClusterError(f"ray.address: {address}: {error}") from error.__cause__
    except Exception as error:
        # Ray raises what it likes.
        words = " ".join(str(error).split()) or type(error).__name__
        raise ClusterError(f"ray.address: {address}: {words}") from error


def _show_token() -> None:
    """Have Ray show the token that it finds. By itself it does so only where nobody said whether
    there is one (RAY_AUTH_MODE) and the address is `auto`; a Ray without one does not mind."""
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _find(address: str) -> str:
    """host:port of the GCS."""
    found = canonicalize_bootstrap_address(address)
    if found is None:
        raise ClusterError(
            "no Ray runs on this machine; `ray start --head` starts one, and RAY_ADDRESS=host:port "
            "names one elsewhere"
        )
    return found


def check_reachable(address: str) -> None:
    """Raises ClusterError where nothing listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
    except OSError as error:
        raise ClusterError(f"no Ray answers there ({error})") from error


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
            f"Ray {answer.ray_version} runs there, and here is Ray {ray.__version__}; install the "
            "same on all machines"
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
                f"this Ray wants a token, and RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']} says "
                "that none is shown; unset it"
            )
        return (
            f"this Ray has another token than {source} here; copy the one of its head node "
            "(`ray get-auth-token` prints it)"
        )
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"the Ray there does not answer within {ANSWER_S:g} s"
    return (
        f"what listens there does not answer as Ray does ({error.details()}); the port is that of "
        f"`ray start --head`, 6379 by default: {_OTHER_PORTS}"
    )


def token_source() -> str | None:
    """Where Ray finds a token, in its order."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    if os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return "the file of RAY_AUTH_TOKEN_PATH"
    return "~/.ray/auth_token" if token_file().exists() else None
