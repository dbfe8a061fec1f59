"""What a model holds while it reads a text: residual streams at chosen layers, and what steering does to its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...errors import ValidationError
from ..capabilities.decoding import form
from ..divergence import log_probabilities, shift
from ..hooks import attach
from ..intervention import compute_dtype
from ..models.adapter import ModelAdapter, ResidualHook, undisturbed
from ..pauses import pass_tokens, pause
from .decoder import Decoder
from .request import TextRequest
from .row import Row

__all__ = ["Difference", "ReadText", "read_inside"]


@dataclass(frozen=True)
class Difference:
    """What steering does to the distribution that one token is chosen from.

    Args:
        token: the token that was chosen.
        change: of its natural log-probability, steered less plain.
        kl: KL(steered‖plain) in nats.
        raised: the tokens whose log-probabilities rise most among the likeliest of either, with the changes.
        lowered: those that fall most.
    """

    token: int
    change: float
    kl: float
    raised: tuple[tuple[int, float], ...]
    lowered: tuple[tuple[int, float], ...]


@dataclass
class ReadText:
    """What was seen in one text.

    Attributes:
        streams: by layer the residual stream [tokens, d_model] that enters it, edits of that layer included, of prompt
            and answer.
        differences: one per token of the answer, where they were asked for.
    """

    streams: dict[int, Tensor] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)


class _WholeReader(Decoder):
    """Keeps the logits of the latest pass."""

    latest: Tensor

    def _note_prompt(self, rows: Sequence[Row], logits: Tensor, begin: int) -> None:
        self.latest = logits


def read_inside(
    adapter: ModelAdapter,
    request: TextRequest,
    answer: Sequence[int],
    layers: Sequence[int],
    most_changed: int | None,
    padding: int,
) -> ReadText:
    """Reads a prompt and an answer again, edited as they were when the answer was written.

    Args:
        adapter: the model; nobody else's meanwhile but in pauses.
        request: the prompt and its edits; what looks on is left out.
        answer: token ids.
        layers: whose residual streams are wanted.
        most_changed: how many tokens a ``Difference`` names either way; None for no differences.
        padding: a token id to fill rows with.

    Raises:
        ValidationError: differences, and nothing steers; or the logits aren't finite.
    """
    if most_changed is not None and not request.steering:
        raise ValidationError("there are no differences of logits without steering: name a vector.")
    found = ReadText()
    seen: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    request = replace(request, onlooker=None, guard=None, stops=(), logprobs=None, prompt_logprobs=False)
    with undisturbed(adapter.hf_model), torch.no_grad():
        reader = _WholeReader(adapter, padding, form=form(adapter, 1), prefill_tokens=pass_tokens(1024))
        try:
            steered = _decided(reader, request)
            plain = Row(replace(request, steering=()), None, ())
            for row in (steered, plain):
                row.chosen = list(answer)
                row.request = replace(row.request, prompt_logprobs=most_changed is not None)
                row.suspend()
            reading = reader.read([steered])
            beside = reader.read([plain]) if most_changed is not None else None
            done = False
            while not done:
                begin = reading.done
                reader.steering.prepare(reading.spans(), 1)  # its hooks come before those that look
                looking = attach(adapter, [(layer, _keeping(seen[layer])) for layer in layers])
                try:
                    done = reader.advance(reading)
                finally:
                    looking.remove()
                if beside is not None and most_changed is not None:
                    logits = reader.latest
                    reader.advance(beside)
                    if not (reading.sound and beside.sound):
                        raise ValidationError(
                            "the model's logits are not finite: the steering is too strong."
                        )
                    found.differences += _differences(
                        logits, reader.latest, begin, len(request.ids), answer, most_changed
                    )
                reader.detach()
                pause()
        finally:
            reader.close()
    found.streams = {layer: torch.cat(parts) for layer, parts in seen.items()}
    return found


def _decided(reader: Decoder, request: TextRequest) -> Row:
    """The row with its conditions decided on the prompt alone."""
    row = Row(request, None, ())
    if row.undecided:
        reading = reader.read([row])
        while not reader.advance(reading):
            pass
        reader.detach()
    return row


def _keeping(parts: list[Tensor]) -> ResidualHook:
    def keep(hidden: Tensor) -> None:
        parts.append(hidden[0].detach().to("cpu", compute_dtype(hidden.dtype), copy=True))

    return keep


def _differences(
    steered: Tensor, plain: Tensor, begin: int, n_prompt: int, answer: Sequence[int], most: int
) -> list[Difference]:
    """Of the tokens that the logits [n, vocabulary] of the text's tokens from ``begin`` on predict in the answer."""
    first = max(begin, n_prompt - 1)
    last = min(begin + steered.shape[0], n_prompt + len(answer) - 1)
    if first >= last:
        return []
    rows = slice(first - begin, last - begin)
    after, before = (log_probabilities(logits[rows]) for logits in (steered, plain))
    tokens = list(answer[first + 1 - n_prompt : last + 1 - n_prompt])
    change = (after - before).nan_to_num(0.0)  # of tokens that the model rules out
    own = change.gather(1, torch.tensor(tokens, device=change.device)[:, None])[:, 0].tolist()
    kls = shift(after, before).tolist()
    depth = min(max(50, most), change.shape[-1])
    likely = torch.maximum(after, before).topk(depth, -1).indices
    among = change.gather(1, likely)
    order = among.argsort(-1, descending=True)
    ids, values = likely.gather(1, order).tolist(), among.gather(1, order).tolist()
    return [
        Difference(
            token,
            mine,
            kl,
            tuple((i, v) for i, v in list(zip(row, changes, strict=True))[:most] if v > 0),
            tuple((i, v) for i, v in list(zip(row, changes, strict=True))[::-1][:most] if v < 0),
        )
        for token, mine, kl, row, changes in zip(tokens, own, kls, ids, values, strict=True)
    ]
