"""A trunk's side of a training step: forward calls as they are served, and their backward halves.

Which experts compute a row is data: a backward call has the ids and weights of its forward call,
and goes to hosts with the same versions. What it adds up counts for the attempt in which its
forward call was made.

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...cluster.expert_keys import ExpertKey, LayerKey
from ...cluster.routing.events import Send
from ...cluster.training.contributions import Attempt
from ...kernels.backward.accumulators import SumMemory
from ...models.trunk.trainable import check_trainable
from ...proto.errors import BadExpert, StepLost, describe_error
from ...proto.wire import wide
from ..router.backward import BackwardHalf
from ..router.layer_tensors import LayerTensors
from ..router.router import Router
from .lent_layers import KeptForward, LentLayers


@dataclass(slots=True)
class ForwardCall:
    """What names a forward call's gradients on the hosts, or what was kept of it here."""

    attempt: Attempt
    microbatch: int
    kept: KeptForward | None = None
    sent: bool = False  # its backward half is to be sent
    parts: Sequence[Send] = ()  # those whose hosts may have kept activations


class Learning:
    """The microbatches of one trunk, and the attempt at a step that they belong to."""

    def __init__(
        self,
        router: Router,
        model: str,
        dtype: torch.dtype,
        *,
        sums_limit_bytes: int | None = None,
    ) -> None:
        """Take the trunk's router, which has connections to the hosts of ``model``.

        ``dtype`` is that of the model's experts. ``sums_limit_bytes`` is how much memory their
        gradients may take here, where hosts lend them (None: a quarter of what is free).
        """
        self.router = router
        self.dtype = dtype
        # Called with a layer's number when the gradients of one of its calls were added up.
        self.learned: Callable[[int], None] = lambda _: None
        self._model = model
        # Hosts tell trunks that learn together apart by it, whoever has started them.
        self._worker = secrets.randbits(64)
        self._attempt: Attempt | None = None
        self._why = "no training step is under way; make a moesaic.PoolOptimizer of the model first"
        self._microbatch = 0
        # The next part's number by layer and microbatch; a layer may be called more than once.
        self._parts: Counter[tuple[int, int]] = Counter()
        self._tokens = Counter[int]()  # whose gradients were added up, by layer
        self._assignments: dict[int, Tensor] = {}  # int64, up to the largest id that was chosen
        self._lent = LentLayers(router, model, dtype, sums_limit_bytes)
        self._exact = False
        self._broken: str | None = None  # why gradients of the attempt may be missing

    @property
    def exact(self) -> bool:
        """Whether results and gradients have the same bits whichever hosts compute them.

        Then all calls are those of an exact model: hosts answer with a row for each assignment.
        Backward calls are sent, whatever hosts lend.
        """
        return self._exact

    @exact.setter
    def exact(self, exact: bool) -> None:
        self._exact = exact
        models = self.router.exact_models
        models.add(self._model) if exact else models.discard(self._model)

    def use(self, memory: SumMemory | None) -> None:
        """Forget what was added up here, and let the sums that follow lie in ``memory``."""
        self._lent.use(memory)

    def begin(self, attempt: Attempt) -> None:
        """Let what follows belong to an attempt that has begun on all hosts."""
        self._attempt = attempt
        self._microbatch = 0
        self._parts.clear()
        self._tokens.clear()
        self._assignments.clear()
        self._lent.clear()
        self._broken = None

    def end(self, why: str) -> None:
        """End the attempt: a forward pass that is to be learned from raises StepLost with why."""
        self._attempt, self._why = None, why

    @property
    def is_open(self) -> bool:
        """Whether forward passes can be learned from."""
        return self._attempt is not None

    @property
    def layers(self) -> frozenset[int]:
        """The layers whose gradients were added up in the attempt under way, or the last one."""
        return frozenset(self._tokens)

    @property
    def tokens(self) -> int:
        """The tokens of that attempt, as the layer counts them that had most."""
        return max(self._tokens.values(), default=0)

    def assignments(self, layer: int, experts: int) -> list[float]:
        """Return how many rows each of a layer's experts had, in all backward calls of the attempt.

        A layer that is computed again for its gradients counts once.
        """
        found = self._assignments.get(layer, torch.zeros(0)).tolist()
        return [*map(float, found), *[0.0] * (experts - len(found))]

    def take(self) -> Mapping[ExpertKey, dict[str, Tensor]]:
        """Return the gradients that were added up here, by expert and name, and forget them.

        They are those of the attempt under way, or the last one, as hosts have theirs: float32
        (float64 for such experts), in the model's shapes. Hosts have those of the calls that were
        sent; an expert may have both. Raises StepLost if an error ended the attempt.
        """
        if self._broken is not None:
            raise StepLost(self._broken)
        return self._lent.take()

    def watch(self, module: nn.Module) -> None:
        """Count each forward pass of a trunk as a microbatch.

        Raises UnsupportedModel for one that cannot be trained.
        """
        check_trainable(module)
        module.register_forward_pre_hook(lambda *_: self.begin_microbatch())

    def begin_microbatch(self) -> None:
        self._microbatch += 1

    def layer(self, number: int) -> LearningLayer:
        return LearningLayer(self, LayerKey(self._model, number))

    def forward_call(self) -> ForwardCall:
        """Name a forward call that is made now. Raises StepLost if no attempt is under way."""
        if self._attempt is None:
            raise StepLost(self._why)
        return ForwardCall(self._attempt, self._microbatch)

    def forward(
        self,
        key: LayerKey,
        call: ForwardCall | None,
        x_TH: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
    ) -> Tensor:
        """Return a layer's result; ``call`` keeps what its backward half needs, if it may."""
        if call is not None:
            found = None if self._exact else self._lent.forward(key, x_TH, ids_TK, weights_TK)
            if found is not None:
                out_TH, call.kept = found
                return out_TH
            call.sent = True
        if not self._exact:
            out_TH = self.router.compute_all(key, x_TH, ids_TK, weights_TK)
            if out_TH is not None:
                return out_TH
        sent = self.router.dispatch(key, x_TH, ids_TK, weights_TK, keep=call is not None)
        out_TH = sent.combine()
        if call is not None:
            call.parts = sent.kept
        return out_TH

    def backward(
        self,
        key: LayerKey,
        call: ForwardCall,
        x_TH: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        grad_y_TH: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of x and of the weights; those of the experts are added up.

        Hosts do that, or this process if they have lent all of the call's experts. Raises StepLost
        if a host does not answer any more, and BadExpert if gradients are not finite. After any
        error the attempt is over: a part of its gradients may be missing.
        """
        if call.attempt != self._attempt:
            raise StepLost(f"the forward pass belongs to {call.attempt}, which is over")
        given = x_TH, ids_TK, weights_TK, grad_y_TH
        self._tokens[key.layer] += len(x_TH)
        try:
            found = None if call.sent else self._lent.backward(key, call.kept, *given)
            if found is None:
                found = self._through_pool(key, call, *given)
            self._count(key.layer, ids_TK)
            self.learned(key.layer)
        except BaseException as error:
            self._broken = f"{call.attempt} is over ({describe_error(error)})"
            self.end(f"{self._broken}; call zero_grad() first")
            raise
        return found

    def _count(self, layer: int, ids_TK: Tensor) -> None:
        before = self._assignments.get(layer)
        least = 0 if before is None else len(before)
        ids = ids_TK.detach().flatten().cpu()
        # Some gates leave tokens out, whose ids are negative.
        counts = torch.bincount(ids[ids >= 0], minlength=least)
        if before is not None:
            counts[: len(before)] += before
        self._assignments[layer] = counts

    def _through_pool(
        self,
        key: LayerKey,
        call: ForwardCall,
        x_TH: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        grad_y_TH: Tensor,
    ) -> tuple[Tensor, Tensor]:
        place = key.layer, call.microbatch
        half = BackwardHalf(
            call.attempt,
            self._worker,
            call.microbatch,
            grad_y_TH.to(wide(x_TH.dtype)),
            ids_TK.numel(),
            first_part=self._parts[place],
            forward=call.parts,
        )
        router = self.router
        given = key, router.placement, x_TH, ids_TK, weights_TK
        tensors = LayerTensors(*given, half=half, exact=self._exact)
        outcome, parts = router.backward(tensors)
        self._parts[place] += parts
        if not outcome.ok:
            why = "did not answer in time" if outcome.error is None else outcome.error.message
            where = "" if outcome.error is None else f" on {outcome.error.host}"
            raise StepLost(f"the gradients of {tensors.names(outcome.lost)}{where} are lost: {why}")
        if tensors.bad_rows:
            names = ", ".join(str(key.expert(expert)) for expert in sorted(tensors.bad_rows))
            raise BadExpert(f"gradients of rows of {names} are not finite")
        return tensors.combine().to(x_TH), half.grad_weights(weights_TK)


class LearningLayer:
    """A `LearningPool`: one layer of a trunk."""

    def __init__(self, learning: Learning, key: LayerKey) -> None:
        self._learning = learning
        self._key = key

    @property
    def dtype(self) -> torch.dtype:
        return self._learning.dtype

    def begin(self) -> ForwardCall:
        return self._learning.forward_call()

    def forward(
        self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, call: object | None = None
    ) -> Tensor:
        assert call is None or isinstance(call, ForwardCall)
        return self._learning.forward(self._key, call, x_TH, ids_TK, weights_TK)

    def backward(
        self, call: object, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, grad_y_TH: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(call, ForwardCall)
        given = x_TH, ids_TK, weights_TK, grad_y_TH
        return self._learning.backward(self._key, call, *given)
