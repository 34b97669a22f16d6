"""The fields of a request about the choice of tokens and about missing experts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from ....cluster.routing.expert_options import MissingExpert
from ...engine.engine import ExpertBounds, Sampling
from ...text.answer_form import AnswerForm
from .refusals import misfit

MAX_CHOICES = 64  # prompts x n
MAX_BIASES = 1024


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _check_biases(value: Any) -> tuple[tuple[int, float], ...]:
    """Return JSON's ``{"token": bias}`` as pairs."""
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise PydanticCustomError(
            "logit_bias", "must map at most {most} token ids to numbers", {"most": MAX_BIASES}
        )
    for token, bias in value.items():
        number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
        if not (str(token).isascii() and str(token).isdigit()) or not number:
            raise PydanticCustomError(
                "logit_bias",
                "has {token}: {bias}; token ids and numbers are expected",
                {"token": repr(token), "bias": repr(bias)},
            )
        if not -100 <= bias <= 100:
            raise PydanticCustomError(
                "logit_bias", "has the bias {bias}; -100 to 100 are allowed", {"bias": repr(bias)}
            )
    return tuple((int(token), float(bias)) for token, bias in value.items())


LogitBias = Annotated[
    tuple[tuple[int, float], ...],
    PlainValidator(
        _check_biases,
        json_schema_input_type=dict[
            Annotated[str, Field(pattern="^[0-9]+$")], Annotated[float, Field(ge=-100, le=100)]
        ],
    ),
]


class MoesaicOptions(Strict):
    """``moesaic``: experts per token, and what to do if an expert is missing or a trunk is lost."""

    experts_per_token: Annotated[int, Field(ge=1)] | None = None
    resumable: bool = False
    missing_expert: Literal["wait", "fail", "drop"] = "wait"
    wait_s: Annotated[float, Field(ge=0, le=3600)] | None = None
    max_dropped: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _fitting(self) -> MoesaicOptions:
        if self.max_dropped is not None and self.missing_expert != "drop":
            raise misfit(
                "max_dropped", "is only allowed with missing_expert='drop'", self.max_dropped
            )
        return self

    @property
    def expert_options(self) -> MissingExpert:
        return MissingExpert(
            mode=self.missing_expert,
            wait_s=self.wait_s,
            most_dropped=1.0 if self.max_dropped is None else self.max_dropped,
        )


class SamplingOptions(Strict):
    """The sampling fields that both kinds of request have."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None  # None: 1, as in OpenAI's API
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    # These three are vLLM's, not OpenAI's. top_k -1 and 0 mean all tokens.
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: LogitBias | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    # Also vLLM's: waiting requests with the smallest number come first.
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    moesaic: MoesaicOptions = MoesaicOptions()

    @property
    def choices(self) -> int:
        """The number of choices for each prompt."""
        return self.n or 1

    @property
    def top_tokens(self) -> int | None:
        """How many likeliest tokens are listed for each token; None: no log-probabilities."""
        return None

    @property
    def form(self) -> AnswerForm | None:
        """The form that the answer must have; None: any text. Raises RequestError."""
        return None

    def sampling(self, max_tokens: int, experts: ExpertBounds) -> Sampling:
        """Return the engine's sampling; unset fields get OpenAI's defaults. Raises RequestError."""

        def said(value: float | None, default: float) -> float:
            return default if value is None else value

        return Sampling(
            max_tokens=max_tokens,
            temperature=said(self.temperature, 1.0),
            top_p=said(self.top_p, 1.0),
            top_k=max(0, self.top_k or 0),
            min_p=said(self.min_p, 0.0),
            repetition_penalty=said(self.repetition_penalty, 1.0),
            frequency_penalty=said(self.frequency_penalty, 0.0),
            presence_penalty=said(self.presence_penalty, 0.0),
            logit_bias=self.logit_bias or (),
            seed=self.seed,
            logprobs=self.top_tokens,
            form=self.form,
            priority=self.priority or 0,
            missing=self.moesaic.expert_options,
            experts_per_token=experts.granted(self.moesaic.experts_per_token),
        )
