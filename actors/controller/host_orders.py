"""What the controller lets its hosts do: load experts, evict them, and forget training runs."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping

from ray.exceptions import RayError, RayTaskError

from ...cluster.control.commands import EndRun, Evict
from ...cluster.control.control import Control
from ...cluster.control.loading import LoadExperts
from ...cluster.expert_keys import ExpertVersion
from ...cluster.metrics.snapshot import LoadCounts
from ...cluster.placement import ModelRef, ModelShape
from ...cluster.training.orders import CloseRun
from ...proto.errors import MoesaicError, Superseded, describe_error
from .host_actors import HostActors

log = logging.getLogger(__name__)

# Time limit for what a host does at once.
ORDER_TIMEOUT_S = 2.0
# Time limit for one load command. A host that hangs is asked again, and `status` shows the error.
LOAD_TIMEOUT_S = 600.0


class HostOrders:
    """The orders under way, at most one of each kind for each host."""

    def __init__(
        self,
        *,
        control: Control,
        hosts: HostActors,
        models: Mapping[str, tuple[ModelRef, ModelShape]],
        term: int,
        changed: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Send no order yet; ``changed`` is called when an order to a host begins or ends."""
        self._control = control
        self._hosts = hosts
        self._models = models
        self._term = term
        self._changed = changed
        self._clock = clock
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._evicts: dict[str, tuple[Evict, asyncio.Task[None]]] = {}
        self._ends: dict[str, asyncio.Task[None]] = {}
        self._forgets: dict[str, asyncio.Task[None]] = {}
        self._evictions: dict[str, int] = defaultdict(int)  # count of ended ones, by host
        self.loads: dict[str, LoadCounts] = defaultdict(LoadCounts)  # by model

    def start(self, command: LoadExperts | Evict | EndRun) -> None:
        """Carry a command out, unless the host has one of its kind already."""
        host, loop = command.host, asyncio.get_running_loop()
        match command:
            case LoadExperts():
                if host in self._loads:
                    return
                self._loads[host] = loop.create_task(self._load(command))
            case Evict():
                if host in self._evicts:
                    return
                self._evicts[host] = command, loop.create_task(self._evict(command))
            case EndRun():
                if host in self._ends:
                    return
                self._ends[host] = loop.create_task(self._end_run(command))
        self._changed(host)

    def forget_model(self, host: str, ref: ModelRef) -> None:
        """Let a host forget a model and all its experts; no router may need them any more."""
        if host not in self._forgets:
            loop = asyncio.get_running_loop()
            self._forgets[host] = loop.create_task(self._forget_model(host, ref))

    def moves_experts(self, host: str) -> bool:
        """Return whether the host is loading or evicting experts."""
        return host in self._loads or host in self._evicts

    def evicting(self, host: str) -> tuple[ExpertVersion, ...]:
        """Return what the host is evicting."""
        return self._evicts[host][0].weights if host in self._evicts else ()

    def evictions(self, host: str) -> int:
        """Return how many evictions of the host have ended."""
        return self._evictions[host]

    def cause(self, failure: Exception) -> Exception:
        """Return the error that a host raised; end this process if a newer controller rules."""
        cause = getattr(failure, "cause", failure)
        if isinstance(cause, Superseded):
            log.critical("controller of term %d: %s; the process ends", self._term, cause)
            os._exit(1)
        return cause

    # ---- each kind ------------------------------------------------------------------------------

    async def _load(self, command: LoadExperts) -> None:
        host = command.host
        refs = [self._models[name] for name in sorted({key.model for key, _ in command.weights})]
        error = ""
        try:
            asked = self._hosts.handle(host).load.remote(
                refs, command.weights, dict(command.peers), term=self._term
            )
            await asyncio.wait_for(asked, LOAD_TIMEOUT_S)
            self._hosts.errors.pop(host, None)
            self._count(command, failed=False)
        except (RayTaskError, MoesaicError) as failure:
            cause = self.cause(failure)
            error = self._hosts.errors[host] = describe_error(cause)
            log.warning("host %s cannot load experts: %s", host, error, extra={"host": host})
        except TimeoutError:
            error = self._hosts.errors[host] = (
                f"loading experts took more than {LOAD_TIMEOUT_S:g} s"
            )
            log.warning("host %s: %s", host, error, extra={"host": host})
        except (RayError, ValueError) as failure:
            log.info("host %s ended while it was loading: %s", host, failure, extra={"host": host})
        finally:
            del self._loads[host]
            self._changed(host)
        if error:
            self._count(command, failed=True)
            self._control.load_failed(host, command.weights, error, self._clock())

    def _count(self, command: LoadExperts, *, failed: bool) -> None:
        for key, _ in command.weights:
            if (known := self._models.get(key.model)) is not None:  # it was not removed meanwhile
                self.loads[key.model].count(known[1].expert_bytes, failed=failed)

    async def _evict(self, command: Evict) -> None:
        host = command.host
        try:
            order = command.weights, self._term, self._evictions[host] + 1
            asked = self._hosts.handle(host).release.remote(*order)
            await asyncio.wait_for(asked, ORDER_TIMEOUT_S)
        except (RayTaskError, MoesaicError) as failure:
            cause = self.cause(failure)
            self._hosts.errors[host] = describe_error(cause)
            log.warning("host %s refuses to evict experts: %s", host, cause, extra={"host": host})
        except (RayError, ValueError, TimeoutError) as failure:
            # The host's next report says what it still holds; that is evicted again.
            log.info("host %s has not evicted experts: %s", host, failure, extra={"host": host})
        finally:
            self._evictions[host] += 1
            del self._evicts[host]
            self._changed(host)

    async def _forget_model(self, host: str, ref: ModelRef) -> None:
        try:
            asked = self._hosts.handle(host).forget_model.remote(ref, term=self._term)
            await asyncio.wait_for(asked, ORDER_TIMEOUT_S)
        except (RayTaskError, MoesaicError) as failure:
            self._hosts.errors[host] = describe_error(self.cause(failure))
        except (RayError, ValueError, TimeoutError) as failure:
            # If it still knows the model, its next report says so, and it is told again.
            text = "host %s has not forgotten model %s: %s"
            log.info(text, host, ref.name, failure, extra={"host": host})
        finally:
            del self._forgets[host]
            self._changed(host)

    async def _end_run(self, command: EndRun) -> None:
        host = command.host
        try:
            asked = self._hosts.handle(host).train.remote(CloseRun(run=command.run))
            await asyncio.wait_for(asked, ORDER_TIMEOUT_S)
        except (RayError, MoesaicError, ValueError, TimeoutError) as failure:
            # It may know a newer run by now. If it still knows this one, its next report says so.
            log.info(
                "host %s does not forget run %d: %s",
                host,
                command.run,
                failure,
                extra={"host": host},
            )
        finally:
            del self._ends[host]
            self._changed(host)
