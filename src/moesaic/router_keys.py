"""The key of a router service: where `up` takes it from, and where `connect` finds it.

Like all of the client it imports neither Ray nor torch; and where this user has no cluster on this
machine, nothing beyond the standard library.
"""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from .places import session_dir
from .proto.errors import ClusterError, Unauthenticated

VARIABLE = "MOESAIC_ROUTER_KEY"
_LEAST, _MOST = 16, 512  # characters
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_ANY = frozenset({"0.0.0.0", "::"})

# What stood in this process's environment before `take_key` removed it.
_taken: str | None = None


def take_key() -> str | None:
    """The key that the environment names, which has none afterwards: processes that this one starts
    would inherit it. Raises ClusterError when it cannot be sent or could be guessed."""
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
    """What the service at ``address`` (host:port) asks for: by the session file of a cluster of
    this machine, or else by the environment. Raises Unauthenticated when neither has it."""
    key = _announced(address) or os.environ.get(VARIABLE) or _taken
    if key is None:
        raise Unauthenticated(
            f"{VARIABLE}: it is not set, and no cluster of this user on this machine has a router "
            f"service at {address}; the key of one elsewhere is in the session file there"
        )
    return key


def _announced(address: str) -> str | None:
    """The key of a cluster of this machine."""
    if not any(session_dir().glob("*.json")):
        return None
    from .session import running_sessions

    for session in running_sessions():
        if session.router is not None and _same(session.router, address):
            return session.router_key
    return None


def _same(listens: str, asked: str) -> bool:
    """Whether who listens at the one address is reached by the other."""
    one, other = urlsplit(f"//{listens}"), urlsplit(f"//{asked}")
    if one.port != other.port:
        return False
    names = one.hostname, other.hostname
    return names[0] == names[1] or (names[0] in _LOOPBACK | _ANY and names[1] in _LOOPBACK)
