"""The bodies of the Axionic API: what each call takes, to the type, and what answers look like."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, StringConstraints, model_validator

from ..accounts.passwords import LONGEST_PASSWORD
from ..accounts.scopes import SCOPES, Scope
from ..http.body import Body, Items, few_fields, refused
from ..model.rules import RuleFields, TokenIds

__all__ = [
    "BehaviorBody",
    "GenerateBody",
    "KeyBody",
    "LoginBody",
    "ModelBody",
    "NewPasswordBody",
    "Output",
    "PasswordBody",
    "RaagBody",
    "Reason",
    "RefreshBody",
    "SaeBody",
    "ScoresBody",
    "SteeringBody",
]


def _message(fields: dict[str, str]) -> dict[str, str]:
    if not {"role", "content"} <= set(fields):
        raise ValueError("a chat message has a role and a content")
    return fields


_Message = Annotated[dict[str, str], few_fields(), AfterValidator(_message)]

_Prompt = str | TokenIds | Items[_Message]
"""Text, token ids or chat messages."""

# No control characters: a name is shown in lists, logs and messages.
_Name = Annotated[
    str,
    StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$", strip_whitespace=True),
]
_Stop = Annotated[str, Field(max_length=1000)]
_VectorId = Annotated[str, Field(min_length=1, max_length=200)]


class LoginBody(Body):
    """Sign-up and log-in."""

    email: Annotated[str, Field(min_length=1, max_length=320)]
    password: Annotated[str, Field(min_length=1, max_length=LONGEST_PASSWORD, repr=False)]


class PasswordBody(Body):
    """The account's password, for what a stolen token must not do."""

    password: Annotated[str, Field(min_length=1, max_length=LONGEST_PASSWORD, repr=False)]


class NewPasswordBody(PasswordBody):
    """The account's password and the next one."""

    new_password: Annotated[str, Field(min_length=1, max_length=LONGEST_PASSWORD, repr=False)]


class RefreshBody(Body):
    """A refresh token."""

    refresh_token: Annotated[str, Field(min_length=1, max_length=1000, repr=False)]


class KeyBody(Body):
    """A new API key: its name, what it may do (all that a key may) and for how long (for good)."""

    name: _Name = "Default Key"
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=len(SCOPES))] | None = None
    expires_days: Annotated[float, Field(gt=0, le=36_500, allow_inf_nan=False)] | None = None


class ModelBody(Body):
    """The model to work with."""

    model_name: _Name


class GenerateBody(RuleFields):
    """A prompt and how to continue it; defaults are those of ``generation.generate``."""

    prompt: _Prompt
    sampling_method: str = "top-k"
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] = 128
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 50
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    steering_vector_id: _VectorId | None = None
    steering_strength: float | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    temperature: Annotated[float, Field(gt=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: _Stop | Annotated[Items[_Stop], Field(max_length=16)] | None = None


class SteeringBody(Body):
    """Contrastive examples, and how vectors are made of them."""

    prompts: Items[_Prompt]
    positive_answers: Items[str]
    negative_answers: Items[str]
    layer_idxs: Items[int] | None = None
    method: str = "few-shot"


class BehaviorBody(Body):
    """A behavior: contrastive examples, or a vector that was made before."""

    behavior_name: _Name
    prompts: Items[_Prompt]
    positive_answers: Items[str]
    negative_answers: Items[str]
    description: Annotated[str, Field(max_length=10_000, pattern=r"^[^\x00]*$")] = ""
    steering_vector_id: _VectorId | None = None

    @model_validator(mode="after")
    def _one_length(self) -> BehaviorBody:
        n = len(self.prompts), len(self.positive_answers), len(self.negative_answers)
        if len(set(n)) > 1:
            raise refused(
                "prompts", f"prompts, positive_answers and negative_answers must be of one length; got {n}"
            )
        return self


class SaeBody(RuleFields):
    """A prompt to continue while behaviors are watched; defaults are those of ``sae.generate``."""

    prompt: _Prompt
    max_new_tokens: Annotated[int, Field(ge=1, lt=2**31)] = 50
    behavior_names: Annotated[Items[str], Field(max_length=64)] | None = None
    force_steering: Annotated[Items[str], Field(max_length=64)] | None = None
    action: Literal["correct", "abort", "report"] = "correct"
    return_trace: bool = False
    sampling_method: str | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    temperature: Annotated[float, Field(gt=0)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: _Stop | Annotated[Items[_Stop], Field(max_length=16)] | None = None

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling settings that were given."""
        names = ("sampling_method", "top_k", "top_p", "min_p", "typical_p", "temperature")
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}


class ScoresBody(Body):
    """Two prompts for attribution patching; defaults are those of ``attribution.compute_scores``."""

    clean_prompt: str
    corrupted_prompt: str
    target_module_paths: Annotated[Items[str], Field(max_length=10_000)] | None = None
    method: str = "gradient"
    steps: Annotated[int, Field(ge=1, le=64)] = 1
    metric: Annotated[Items[str | int], Field(min_length=2, max_length=2)] | None = None
    align: str | None = None
    positions: bool = True
    edges: bool = False
    recompute_attention: bool = False
    drop_layers: bool = False


class RaagBody(Body):
    """Questions, and where the documents are."""

    qa_entries: Annotated[Items[dict[str, Any]], Field(min_length=1)]
    docs: Items[dict[str, Any]] | None = None
    pinecone_index_name: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _some_documents(self) -> RaagBody:
        if self.docs is None and self.pinecone_index_name is None:
            raise refused("docs", "give docs, or pinecone_index_name")
        return self


class Output(BaseModel):
    """The prompt with its continuation, and why it ends."""

    output: str
    finish_reason: str


class Reason(BaseModel):
    """What was wrong, and what to do."""

    detail: str
