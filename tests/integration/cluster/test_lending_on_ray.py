"""A cluster whose hosts lend their experts to the trunk: texts, kills, updates."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil

from moesaic import Client
from tests.helpers.models.tiny import tiny_mixtral, tiny_text, tiny_tokenizer
from tests.helpers.pool.transports import settles
from tests.helpers.processes.keepers import keepers
from tests.helpers.processes.live import (
    ON_RAY,
    TEXT,
    processes_of,
    running,
    text_in_background,
    text_of,
    wait_replaced,
)

pytestmark = ON_RAY

TOKENS = 400


def test_texts_are_those_of_calls_that_are_sent(tmp_path: Path) -> None:
    tiny_mixtral().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    wanted = tiny_text(TEXT, TOKENS)
    # With one replica of each expert, only the killed host's successor can serve its experts.
    served = {"name": "m", "path": str(tmp_path), "replicas": 1, "dtype": "float32"}
    with (
        running("lend", tmp_path, models=[served], network={"lending": "always"}) as cluster,
        Client(cluster.url or "") as client,
    ):
        assert text_of(client, "m", TOKENS) == wanted
        before = processes_of(cluster)
        (router,) = cluster.status().routers
        assert {path.host: path.lent for path in router.paths} == {"host-0": True, "host-1": True}
        with text_in_background(client, "m", TOKENS) as result:
            os.kill(before["host-0"].pid, signal.SIGKILL)
            assert result() == wanted
        wait_replaced(cluster, "host-0", before["host-0"].pid)
        assert text_of(client, "m", TOKENS) == wanted
        # Nearly nothing was sent: calls of the first moments, before hosts had lent.
        after = processes_of(cluster)
        assert sum(process.rows for process in after.values()) < TOKENS
        assert after["host-0"].adopted_replicas == before["host-0"].replicas
        assert after["host-1"].adopted_replicas == 0
        (keeper,) = keepers(psutil.Process(after["host-0"].pid).ppid())
    assert settles(lambda: not keeper.is_running())
