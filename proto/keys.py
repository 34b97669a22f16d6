"""The cluster's secret, and the proofs, grants and keys that are derived from it.

The secret opens every service of the cluster, so it is sent over no connection. Only derived values
are sent, each for one purpose and one peer: a proof is valid for one service of one incarnation of
one host, a grant for one expert there. So whoever learns one, for example an impostor at the port
of a host that died, can open nothing else with it.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import secrets
from typing import Final, Literal, NamedTuple, NoReturn

SECRET_BYTES: Final = 32
# The service that a connection is for.
Plane = Literal["experts", "weights", "health", "shm", "bulk"]


def target(host: str, incarnation: int) -> str:
    """Return the name of a proof's peer, which is one start of one host."""
    return f"{host}@{incarnation}"


class ClusterSecret:
    """32 random bytes that only the processes of one cluster know.

    It appears in no text and cannot be pickled, so that it cannot get into arguments, logs and
    reports. Processes of a cluster read it from Ray's key-value store.
    """

    __slots__ = ("__value",)

    def __init__(self, value: bytes) -> None:
        """Take the bytes. Raises ValueError when there are not `SECRET_BYTES`."""
        if len(value) != SECRET_BYTES:
            raise ValueError(f"a cluster's secret has {SECRET_BYTES} bytes, not {len(value)}")
        self.__value = value

    @classmethod
    def new(cls) -> ClusterSecret:
        return cls(secrets.token_bytes(SECRET_BYTES))

    def reveal(self) -> bytes:
        """Return the secret itself, for the store from which the cluster's processes read it."""
        return self.__value

    def proof(self, plane: Plane, target: str) -> bytes:
        """Return the proof that opens the service ``plane`` of ``target`` (see `target`)."""
        return self._derive("proof", plane, target)

    def proves(self, given: bytes, plane: Plane, target: str) -> bool:
        """Return whether ``given`` is the `proof`."""
        return hmac.compare_digest(given, self.proof(plane, target))

    @property
    def router_key(self) -> str:
        """The key of the router service, which opens nothing else. Printable, without spaces."""
        return self._derive("router").hex()

    @property
    def operator_key(self) -> str:
        """The key of the page's actions, which opens nothing else. Printable, without spaces."""
        return self._derive("operator").hex()

    def keeper_address(self, node: str) -> str:
        """Return the abstract Unix address of a node's memory keeper."""
        return f"moesaic-keeper-{self._derive('keeper', node).hex()[:32]}"

    def grant(
        self, host: str, incarnation: int, key: tuple[str, int, int], version: int, term: int
    ) -> bytes:
        """Return the controller's permission to write one expert into a host's memory.

        It is for ``version`` of ``key`` (model, layer, expert), one incarnation of the host, and
        the controller's term.
        """
        model, layer, expert = key
        place = target(host, incarnation)
        return self._derive("grant", place, model, f"{layer}/{expert}/{version}/{term}")

    def grants(
        self,
        given: bytes,
        host: str,
        incarnation: int,
        key: tuple[str, int, int],
        version: int,
        term: int,
    ) -> bool:
        """Return whether ``given`` is the `grant`."""
        return hmac.compare_digest(given, self.grant(host, incarnation, key, version, term))

    def _derive(self, *parts: str) -> bytes:
        """Compute HMAC-SHA256 over the parts, each after its length, so that they stay distinct."""
        told = hmac.new(self.__value, digestmod=hashlib.sha256)
        for part in parts:
            data = part.encode()
            told.update(len(data).to_bytes(8, "big") + data)
        return told.digest()

    def __repr__(self) -> str:
        return "ClusterSecret(...)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a cluster's secret cannot be pickled; read it from Ray's key-value store")


def proof_hash(proof: bytes) -> bytes:
    """Return the hash of a proof that a client shows over a network, instead of the proof."""
    return hmac.digest(proof, b"shown", "sha256")


def reply_hash(proof: bytes) -> bytes:
    """Return the hash that the host replies with; who sees only `proof_hash` cannot."""
    return hmac.digest(proof, b"answer", "sha256")


@functools.cache
def secret_of_process() -> ClusterSecret:
    """Return the secret of hosts and routers that are made in one process without a cluster."""
    return ClusterSecret.new()


def same_key(given: str, wanted: str) -> bool:
    """Return whether a client's key is right, in a time that depends on neither key."""
    return hmac.compare_digest(*(key.encode(errors="surrogatepass") for key in (given, wanted)))


class Grant(NamedTuple):
    """Permission of the controller of ``term`` to write one expert into one host's memory."""

    term: int
    proof: bytes  # `ClusterSecret.grant`
