"""A controller that cannot reach some hosts' listeners, as behind a firewall.

`MOESAIC_TEST_UNREACHED` names a folder, and a file there a host that is not reached.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from moesaic.actors.controller import controller
from moesaic.actors.controller.host_probing import ProbeHost
from moesaic.cluster.host_answers import HostAnswers
from moesaic.cluster.placement import HostEntry
from moesaic.proto.errors import HostLost

UNREACHED = "MOESAIC_TEST_UNREACHED"

_prober = controller.prober


def _walled(hosts: Any, namespace: str) -> ProbeHost:
    ask = _prober(hosts, namespace)

    async def walled(entry: HostEntry) -> HostAnswers:
        if Path(os.environ[UNREACHED], entry.host).exists():
            raise HostLost(f"{entry.grpc_address}: no route")
        return await ask(entry)

    return walled


class WalledController(controller.Controller):
    def __init__(self, namespace: str) -> None:
        controller.prober = _walled
        super().__init__(namespace)
