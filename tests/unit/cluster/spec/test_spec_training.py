"""Which specs ask for training where it is not possible."""

from __future__ import annotations

import pytest

from moesaic.cluster.spec.spec import parse_spec
from moesaic.proto.errors import SpecError

MODEL = {"name": "m", "path": "demo", "train": True}


def test_a_model_is_trained_only_if_its_spec_says_so() -> None:
    assert parse_spec({"models": [MODEL]}).models[0].train
    assert not parse_spec({"models": [MODEL | {"train": False}]}).models[0].train


def test_a_folder_keeps_no_updates_of_trained_weights() -> None:
    with pytest.raises(SpecError, match=r"models\.0: updates: the folder cannot keep updates"):
        parse_spec({"models": [MODEL | {"updates": "/tmp/updates"}]})
