"""The bodies of OpenAI's API as this server takes them, with its own fields for steering."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from ...engine.positions import TokenSelector, check_tokens
from ..http.body import Body, Items, Part, few_fields

__all__ = ["ChatBody", "CompletionBody", "ConditionItem", "GenerationBody", "SteeringItem"]

T = TypeVar("T")

_Id = Annotated[str, Field(min_length=1, max_length=256)]
_Name = Annotated[str, Field(min_length=1, max_length=256)]
_Place = Annotated[int, Field(ge=-(2**31), le=2**31)]
_Strength = Annotated[float, Field(ge=-1e6, le=1e6)]
_Some = Annotated[Items[T], Field(max_length=4096)]
_Stop = Annotated[str, Field(min_length=1, max_length=1000)]


_LENGTHS = {"max_tokens", "max_completion_tokens"}


class ConditionItem(Part):
    """A condition that the prompt has to meet: its mean cosine with a stored vector, above a threshold."""

    vector: _Id = Field(description="Id of a stored vector, the direction.")
    threshold: Annotated[float, Field(ge=-1, le=1)]
    layer: _Place | None = Field(
        default=None, description="Which of the vector's layers, where it has several."
    )


class SteeringItem(Part):
    """One vector among several of a request."""

    vector: _Id = Field(description="Id of a stored vector.")
    strength: _Strength = Field(default=1.0, description="Multiplies the vector.")
    layers: Items[_Place] | None = Field(
        default=None, min_length=1, max_length=1024, description="Only these of its layers."
    )
    tokens: _Place | Items[_Place | None] | None = Field(
        default=None,
        description="Positions to steer: one, or [start, stop] or [start, stop, step] with null for an open end; "
        "negatives count from the end of the prompt. All by default.",
    )

    condition: ConditionItem | None = Field(
        default=None, description="Has to be met by the prompt for this vector to steer its answer."
    )

    @property
    def selector(self) -> TokenSelector:
        """The positions as the engine names them."""
        return slice(*self.tokens) if isinstance(self.tokens, list) else self.tokens

    @field_validator("tokens")
    @classmethod
    def _positions(cls, tokens: Any) -> Any:
        if isinstance(tokens, list):
            if not 2 <= len(tokens) <= 3:
                raise ValueError("a range of tokens is [start, stop] or [start, stop, step]")
            check_tokens(slice(*tokens))
        return tokens


class StreamOptions(Part):
    """What a stream has besides the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationBody(Body):
    """What both kinds of completion share."""

    model: str | None = Field(default=None, description="The served model, or nothing.")
    temperature: float | None = Field(default=1.0, ge=0, le=2)
    top_p: float | None = Field(default=1.0, ge=0, le=1)
    n: int | None = Field(default=1, ge=1, le=128)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: _Stop | Annotated[Items[_Stop], Field(max_length=16)] | None = None
    frequency_penalty: float | None = Field(default=0.0, ge=-2, le=2)
    presence_penalty: float | None = Field(default=0.0, ge=-2, le=2)
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], few_fields(1024)] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)

    steering_vector: _Id | None = Field(default=None, description="Id of a stored vector to steer with.")
    steering_vector_id: _Id | None = Field(default=None, description="The same as steering_vector.")
    steering_strength: _Strength | None = Field(
        default=None, description="Multiplies the vector; 1 by default."
    )
    steering_condition: ConditionItem | None = Field(
        default=None,
        description="Has to be met by the prompt for steering_vector to steer its answer; else the answer is what it "
        "is without. A vector that was saved with a condition brings its own.",
    )
    behavior_names: Items[_Name] | None = Field(
        default=None,
        max_length=64,
        description="Behaviors that are watched and, where they show, corrected; the vector of one that has no "
        "detector is added, and of all of them where steering_strength is given.",
    )
    corrected_behaviors: Items[_Name] | None = Field(
        default=None,
        max_length=64,
        description="Behaviors that are watched and corrected; vectors alone are refused.",
    )
    force_steering: Items[_Name] | None = Field(
        default=None,
        max_length=64,
        description="Behaviors that are taken out of every token, seen or not; of vectors as behavior_names.",
    )
    behavior_action: Literal["steer", "correct", "abort", "report"] | None = Field(
        default=None,
        description="What is done with behavior_names: their vectors are added, or they are watched, and corrected, "
        "the answer ended (finish_reason 'behavior') or nothing done where they show.",
    )
    behavior_scores: bool | None = Field(
        default=False, description="Whether the answer has the scores of every token, as 'behaviors'."
    )
    steering: Items[SteeringItem] | None = Field(
        default=None, max_length=64, description="Several vectors at once."
    )

    # These change nothing about an answer, and clients send them.
    user: str | None = None
    metadata: Annotated[dict[str, str], few_fields()] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("logit_bias")
    @classmethod
    def _bias_keys(cls, biases: dict[str, float] | None) -> dict[str, float] | None:
        for key in biases or {}:
            if not (key.isascii() and key.isdigit() and len(key) < 19):
                raise ValueError(f"its keys are token ids, such as '42'; got {key[:40]!r}")
        return biases

    @model_validator(mode="after")
    def _agreeing(self) -> GenerationBody:
        one, other = self.steering_vector, self.steering_vector_id
        if one is not None and other is not None and one != other:
            raise ValueError(
                "steering_vector and steering_vector_id are one field; they name different vectors"
            )
        if self.steering_condition is not None and one is None and other is None:
            raise ValueError("steering_condition goes with a steering_vector; give one")
        if self.behavior_action is not None and not (self.behavior_names or self.corrected_behaviors):
            raise ValueError("behavior_action says what is done with behavior_names: give some")
        if self.corrected_behaviors and self.behavior_action in ("abort", "report"):
            raise ValueError(
                f"corrected_behaviors are corrected, and behavior_action is '{self.behavior_action}': give one of them"
            )
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream=true")
        return self

    @property
    def asked_length(self) -> bool:
        """Whether the sender said how long an answer may be."""
        return any(getattr(self, name, None) is not None for name in _LENGTHS & self.model_fields_set)

    @property
    def n_answers(self) -> int:
        """How many answers each prompt gets."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: str | _Some[str] | Items[int] | _Some[Items[int]] = Field(
        description="A text, several, token ids, or several lists of them."
    )
    max_tokens: int | None = Field(default=16, ge=0, le=2**31)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool | None = False
    best_of: int | None = Field(default=None, ge=1, le=128)
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _possible(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of other than n is not supported; ask for n answers")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens of 0 goes with echo=true")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]


class _ContentPart(Part):
    type: Literal["text"]
    text: str


class Message(Part):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[Items[_ContentPart], Field(max_length=1024)] | None = None
    name: str | None = None
    # What an answer of ours or another server's has when it is sent back.
    refusal: None = None
    audio: None = None
    annotations: list[Any] | None = Field(default=None, max_length=0)
    function_call: None = None
    tool_calls: list[Any] | None = Field(default=None, max_length=0)

    @model_validator(mode="after")
    def _said(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a {self.role} message needs content")
        return self

    @property
    def rendered(self) -> dict[str, str]:
        """The message as chat templates take it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class _TextFormat(Part):
    type: Literal["text"]


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Items[Message] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(default=None, ge=1, le=2**31)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    continue_final_message: bool | None = Field(
        default=False, description="Go on with the last message instead of answering it."
    )
    add_generation_prompt: bool | None = Field(
        default=None,
        description="Begin an answer after the messages; by default, unless the last one goes on.",
    )
    chat_template_kwargs: Annotated[dict[str, Any], few_fields()] | None = Field(
        default=None, description="Further variables of the model's chat template."
    )
    # Only what this server can do is taken: text, and no tools.
    response_format: _TextFormat | None = None
    modalities: Items[Literal["text"]] | None = None
    tools: list[Any] | None = Field(default=None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    functions: list[Any] | None = Field(default=None, max_length=0)
    function_call: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _possible(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs=true")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError(
                "continue_final_message goes on with the last message and add_generation_prompt begins another; "
                "ask for one of them"
            )
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise ValueError("max_tokens and max_completion_tokens are one field; they differ")
        return self
