"""Requests inside vLLM: their ids there and here, their parameters, and the rows of each.

Only the thread that steps vLLM uses this.
"""

from __future__ import annotations

# vLLM is optional.
# pyright: reportMissingImports=false
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Any, Protocol

from torch import Tensor

from ....cluster.routing.expert_options import RowGroups
from ....cluster.tracing.layers import StepTrace
from ....proto.errors import InternalError, Interrupted, MoesaicError
from ...router.whole_calls import PassCheck
from ...text.answer_form import AnswerForm
from ..engine import Delta, Sampling, TokenLogprob
from ..sampling import seed_at
from ..step_log import log_step
from ..streams import Streams


class PassRouter(Protocol):
    """A router, for the forward passes of an engine."""

    def begin_step(self, check: PassCheck = ...) -> None: ...

    def step_is_sound(self, result: Tensor | None = None) -> bool: ...

    def repeating(self) -> AbstractContextManager[None]: ...

    def end_step(self) -> None: ...


class Requests:
    """A `RowOwner`: tells a router which requests own the rows of the running forward pass."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self.faults: dict[str, MoesaicError] = {}  # of this step, by our id of the request
        self._ours: dict[str, str] = {}  # vLLM's id -> ours
        self._theirs: dict[str, str] = {}  # our id -> vLLM's
        self._rows: Mapping[str, int] | None = None  # rows by vLLM's id, while a forward pass runs
        self._input_batch: Any = None

    def watch(self, runner: Any, router: PassRouter, *, may_repeat: bool) -> None:
        """Note the rows of each request before each forward pass of vLLM's model runner.

        The passes are passes of the router. ``may_repeat``: running one twice does no harm.
        """
        execute, forward = runner.execute_model, runner._model_forward
        check = PassCheck.RESULT if may_repeat else PassCheck.CALLS

        def watched(scheduled: Any, *arguments: Any, **named: Any) -> Any:
            self._rows = scheduled.num_scheduled_tokens
            try:
                router.begin_step(check)
                return execute(scheduled, *arguments, **named)
            finally:
                self._rows = None
                router.end_step()

        def checked(*arguments: Any, **named: Any) -> Any:
            out = forward(*arguments, **named)
            if self._rows is None or router.step_is_sound(_states(out, sum(self._rows.values()))):
                return out
            with router.repeating(), _without_graphs():
                return forward(*arguments, **named)

        self._input_batch = runner.input_batch
        runner.execute_model, runner._model_forward = watched, checked

    @property
    def in_forward(self) -> bool:
        return self._rows is not None

    def added(self, key: str, theirs: str) -> None:
        self._ours[theirs], self._theirs[key] = key, theirs

    def ended(self, keys: Sequence[str]) -> list[str]:
        """Forget requests; return vLLM's ids of those that it still has."""
        names = [self._theirs.pop(key) for key in keys if key in self._theirs]
        for name in names:
            del self._ours[name]
        return names

    def deltas(self, outputs: Sequence[Any]) -> dict[str, Delta]:
        """Return a step's tokens by our ids, without requests that have a fault."""
        found = {}
        for output in outputs:
            key = output.request_id
            if key in self._theirs and key not in self.faults:
                found[key] = _delta(output.outputs[0], self._streams, key)
                if output.finished:
                    self.ended([key])
        return found

    # ---- rows -----------------------------------------------------------------------------------

    def fail_rows(self, rows: Sequence[int], error: MoesaicError) -> None:
        """Fail the requests that own ``rows``; the first error of a request counts."""
        for _, key in self._owners(rows):
            self.faults.setdefault(key, error)

    def row_groups(self) -> RowGroups | None:
        if self._rows is None or not self._streams.some_expert_options:
            return None
        return [(rows, self._streams.expert_options(key)) for key, rows in self._groups()]

    def drop_rows(self, dropped: Mapping[int, float]) -> None:
        for row, key in self._owners(sorted(dropped)):
            self._streams.drop(key, dropped[row])

    def log_step(self, router: str, step: int) -> StepTrace | None:
        # vLLM orders its batch only after the pass has begun, so these have no order yet.
        rows = self._rows
        if rows is None:
            return None
        return log_step(router, step, lambda: [self._ours.get(name, name) for name in rows])

    def _groups(self) -> list[tuple[str, int]]:
        """Return (request, number of rows) in the order of the batch's rows."""
        if self._rows is None:
            raise InternalError("a row was reported outside of a forward pass of the model")
        names = self._input_batch.req_ids
        return [(self._ours.get(name, ""), self._rows[name]) for name in names]

    def _owners(self, rows: Sequence[int]) -> Iterator[tuple[int, str]]:
        groups = self._groups()
        ends = list(accumulate(count for _, count in groups))
        for row in rows:
            owner = bisect_right(ends, row)
            if owner < len(groups):
                yield row, groups[owner][0]


def going_on(sampling: Sampling, generated: Sequence[int]) -> Sampling:
    """Return the sampling for the rest of a request that has ``generated`` some tokens.

    vLLM keeps no state of requests that leave it, and takes these tokens for a part of the prompt.
    So a seed is replaced by that of the next position, and the frequency penalty of these tokens
    becomes a bias. Raises Interrupted where vLLM cannot continue the answer as it was asked for.
    """
    if not generated:
        return sampling
    if sampling.form is not None:
        # Its grammar would start again after the half of the answer that was given.
        raise Interrupted(
            "vLLM cannot continue an answer that must follow a JSON schema, or has strict or "
            "forced tool calls; send the request again"
        )
    # A bias would count twice with a presence penalty, which counts each token once, and would come
    # before a repetition penalty, which is a factor.
    if sampling.presence_penalty or (
        sampling.frequency_penalty and sampling.repetition_penalty != 1
    ):
        raise Interrupted(
            "vLLM cannot continue an answer with a presence penalty, or with both a frequency and "
            "a repetition penalty; send the request again"
        )
    bias = dict(sampling.logit_bias)
    if sampling.frequency_penalty:
        for token, count in Counter(generated).items():
            bias[token] = bias.get(token, 0.0) - sampling.frequency_penalty * count
    seed = None if sampling.seed is None else seed_at(sampling.seed, len(generated))
    return replace(
        sampling,
        max_tokens=sampling.max_tokens - len(generated),
        seed=seed,
        logit_bias=tuple(bias.items()),
    )


def structure(form: AnswerForm, text: Callable[[AnswerForm], str]) -> dict[str, str]:
    """Return vLLM's structured output for an answer's form, by the name of its parameter.

    ``text`` returns the grammar of a form that is more than a schema; vLLM's guidance backend
    takes Lark.
    """
    if form.schema_alone is not None:
        return {"json": form.schema_alone}
    return {"grammar": text(form)}


def parameters(
    sampling: Sampling,
    eos_token_ids: Sequence[int],
    grammar: Callable[[AnswerForm], str] | None = None,
) -> Any:
    """Return the request's parameters for vLLM.

    ``grammar`` makes the grammar of a form; it is needed where `Sampling.form` is set.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    structured = None
    if sampling.form is not None:
        assert grammar is not None
        structured = StructuredOutputsParams(**structure(sampling.form, grammar))
    return SamplingParams(
        structured_outputs=structured,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        seed=sampling.seed,
        logprobs=sampling.logprobs,
        max_tokens=sampling.max_tokens,
        stop_token_ids=list(eos_token_ids),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _delta(output: Any, streams: Streams, key: str) -> Delta:
    tokens, dropped = tuple(output.token_ids), streams.dropped(key)
    logprobs = tuple(map(_logprob, tokens, output.logprobs or ()))
    if output.finish_reason == "stop":  # leave out the token that ends the text
        return Delta(tokens[:-1], "stop", dropped, logprobs[: len(tokens) - 1])
    return Delta(tokens, "length" if output.finish_reason else None, dropped, logprobs)


def _logprob(token: int, found: Mapping[int, Any]) -> TokenLogprob:
    """Return a token's log-probability.

    ``found`` has the likeliest tokens and the chosen one, with their ranks.
    """
    ranked = sorted(found.items(), key=lambda item: item[1].rank)
    top = tuple((other, one.logprob) for other, one in ranked)
    return TokenLogprob(token, found[token].logprob, top)


def _states(out: Any, rows: int) -> Tensor | None:
    """Return the last layer's output, which a model may return with that of other layers.

    vLLM pads the rows of a captured batch, and those rows may hold anything.
    """
    found = out[0] if isinstance(out, tuple) else out
    return found[:rows] if isinstance(found, Tensor) else None


@contextmanager
def _without_graphs() -> Iterator[None]:
    """Run a model's code, not a graph that was captured of it."""
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import get_forward_context

    context = get_forward_context()
    before, context.cudagraph_runtime_mode = context.cudagraph_runtime_mode, CUDAGraphMode.NONE
    try:
        yield
    finally:
        context.cudagraph_runtime_mode = before
