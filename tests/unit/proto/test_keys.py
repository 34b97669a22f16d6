"""The cluster's secret: it shows nowhere, and what is derived from it opens one door."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.proto.keys import (
    SECRET_BYTES,
    ClusterSecret,
    Plane,
    proof_hash,
    reply_hash,
    same_key,
    secret_of_process,
    target,
)

VALUE = bytes(range(SECRET_BYTES))
PLANES: tuple[Plane, ...] = ("experts", "weights", "shm")
KEY = ("m", 1, 2)


def test_it_shows_in_no_text(caplog: pytest.LogCaptureFixture) -> None:
    secret = ClusterSecret(VALUE)
    with caplog.at_level(logging.INFO):
        logging.getLogger("moesaic").info("%s %r", secret, {"secret": secret})
    told = f"{secret} {secret!r} {[secret]} {caplog.text}"
    assert "ClusterSecret(...)" in told
    assert VALUE.hex() not in told
    assert repr(VALUE)[2:-1] not in told
    assert secret.router_key not in told
    assert secret.operator_key not in told
    assert not hasattr(secret, "__dict__")


def test_it_gets_into_no_argument() -> None:
    for pickled in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickled(ClusterSecret(VALUE))


def test_every_secret_is_another() -> None:
    assert ClusterSecret.new().reveal() != ClusterSecret.new().reveal()
    assert secret_of_process() is secret_of_process()
    assert ClusterSecret(VALUE).reveal() == VALUE
    with pytest.raises(ValueError, match="has 32 bytes, not 3"):
        ClusterSecret(b"abc")


def test_a_proof_opens_one_service_of_one_incarnation() -> None:
    secret = ClusterSecret(VALUE)
    proof = secret.proof("experts", target("host-0", 7))
    assert secret.proves(proof, "experts", target("host-0", 7))
    assert not secret.proves(proof, "weights", target("host-0", 7))
    assert not secret.proves(proof, "experts", target("host-0", 8))
    assert not secret.proves(proof, "experts", target("host-1", 7))
    assert not ClusterSecret.new().proves(proof, "experts", target("host-0", 7))
    for other in (b"", proof[:-1], proof + b"\0", VALUE):
        assert not secret.proves(other, "experts", target("host-0", 7))


def test_a_grant_is_for_one_expert_under_one_term() -> None:
    secret = ClusterSecret(VALUE)
    grant = secret.grant("host-0", 7, KEY, 1, 5)
    assert secret.grants(grant, "host-0", 7, KEY, 1, 5)
    assert not secret.grants(grant, "host-1", 7, KEY, 1, 5)
    assert not secret.grants(grant, "host-0", 8, KEY, 1, 5)
    assert not secret.grants(grant, "host-0", 7, ("m", 1, 3), 1, 5)
    assert not secret.grants(grant, "host-0", 7, KEY, 2, 5)
    assert not secret.grants(grant, "host-0", 7, KEY, 1, 6)


def test_nothing_derived_is_another_derived() -> None:
    secret = ClusterSecret(VALUE)
    place = target("h", 1)
    derived = [secret.proof(plane, place) for plane in PLANES]
    derived += [made(proof) for proof in derived for made in (proof_hash, reply_hash)]
    derived += [secret.grant("h", 1, KEY, 1, 1), VALUE]
    derived += [bytes.fromhex(key) for key in (secret.router_key, secret.operator_key)]
    assert len(set(derived)) == len(derived)


@given(st.tuples(st.text(), st.text()), st.tuples(st.text(), st.text()))
def test_no_two_hosts_and_models_are_taken_for_one(
    one: tuple[str, str], other: tuple[str, str]
) -> None:
    """Names that run into each other: ("a", "bc") and ("ab", "c")."""
    secret = ClusterSecret(VALUE)

    def grant(host: str, model: str) -> bytes:
        return secret.grant(host, 1, (model, 0, 0), 1, 1)

    assert (grant(*one) == grant(*other)) == (one == other)


def test_keys_are_compared_whole() -> None:
    assert same_key("größe", "größe")
    assert not same_key("key", "key2")
    assert not same_key("", "key")
