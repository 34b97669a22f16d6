"""The key of a router service: where `up` takes it from, and where `connect` finds it.

Like the rest of the client, this module imports neither Ray nor torch.
"""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from ..proto.errors import ClusterError, Unauthenticated
from ..session import running_sessions

VARIABLE = "MOESAIC_ROUTER_KEY"
_LEAST, _MOST = 16, 512  # characters
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_ANY = frozenset({"0.0.0.0", "::"})

# The key from this process's environment, which `take_key` removed there.
_taken: str | None = None


def take_key() -> str | None:
    """Take the key out of the environment, so that processes started later do not inherit it.

    Raises ClusterError when the key cannot be sent or could be guessed.
    """
    global _taken
    key = os.environ.pop(VARIABLE, None)
    if not key:
        return None
    if not (_LEAST <= len(key) <= _MOST and all("!" <= char <= "~" for char in key)):
        raise ClusterError(
            f"{VARIABLE}: a key has {_LEAST} to {_MOST} characters, visible ASCII without spaces "
            f"(this has {len(key)}, and is not shown); `openssl rand -hex 32` makes one"
        )
    _taken = key
    return key


def key_for(address: str) -> str:
    """Return the key of the service at ``address`` (host:port).

    It comes from the session file of a cluster on this machine, or else from the environment.
    Raises Unauthenticated when neither has it.
    """
    for session in running_sessions():
        if session.router is not None and session.router_key and _same(session.router, address):
            return session.router_key
    key = os.environ.get(VARIABLE) or _taken
    if key is None:
        raise Unauthenticated(
            f"{VARIABLE} is not set, and no cluster of this user on this machine has a router "
            f"service at {address}. Set {VARIABLE} to that service's key, which is in the session "
            "file on the machine that started its cluster"
        )
    return key


def _same(listens: str, asked: str) -> bool:
    """Return whether a connection to ``asked`` reaches a server that listens at ``listens``."""
    one, other = urlsplit(f"//{listens}"), urlsplit(f"//{asked}")
    if one.port != other.port:
        return False
    names = one.hostname, other.hostname
    return names[0] == names[1] or (names[0] in _LOOPBACK | _ANY and names[1] in _LOOPBACK)
