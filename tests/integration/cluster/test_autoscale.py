"""A load that keeps hosts busy brings a host by itself, and the host goes when the load ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesaic import Client
from moesaic.cluster.reports.scaling import ScalingReport
from moesaic.handle import Cluster
from tests.helpers.processes.live import (
    ON_RAY,
    asking,
    hosts_of,
    processes_of,
    running,
    text_of,
    wait_until,
)
from tests.integration.conftest import save_model

MODEL = "m"
TOKENS = 16

pytestmark = ON_RAY


def scalings(cluster: Cluster) -> list[ScalingReport]:
    return cluster.status().scaling.recent


@pytest.mark.slow
def test_hosts_come_and_go_with_the_load(tmp_path: Path) -> None:
    with (
        running(
            "autoscale",
            save_model(tmp_path, "mixtral"),
            hosts=[
                {
                    "count": 1,
                    "min_count": 1,
                    "max_count": 2,
                    # So slow that waiting for hosts is most of what requests do, on a busy
                    # machine too.
                    "emulate": {"call_us": 40_000},
                }
            ],
            balance={"lease_s": 2},
            autoscale={
                "scale_up_above": 0.4,
                "scale_down_below": 0.1,
                "up_after_s": 2,
                "down_after_s": 2,
                "cooldown_s": 2,
            },
        ) as cluster,
        Client(cluster.url or "") as client,
    ):
        wanted = text_of(client, MODEL, TOKENS)
        with asking(client, MODEL, TOKENS, wanted) as wrong:
            # The new host comes, and is put to use.
            wait_until(
                lambda: [one.rows > 0 for one in processes_of(cluster).values()] == [True] * 2
            )
        assert wrong == []
        grown = scalings(cluster)[0]
        assert (grown.initiator, grown.hosts_before, grown.target_hosts) == ("autoscaler", 1, 2)
        assert grown.arriving_hosts == ["host-1"]
        assert "busy, above 40%" in grown.reason
        # Nobody asks any more.
        wait_until(lambda: len(hosts_of(cluster)) == 1)
        wait_until(lambda: scalings(cluster)[-1].phase == "done")
        shrunk = scalings(cluster)[-1]
        assert (shrunk.initiator, shrunk.hosts_before, shrunk.target_hosts) == ("autoscaler", 2, 1)
        assert {"host-0", "host-1"} - set(shrunk.leaving_hosts) == hosts_of(cluster).keys()
        assert "busy, below 10%" in shrunk.reason
        assert text_of(client, MODEL, TOKENS) == wanted
