"""What the playground asks: texts to compare under steering, and small sweeps."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from ...engine.chat import Chat
from ...engine.text import Prompt
from ..http.body import Body, Items, Part, refused
from ..openai.bodies import Message, SteeringItem

__all__ = ["CompareBody", "SweepBody", "SweepExamples"]

_Text = Annotated[str, Field(min_length=1, max_length=100_000)]
_Strength = Annotated[float, Field(ge=-1e6, le=1e6)]


class _Asked(Body):
    """A prompt: a text, or the messages of a chat whose answer comes next."""

    prompt: _Text | None = None
    messages: Annotated[Items[Message], Field(min_length=1, max_length=4096)] | None = None

    @model_validator(mode="after")
    def _one_prompt(self) -> _Asked:
        if (self.prompt is None) == (self.messages is None):
            raise refused("prompt", "give a prompt or messages, one of them")
        return self

    @property
    def asked(self) -> Prompt | Chat:
        """The prompt as the engine takes it."""
        if self.messages is not None:
            return Chat([message.rendered for message in self.messages])
        return self.prompt or ""


class CompareBody(_Asked):
    """POST /page/compare: answers that were written, to be looked at token by token."""

    answers: Annotated[Items[str], Field(min_length=1, max_length=4)]
    steering: Annotated[Items[SteeringItem], Field(max_length=64)] = Field(default_factory=list)
    top: Annotated[int, Field(ge=0, le=20)] = 5


class SweepExamples(Part):
    """Contrastive examples, by which a sweep tells the effect."""

    prompts: Annotated[Items[_Text], Field(min_length=1, max_length=32)]
    positive_answers: Annotated[Items[_Text], Field(max_length=32)]
    negative_answers: Annotated[Items[_Text], Field(max_length=32)]

    @model_validator(mode="after")
    def _one_length(self) -> SweepExamples:
        n = len(self.prompts), len(self.positive_answers), len(self.negative_answers)
        if len(set(n)) > 1:
            raise refused(
                "prompts", f"prompts, positive_answers and negative_answers must be of one length; got {n}"
            )
        return self


class SweepBody(_Asked):
    """POST /page/sweep: one vector at several strengths, at all of its layers together and at each alone."""

    answer: _Text
    vector: Annotated[str, Field(min_length=1, max_length=256)]
    strengths: Annotated[Items[_Strength], Field(min_length=1, max_length=13)]
    by_layer: bool = False
    examples: SweepExamples | None = None
