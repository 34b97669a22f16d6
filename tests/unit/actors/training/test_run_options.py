"""Which processes train together, as arguments and the environment say."""

from __future__ import annotations

import pytest
import torch

from moesaic.actors.training.run_options import ALONE, Crew, crew_of
from moesaic.proto.errors import BadInput


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("rank", "size", "workers", "expected"),
    [
        (None, None, None, ALONE),
        (None, None, 3, Crew(3, None)),
        ("2", "4", None, Crew(4, "worker-0002")),
        ("0", "1", None, ALONE),
        ("2", "4", 1, ALONE),
        ("2", "4", 3, Crew(3, "worker-0002")),
    ],
)
def test_the_environment_is_asked(
    rank: str | None,
    size: str | None,
    workers: int | None,
    expected: Crew,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", size)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert crew_of(workers) == expected


def test_a_process_group_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert crew_of(None) == Crew(2, "worker-0001")


def test_what_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="workers: 0: it must be 1 or more"):
        crew_of(0)
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(BadInput, match="WORLD_SIZE: 'many' must be a whole number"):
        crew_of(None)
