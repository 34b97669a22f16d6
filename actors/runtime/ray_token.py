"""Ray's token: without one, anyone who reaches a port of Ray can run programs on all its machines.

So a Ray that asks for no token is refused, unless the spec says `ray: {insecure: true}`, and other
users of the machine cannot read the token's file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import stat
from pathlib import Path
from typing import Any

import grpc
import ray._raylet
from ray._common.tls_utils import load_certs_from_env
from ray._private.authentication.authentication_token_generator import (
    generate_new_authentication_token,
)
from ray.core.generated import gcs_service_pb2
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

from ...proto.errors import ClusterError

log = logging.getLogger(__name__)

ASK_S = 10.0
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def need_token(address: str, *, insecure: bool) -> None:
    """Check that the GCS at host:port refuses a question without a token.

    Raises ClusterError if it answers, or if that cannot be determined, unless ``insecure``.
    """
    if insecure:
        return
    code = _asked_without(address)
    if code is grpc.StatusCode.OK:
        raise ClusterError(
            "this Ray asks for no token, so anyone who reaches one of its ports can run any "
            "program on all its machines. Restart it with a token (`ray get-auth-token --generate` "
            "once, RAY_AUTH_MODE=token for `ray start` on each machine), or set "
            "`ray: {insecure: true}` in the spec"
        )
    if code is not grpc.StatusCode.UNAUTHENTICATED:
        raise ClusterError(
            f"cannot determine whether this Ray asks for a token ({code.name}); try again, or set "
            "`ray: {insecure: true}` in the spec"
        )


def _asked_without(address: str) -> grpc.StatusCode:
    messages: Any = gcs_service_pb2
    options = [("grpc.enable_http_proxy", 0)]
    # The same as Ray's own channel, but without the interceptor that shows the token.
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        chain, key, roots = load_certs_from_env()
        credentials = grpc.ssl_channel_credentials(roots, key, chain)
        channel = grpc.secure_channel(address, credentials, options)
    else:
        channel = grpc.insecure_channel(address, options)
    try:
        asked = messages.CheckAliveRequest()
        NodeInfoGcsServiceStub(channel).CheckAlive(asked, timeout=ASK_S)
        return grpc.StatusCode.OK
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        return error.code()
    finally:
        channel.close()


# ---- the file -----------------------------------------------------------------------------------


def make_token() -> None:
    """Make a token for the Rays of this user, unless there is one. Raises ClusterError.

    Ray would make one itself, but in a file that all users of the machine can read.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    file = token_file()
    draft = file.with_name(f".{secrets.token_hex(8)}.draft")
    try:
        file.parent.mkdir(mode=0o700, exist_ok=True)
        if not file.exists():
            with os.fdopen(os.open(draft, _NEW, 0o600), "w") as opened:
                opened.write(generate_new_authentication_token())
            # Another process may have made the file meanwhile; then its token is used.
            with contextlib.suppress(FileExistsError):
                os.link(draft, file)
            draft.unlink()
            raylet: Any = ray._raylet
            raylet.AuthenticationTokenLoader.instance().reset_cache()
    except OSError as error:
        raise ClusterError(
            f"Ray's token cannot be stored in {file} ({error.strerror}); set RAY_AUTH_TOKEN_PATH "
            "to a file that has one"
        ) from error
    close_token()


def close_token() -> None:
    """Make the token's file private, as `ray get-auth-token` lets other users read it."""
    file = token_file()
    try:
        opened = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return  # there is no file, or Ray will say why it cannot be read
    try:
        found = os.fstat(opened)
        if found.st_uid == os.geteuid() and found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            os.fchmod(opened, 0o600)
            log.warning(
                "%s had mode %04o, and has 0600 now: anyone who can read it controls every Ray of "
                "this user. If others may have read it, remove the file and restart every Ray",
                file,
                stat.S_IMODE(found.st_mode),
            )
    finally:
        os.close(opened)


def token_file() -> Path:
    """Return the file in which Ray keeps a user's token."""
    return Path.home() / ".ray" / "auth_token"
