"""The fields of a body that say how the next token is chosen and what ends an answer, as OpenAI and vLLM name them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator

from ...engine.sampling import Sampling
from ..http.body import Body, Items, few_fields
from ..model.rules import RuleFields, Stop, Whole

if TYPE_CHECKING:
    from ..model.engine import ServingEngine

__all__ = ["IgnoredFields", "SamplingFields", "truncated"]


class IgnoredFields(Body):
    """What clients send and what changes nothing about an answer."""

    user: str | None = None
    metadata: Annotated[dict[str, str], few_fields()] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    include_reasoning: bool | None = None
    priority: Whole | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    spaces_between_special_tokens: bool | None = None


class SamplingFields(IgnoredFields, RuleFields):
    """What both kinds of completion say of their answers' tokens."""

    temperature: float | None = Field(default=1.0, ge=0, le=2)
    top_p: float | None = Field(default=1.0, ge=0, le=1)
    top_k: Whole | None = Field(
        default=None, ge=-1, le=2**31, description="Tokens that stay; 0 or -1 for all."
    )
    min_p: float | None = Field(
        default=None, ge=0, le=1, description="Least share of the likeliest token's probability that stays."
    )
    n: Whole | None = Field(default=1, ge=1, le=128)
    stop: Stop | Annotated[Items[Stop], Field(max_length=16)] | None = None
    truncate_prompt_tokens: Whole | None = Field(
        default=None,
        ge=-1,
        le=2**31,
        description="Keep this many of the prompt's last tokens; -1 for what fits.",
    )
    seed: Whole | None = Field(default=None, ge=-(2**63), lt=2**63)
    return_token_ids: bool | None = Field(
        default=False, description="Whether the answer has the token ids of the prompt and of itself."
    )

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _some_prompt(cls, tokens: int | None) -> int | None:
        if tokens == 0:
            raise ValueError("a prompt keeps at least one token; -1 keeps what fits")
        return tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def sampling(self) -> Sampling:
        """How a token is drawn."""
        temperature = 1.0 if self.temperature is None else self.temperature
        top_p = 1.0 if self.top_p is None else self.top_p
        # Below a millionth only the likeliest token is left, in any precision.
        if temperature < 1e-6 or top_p == 0 or self.top_k == 1:
            return Sampling("greedy")
        top_k, min_p = max(self.top_k or 0, 0), self.min_p or 0.0
        if not top_k and not min_p:
            return Sampling("top-p", top_p=top_p, temperature=temperature)
        return Sampling("combined", top_k=top_k, min_p=min_p, top_p=top_p, temperature=temperature)


def truncated(engine: ServingEngine, body: SamplingFields, ids: list[int], asked: int | None) -> list[int]:
    """The prompt's last tokens, as many as ``truncate_prompt_tokens`` says.

    Args:
        engine: whose context bounds what -1 keeps.
        body: what was asked.
        ids: of the whole prompt.
        asked: tokens that the answer may have, or None.
    """
    most = body.truncate_prompt_tokens
    if most is None:
        return ids
    if most < 0:
        if engine.context is None:
            return ids
        most = max(engine.context - max(1, asked or 1), 1)
    return ids[-most:]
