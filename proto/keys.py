"""The cluster's secret, and what is derived from it.

Whoever has the secret opens every door of the cluster, so it goes over no connection. What does is
derived from it, each for one purpose and one peer: a proof is good for one service of one
incarnation of one host, a grant for one expert there. Whoever hears one, an impostor at the port of
a host that died among them, can open nothing else with it.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import secrets
from typing import Final, Literal, NamedTuple, NoReturn

SECRET_BYTES: Final = 32
# What a connection is for.
Plane = Literal["experts", "weights", "shm"]


def target(host: str, incarnation: int) -> str:
    """Who is meant by a proof: one start of one host."""
    return f"{host}@{incarnation}"


class ClusterSecret:
    """32 random bytes that everybody in one cluster knows, and nobody else.

    It shows in no text and cannot be pickled: that is how it would get into arguments, logs and
    reports. Processes of a cluster find it in Ray's key-value store.
    """

    __slots__ = ("__value",)

    def __init__(self, value: bytes) -> None:
        """Raises ValueError when there are not `SECRET_BYTES`."""
        if len(value) != SECRET_BYTES:
            raise ValueError(f"a cluster's secret has {SECRET_BYTES} bytes, not {len(value)}")
        self.__value = value

    @classmethod
    def new(cls) -> ClusterSecret:
        return cls(secrets.token_bytes(SECRET_BYTES))

    def reveal(self) -> bytes:
        """The secret itself, for the store that processes of the cluster read it from."""
        return self.__value

    def proof(self, plane: Plane, target: str) -> bytes:
        """What opens the service ``plane`` of ``target``, see `target`."""
        return self._derive("proof", plane, target)

    def proves(self, given: bytes, plane: Plane, target: str) -> bool:
        """Whether ``given`` is the `proof`."""
        return hmac.compare_digest(given, self.proof(plane, target))

    @property
    def router_key(self) -> str:
        """What opens the router service, and nothing else. Printable, without spaces."""
        return self._derive("router").hex()

    def grant(
        self, host: str, incarnation: int, key: tuple[str, int, int], version: int, term: int
    ) -> bytes:
        """The controller's leave to put ``version`` of an expert (model, layer, expert) into the
        memory of one incarnation of a host, under the controller's term."""
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
        """Whether ``given`` is the `grant`."""
        return hmac.compare_digest(given, self.grant(host, incarnation, key, version, term))

    def _derive(self, *parts: str) -> bytes:
        """HMAC-SHA256 over parts that do not run into each other: each has its length in front."""
        told = hmac.new(self.__value, digestmod=hashlib.sha256)
        for part in parts:
            data = part.encode()
            told.update(len(data).to_bytes(8, "big") + data)
        return told.digest()

    def __repr__(self) -> str:
        return "ClusterSecret(...)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a cluster's secret is not pickled: it is read from Ray's key-value store")


def shown(proof: bytes) -> bytes:
    """What who connects over a network shows of a proof, which itself stays unsaid."""
    return hmac.digest(proof, b"shown", "sha256")


def answer(proof: bytes) -> bytes:
    """What who is meant answers, so that an impostor, who hears no more than `shown`, cannot."""
    return hmac.digest(proof, b"answer", "sha256")


@functools.cache
def secret_of_process() -> ClusterSecret:
    """For hosts and routers that are made in one process, without a cluster."""
    return ClusterSecret.new()


def same_key(given: str, wanted: str) -> bool:
    """Whether a client's key is the right one; the time that it takes tells nothing of either."""
    return hmac.compare_digest(*(key.encode(errors="surrogatepass") for key in (given, wanted)))


class Grant(NamedTuple):
    """The leave of the controller of ``term`` to put one expert into one host's memory."""

    term: int
    proof: bytes  # `ClusterSecret.grant`
