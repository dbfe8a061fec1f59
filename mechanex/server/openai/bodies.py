"""The bodies of OpenAI's API as this server takes them, with its own fields for steering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol, TypeVar

import pydantic
from pydantic import Field, field_validator, model_validator

from ...engine.answering import Form
from ...engine.positions import TokenSelector, check_tokens
from ...engine.tool_calls import schema_of
from ..http.body import Body, Items, Part, few_fields, place_of, refused
from ..http.errors import invalid
from ..model.rules import LENGTHS, TokenIds, Whole
from .sampling import SamplingFields
from .tools import AssistantCall, Tool, ToolChoice

__all__ = [
    "ActivationItem",
    "ChatBody",
    "CompletionBody",
    "ConditionItem",
    "GenerationBody",
    "Message",
    "ReturnFields",
    "SteeringFields",
    "SteeringItem",
    "chat_of",
    "text_of",
]

T = TypeVar("T")

_Id = Annotated[str, Field(min_length=1, max_length=256)]
_Name = Annotated[str, Field(min_length=1, max_length=256)]
_Place = Annotated[Whole, Field(ge=-(2**31), le=2**31)]
_Strength = Annotated[float, Field(ge=-1e6, le=1e6)]
_Some = Annotated[Items[T], Field(max_length=4096)]


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


class ActivationItem(Part):
    """The residual stream at one layer."""

    layer: _Place
    vector_ids: Annotated[Items[_Id], Field(min_length=1, max_length=64)] | None = Field(
        default=None, description="Stored vectors onto which the stream of each token is projected."
    )
    raw: bool | None = Field(default=False, description="Whether the stream itself is told.")
    prompt: bool | None = Field(default=False, description="Whether the prompt's tokens are told too.")

    @model_validator(mode="after")
    def _something(self) -> ActivationItem:
        if not self.vector_ids and not self.raw:
            raise refused(
                "vector_ids", "give vector_ids, for projections, or raw=true, for the stream itself"
            )
        return self


class ReturnFields(Part):
    """What of the model's inside an answer has."""

    activations: Annotated[Items[ActivationItem], Field(min_length=1, max_length=64)] | None = None
    logit_differences: Annotated[Whole, Field(ge=0, le=20)] | None = Field(
        default=None,
        description="How many tokens are named, either way, whose log-probabilities steering changes most.",
    )

    @model_validator(mode="after")
    def _something(self) -> ReturnFields:
        if self.activations is None and self.logit_differences is None:
            raise refused("activations", "give activations or logit_differences")
        return self


class StreamOptions(Part):
    """What a stream has besides the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class SteeringFields(Body):
    """What a body says of steering."""

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
    steering: Items[SteeringItem] | None = Field(
        default=None, max_length=64, description="Several vectors at once."
    )

    @model_validator(mode="after")
    def _agreeing(self) -> SteeringFields:
        one, other = self.steering_vector, self.steering_vector_id
        if one is not None and other is not None and one != other:
            raise refused(
                "steering_vector_id",
                "steering_vector and steering_vector_id are one field; they name different vectors",
            )
        if self.steering_condition is not None and one is None and other is None:
            raise refused("steering_condition", "steering_condition goes with a steering_vector; give one")
        if self.behavior_action is not None and not (self.behavior_names or self.corrected_behaviors):
            raise refused(
                "behavior_action", "behavior_action says what is done with behavior_names: give some"
            )
        if self.corrected_behaviors and self.behavior_action in ("abort", "report"):
            raise refused(
                "behavior_action",
                f"corrected_behaviors are corrected, and behavior_action is '{self.behavior_action}': give one of them",
            )
        return self


class GenerationBody(SamplingFields, SteeringFields):
    """What both kinds of completion share."""

    model: str | None = Field(default=None, description="The served model, or nothing.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    behavior_scores: bool | None = Field(
        default=False, description="Whether the answer has the scores of every token, as 'behaviors'."
    )
    returned: ReturnFields | None = Field(
        default=None, alias="return", description="What of the model's inside the answer has."
    )

    @model_validator(mode="after")
    def _streamed(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options", "stream_options goes with stream=true")
        return self

    @property
    def length_field(self) -> str | None:
        """The field by which the sender said how long an answer may be, or None."""
        return next(
            (one for one in LENGTHS if one in self.model_fields_set and getattr(self, one) is not None), None
        )

    @property
    def asked_length(self) -> int | None:
        """How long an answer may be where the sender said so."""
        return None if self.length_field is None else self.most_tokens

    @property
    def n_answers(self) -> int:
        """How many answers each prompt gets."""
        return self.n or 1

    @property
    def n_drawn(self) -> int:
        """How many are made, of which the best are given."""
        return self.n_answers


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: str | TokenIds | _Some[str | TokenIds] = Field(
        description="A text, token ids, or several of either."
    )
    max_tokens: Whole | None = Field(default=16, ge=0, le=2**31)
    logprobs: Whole | None = Field(default=None, ge=0, le=20)
    echo: bool | None = False
    best_of: Whole | None = Field(
        default=None,
        ge=1,
        le=128,
        description="Answers that are made, of which the n likeliest by mean log-probability are given.",
    )
    suffix: str | None = None

    @model_validator(mode="after")
    def _possible(self) -> CompletionBody:
        if self.suffix:
            raise refused(
                "suffix",
                "suffix is not supported: a text is continued at its end, not filled in; leave it out, or write the "
                "model's own fill-in-the-middle tokens into the prompt",
            )
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise refused("best_of", f"best_of is at least n: got best_of={self.best_of} and n={self.n or 1}")
        if self.n_drawn > self.n_answers and self.stream:
            raise refused(
                "best_of", "which answers are the best_of is known at their ends: it goes without stream"
            )
        if self.max_tokens == 0 and not self.echo:
            raise refused("max_tokens", "max_tokens of 0 goes with echo=true")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]

    @property
    def most_tokens(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def n_drawn(self) -> int:
        return self.best_of or self.n_answers


class _ContentPart(Part):
    type: Literal["text"]
    text: str


class Message(Part):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[Items[_ContentPart], Field(max_length=1024)] | None = None
    name: str | None = None
    # What an answer of ours or another server's has when it is sent back.
    refusal: None = None
    audio: None = None
    annotations: list[Any] | None = Field(default=None, max_length=0)
    function_call: None = None
    tool_calls: Annotated[Items[AssistantCall], Field(max_length=128)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _said(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise refused("content", f"a {self.role} message needs content")
        if self.tool_calls and self.role != "assistant":
            raise refused("tool_calls", "tool_calls are the assistant's")
        return self

    @property
    def rendered(self) -> dict[str, Any]:
        """The message as chat templates take it."""
        role = "system" if self.role == "developer" else self.role
        told: dict[str, Any] = {"role": role, "content": text_of(self.content or "")}
        if self.tool_calls:
            told["tool_calls"] = [one.rendered for one in self.tool_calls]
        if self.role == "tool":
            told |= {
                name: one for name in ("tool_call_id", "name") if (one := getattr(self, name)) is not None
            }
        return told

    @property
    def of_tools(self) -> bool:
        """Whether a template has to know tools to write it."""
        return self.role == "tool" or bool(self.tool_calls)


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Items[Message] = Field(min_length=1, max_length=4096)
    max_tokens: Whole | None = Field(default=None, ge=1, le=2**31)
    max_completion_tokens: Whole | None = Field(default=None, ge=1, le=2**31)
    logprobs: bool | None = False
    top_logprobs: Whole | None = Field(default=None, ge=0, le=20)
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
    modalities: Items[Literal["text"]] | None = None
    tools: Annotated[Items[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    functions: list[Any] | None = Field(default=None, max_length=0)
    function_call: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _possible(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise refused("top_logprobs", "top_logprobs goes with logprobs=true")
        if self.continue_final_message and self.add_generation_prompt:
            raise refused(
                "add_generation_prompt",
                "continue_final_message goes on with the last message and add_generation_prompt begins another; "
                "ask for one of them",
            )
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise refused("tool_choice", "tool_choice asks for a call, and there are no tools")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise refused(
                "max_completion_tokens", "max_tokens and max_completion_tokens are one field; they differ"
            )
        return self

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else list(self.tools or ())

    @property
    def form(self) -> Form | None:
        """As in bodies of all kinds; a call that has to come is one, too."""
        form, choice = super().form, self.tool_choice
        if not self.offered or (choice != "required" and not isinstance(choice, ToolChoice)):
            return form
        if form is not None:
            raise invalid(f"tool_choice asks for a call, and {form[0]} for another form.", form[0])
        named = None if isinstance(choice, str) or choice is None else choice.function.name
        functions = [one.rendered["function"] for one in self.offered if named in (None, one.function.name)]
        return "tools", "json", schema_of(functions)


class TextPart(Protocol):
    """A piece of a message."""

    @property
    def text(self) -> str:
        """What it says."""


def text_of(content: str | Sequence[TextPart]) -> str:
    """What a message says, in however many pieces."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


def chat_of(body: Body, fields: dict[str, Any], names: Mapping[str, str] | None = None) -> ChatBody:
    """A chat that is asked for in another API's words, with that body's model and steering.

    Args:
        body: what was sent.
        fields: the chat's.
        names: what that API calls the chat's fields, where it calls them otherwise.

    Raises:
        ValidationError: what no chat can be asked for.
    """
    same = {"model", *SteeringFields.model_fields} & body.model_fields_set
    try:
        return ChatBody.model_validate({name: getattr(body, name) for name in same} | fields)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = place_of(first)
        ours = str(place[0]) if place else None
        param = (names or {}).get(ours or "", ours)
        where = f"'{param}'" if param else "the body"
        reason = first["msg"].removeprefix("Value error, ")
        raise invalid(f"Invalid value for {where}: {reason}.", param) from error
