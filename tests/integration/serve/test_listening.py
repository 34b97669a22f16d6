"""What listens where is what docs/security.md says, and no replica of Serve listens elsewhere."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

from moesaic import Client
from tests.helpers.processes.listening import documented, listening
from tests.helpers.processes.live import ON_RAY, running, text_of, wait_until
from tests.integration.conftest import save_model

pytestmark = ON_RAY


def test_one_machine(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "mixtral")
    owner = psutil.Process()
    before = listening([owner])
    with (
        running("listens", model, hosts=[{"count": 2}], router={"port": 0}) as cluster,
        Client(cluster.url or "") as client,
    ):
        assert text_of(client, "m", 3)

        def found() -> set[tuple[str, str]]:
            return listening([owner, *owner.children(recursive=True)]) - before

        # Ray's dashboard may begin to listen after the cluster answers.
        with contextlib.suppress(AssertionError):
            wait_until(lambda: found() >= documented("one machine"), 30.0)
        assert found() == documented("one machine")
        assert {where for _, where in found()} == {"loopback"}
