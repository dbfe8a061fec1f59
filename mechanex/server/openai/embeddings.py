"""``/v1/embeddings``: the mean or last residual stream of texts at a layer, steered or not."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field
from torch import Tensor

from ...engine.decode.inside import read_inside
from ...engine.intervention import unit
from ...engine.models.adapter import ModelAdapter
from ...engine.sampling import padding_token
from ...errors import ValidationError
from ..http.answers import json_answer
from ..http.body import Items
from ..http.disconnect import done_or_gone
from ..http.errors import invalid
from ..model.engine import Engine
from ..model.requests import TextRequest
from ..model.rules import TokenIds, Whole
from .answering import check_model, check_room
from .asked import steering_of
from .bodies import SteeringFields
from .doors import Who, about, posts
from .sampling import IgnoredFields

__all__ = ["embeddings_router"]


class EmbeddingBody(IgnoredFields, SteeringFields):
    """POST /v1/embeddings."""

    model: str | None = Field(default=None, description="The served model, or nothing.")
    input: str | TokenIds | Annotated[Items[str | TokenIds], Field(max_length=4096)] = Field(
        description="A text, token ids, or several of either."
    )
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Whole | None = Field(default=None, ge=1)
    layer: Whole | None = Field(
        default=None,
        ge=-(2**31),
        le=2**31,
        description="Whose residual stream, entering it; by default the one that leaves the last block.",
    )
    pooling: Literal["mean", "last"] | None = Field(
        default="mean", description="Of which tokens: the mean of all, or the last one."
    )
    normalize: bool | None = Field(default=True, description="Whether embeddings have norm 1.")

    @property
    def texts(self) -> list[str | list[int]]:
        """What to embed, one or several."""
        if isinstance(self.input, str):
            return [self.input]
        if self.input and isinstance(self.input[0], int):
            return [self.input]
        return list(self.input)  # type: ignore[arg-type]


def embeddings_router() -> APIRouter:
    """The route."""
    return posts("openai", {"/embeddings": _embeddings})


async def _embeddings(body: EmbeddingBody, request: Request, engine: Engine, who: Who) -> Response:
    """Residual streams of texts."""
    check_model(engine, body.model)
    width = engine.adapter.d_model
    if body.dimensions not in (None, width):
        raise invalid(
            f"The residual stream has {width} dimensions, and can't be cut to others.", "dimensions"
        )
    if not body.texts:
        raise invalid("Invalid value for 'input': it is an empty list.", "input")
    most = engine.settings.max_choices
    if len(body.texts) > most:
        raise invalid(
            f"Invalid value for 'input': it has {len(body.texts)} texts, and this server embeds {most} at once: send "
            "them in several requests.",
            "input",
        )
    try:
        layer = engine.adapter.layer_index(engine.adapter.n_layers if body.layer is None else body.layer)
    except ValidationError as error:
        raise invalid(error.message, "layer") from error
    steering, watching = await steering_of(engine, body, who)
    if watching.behaviors:
        raise invalid(
            "Texts that are embedded are steered, and not watched: give vectors, or behavior_action 'steer'.",
            "behavior_names",
        )
    rows = []
    with about("input"):
        for text in body.texts:
            ids = await engine.encode(text)
            if not ids:
                raise ValidationError("Invalid value for 'input': a text has no tokens.")
            check_room(engine, len(ids), 0)
            rows.append(TextRequest(ids, 0, steering=steering, owner=who.account_id))
    padding = padding_token(engine.tokenizer, [0])
    n_tokens = sum(len(row.ids) for row in rows)
    engine.scheduler.take_tokens(n_tokens)

    last, normalize = body.pooling == "last", body.normalize is not False
    work = partial(_embedded, rows=rows, layer=layer, padding=padding, last=last, normalize=normalize)
    found = await done_or_gone(request, engine.scheduler.run(work))

    def made() -> dict[str, Any]:
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": i, "embedding": _written(one, body)}
                for i, one in enumerate(found)
            ],
            "model": engine.model_name,
            "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
        }

    return await json_answer(made, len(found) * width)


def _embedded(
    adapter: ModelAdapter, rows: Sequence[TextRequest], layer: int, padding: int, last: bool, normalize: bool
) -> list[Tensor]:
    """[d_model] float32 of each text, as ``_pooled`` makes them."""
    streams = (read_inside(adapter, row, (), [layer], None, padding).streams[layer] for row in rows)
    return [_pooled(stream, last, normalize) for stream in streams]


def _pooled(stream: Tensor, last: bool, normalize: bool) -> Tensor:
    """[d_model] float32 of a text's stream [tokens, d_model].

    Args:
        stream: the text's.
        last: its last token's in place of the mean.
        normalize: whether its norm is 1.

    Raises:
        ValidationError: it isn't finite, or it is zero and was to have norm 1.
    """
    stream = stream.double()  # in which sums of squares of numbers of float32 are numbers too
    pooled = stream[-1] if last else stream.mean(0)
    if not bool(pooled.float().isfinite().all()):
        raise ValidationError("the residual stream is not finite: the steering is too strong.")
    if normalize:
        pooled = unit(pooled)
    return pooled.float()


def _written(one: Tensor, body: EmbeddingBody) -> str | Sequence[float]:
    if body.encoding_format == "base64":
        return base64.b64encode(one.numpy().astype("<f4").tobytes()).decode()
    return one.tolist()
