"""A system prompt's effect without its tokens: gated vectors trained to give what the model gives under the prompt."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...bundled import open_questions
from ...errors import ValidationError
from ..capabilities.replaying import replay_agrees
from ..capabilities.unembedding import unembedding_agrees
from ..chat import has_chat_template
from ..decode.run import decode
from ..divergence import divergence
from ..forward import packs_for, scored_logits
from ..generate import Generating
from ..given import as_list
from ..hooks import attach
from ..intervention import compute_dtype
from ..models import adapter_for
from ..models.adapter import ModelAdapter, ResidualHook, exclusive, undisturbed
from ..pack import Pack
from ..passes import Resumed, scored_hidden, visit_residuals
from ..pauses import pause
from ..sampling import Options
from ..terms import Terms, TokenGate
from ..text import Prompt, encode_prompt
from ..vectors import SteeringVector

__all__ = ["from_system_prompt", "prompt_shift"]

_log = logging.getLogger(__name__)

_LAYERS = 6
_RATE = 0.03
_BATCH = 8
_HELD_OUT = 0.2


def from_system_prompt(
    model: nn.Module | ModelAdapter,
    system_prompt: str,
    prompts: Sequence[Prompt] | None = None,
    tokenizer: Any = None,
    *,
    layers: Sequence[int] | None = None,
    answer_tokens: int = 20,
    steps: int = 40,
    seed: int = 0,
    progress: bool = False,
) -> SteeringVector:
    """A vector that stands in for a system prompt: x ← x + sigmoid(w·x + c)·v at some layers, with w, c and v trained.

    The model answers questions under the system prompt; the vector is trained so that, without it, the next token's
    distribution at every token of those answers is the same, by KL(with the prompt‖with the vector) (PSR: prompts as
    steering of representations). A fifth of the chats is held out, and told in ``metadata``: ``prompt_kl``, nats per
    token by which the system prompt moves the model there, and ``recovered``, the share of it that the vector brings
    about at strength 1.

    Args:
        model: a Hugging Face or TransformerLens model.
        system_prompt: the text; before prompts that are texts it stands as such.
        prompts: questions, as text (chats of one message, where the tokenizer writes chats) or chat messages; None for
            a bundled list of 40 open ones.
        tokenizer: where the model carries none.
        layers: where it acts, negatives from the end; None for 6, from the lower part to the upper part.
        answer_tokens: tokens of each answer that it is trained on.
        steps: of Adam, each over 8 chats.
        seed: of the answers and of the order.
        progress: show a progress bar.

    Raises:
        ValidationError: no system prompt, fewer than 5 prompts, a layer that doesn't exist, or a system prompt that
            changes nothing.
    """
    adapter = adapter_for(model)
    tokenizer = tokenizer if tokenizer is not None else adapter.tokenizer
    if not isinstance(system_prompt, str) or not system_prompt.strip():
        raise ValidationError(f"a system prompt is a text that isn't empty; got {system_prompt!r}.")
    for name, value in (("steps", steps), ("answer_tokens", answer_tokens)):
        if not isinstance(value, int) or value < 1:
            raise ValidationError(f"{name} is a number, 1 or more; got {value!r}.")
    asked = as_list("prompts", open_questions() if prompts is None else prompts, "prompts")
    if len(asked) < 5:
        raise ValidationError(f"a system prompt is learned from 5 prompts or more; got {len(asked)}.")
    n = adapter.n_layers
    named = layers if layers is not None else [round(n * (i + 1) / (_LAYERS + 1)) for i in range(_LAYERS)]
    places = adapter.layer_indices(named)
    chats = _chats(model, tokenizer, system_prompt, asked, answer_tokens, seed)
    n_held = max(1, round(_HELD_OUT * len(chats)))
    held, chats = chats[:n_held], chats[n_held:]
    with exclusive(adapter), undisturbed(adapter.hf_model):
        gates = _Gates(adapter, places)
        unseen = _ChatGroup(adapter, held, places[0])
        with torch.no_grad():
            prompt_kl = float(unseen.kl().mean())
        if not prompt_kl > 1e-6:
            raise ValidationError(
                "the system prompt doesn't change the model's answers, so that there is nothing to learn: check that "
                "the tokenizer's template writes system messages."
            )
        groups = [_ChatGroup(adapter, chats[i : i + _BATCH], places[0]) for i in range(0, len(chats), _BATCH)]
        gates.measure(groups[0].packs)
        _train(gates, groups, steps, seed, progress)
        with gates.applied(), torch.no_grad():
            recovered = 1 - float(unseen.kl().mean()) / prompt_kl
    _log.info(
        "held out, the system prompt moves %.3g nats per token; %.1f %% recovered", prompt_kl, 100 * recovered
    )
    told = {
        "system_prompt": system_prompt,
        "prompt_kl": f"{prompt_kl:.4f}",
        "recovered": f"{recovered:.4f}",
    }
    return gates.vector(
        model=adapter.model_id, model_family=adapter.family, method="gated", seed=seed, metadata=told
    )


@dataclass(frozen=True)
class _Chat:
    """An answer of the model under the system prompt, behind the prompt with it and without."""

    prompted: list[int]
    plain: list[int]
    answer: list[int]


def _chats(
    model: nn.Module | ModelAdapter,
    tokenizer: Any,
    system_prompt: str,
    prompts: Sequence[Prompt],
    answer_tokens: int,
    seed: int,
) -> list[_Chat]:
    with_prompt = [_prompted(tokenizer, system_prompt, prompt) for prompt in prompts]
    options = Options("top-p", top_p=0.9, temperature=0.7, max_tokens=answer_tokens, seed=seed)
    call = Generating(model, tokenizer, with_prompt, options)
    rows = call.rows(stream=False)
    decode(call.adapter, rows, call.padding)
    plain = [encode_prompt(tokenizer, _prompted(tokenizer, None, prompt)) for prompt in prompts]
    return [_Chat(row.ids, ids, list(row.chosen)) for row, ids in zip(rows, plain, strict=True) if row.chosen]


def _prompted(tokenizer: Any, system_prompt: str | None, prompt: Prompt) -> Prompt:
    """The prompt under a system prompt, or under none."""
    if isinstance(prompt, str):
        if not has_chat_template(tokenizer):
            return prompt if system_prompt is None else f"{system_prompt} {prompt}"
        prompt = [{"role": "user", "content": prompt}]
    if system_prompt is None:
        return prompt
    messages: Any = prompt
    if not (isinstance(messages, Sequence) and messages and isinstance(messages[0], dict)):
        raise ValidationError(f"a prompt under a system prompt is text or chat messages; got {prompt!r}.")
    return [{"role": "system", "content": system_prompt}, *messages]


class _ChatGroup:
    """Chats that are run together: what the model says under the prompt, and passes without it from a layer on.

    Args:
        adapter: the model.
        chats: at least one.
        layer: below which nothing is edited.
    """

    def __init__(self, adapter: ModelAdapter, chats: Sequence[_Chat], layer: int) -> None:
        self._adapter, self._unembeds = adapter, unembedding_agrees(adapter)
        look = scored_hidden if self._unembeds else scored_logits
        prompted = packs_for(adapter, [(one.prompted, one.answer) for one in chats], scoring=True)
        self.packs = packs_for(adapter, [(one.plain, one.answer) for one in chats], scoring=True)
        with torch.no_grad():
            # Hidden states where they do: logits of a large vocabulary take much memory.
            self._wanted = _by_chat(prompted, [look(adapter, pack) for pack in prompted])
            resumes = self._unembeds and replay_agrees(adapter)
            self._begun = [Resumed(adapter, pack, layer) for pack in self.packs] if resumes else []

    def kl(self) -> Tensor:
        """[N] KL(with the prompt‖as the model is now, without) of each token, differentiable, in nats."""
        adapter = self._adapter
        if not self._unembeds:
            found = _by_chat(self.packs, [scored_logits(adapter, pack) for pack in self.packs])
            return _kl(self._wanted, found)
        ends = [begun.scored() for begun in self._begun] or [scored_hidden(adapter, p) for p in self.packs]
        found = _by_chat(self.packs, ends)
        with torch.no_grad():
            wanted = adapter.unembedding.logits(self._wanted)
        return _kl(wanted, adapter.unembedding.logits(found))


def _by_chat(packs: Sequence[Pack], found: Sequence[Tensor]) -> Tensor:
    """[N, …] what was found for packs' completion tokens, in the order of the chats and their tokens."""
    pairs = torch.cat([pack.pair for pack in packs])
    return torch.cat(list(found))[pairs.argsort(stable=True).to(found[0].device)]


def _kl(wanted: Tensor, found: Tensor) -> Tensor:
    dtype = compute_dtype(found.dtype)
    p, q = wanted.to(dtype).log_softmax(-1), found.to(dtype).log_softmax(-1)
    return divergence(p, q)


class _Gates:
    """The gated vectors that are trained, in units of the stream's norm at their layers."""

    def __init__(self, adapter: ModelAdapter, layers: Sequence[int]) -> None:
        self._adapter, self.layers = adapter, list(layers)
        dtype, device, d = compute_dtype(adapter.dtype), adapter.device, adapter.d_model
        self._size = dict.fromkeys(self.layers, 1.0)
        shape = {"v": (d,), "w": (d,), "c": ()}
        self.parameters: dict[int, dict[str, Tensor]] = {
            layer: {
                name: torch.zeros(size, dtype=dtype, device=device, requires_grad=True)
                for name, size in shape.items()
            }
            for layer in self.layers
        }

    def measure(self, packs: Sequence[Pack]) -> None:
        """Takes the stream's norms, its median over tokens, as units."""
        norms: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}

        def reader(layer: int, pack: Pack) -> ResidualHook:
            def read(hidden: Tensor) -> None:
                norms[layer].append(pack.predictors_of(hidden).detach().float().norm(dim=-1).cpu())

            return read

        with torch.no_grad():
            for pack in packs:
                readers: Any = {layer: reader(layer, pack) for layer in self.layers}
                visit_residuals(self._adapter, pack, readers)
        self._size = {layer: float(torch.cat(found).median()) or 1.0 for layer, found in norms.items()}

    def tensors(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """v, w and c in the stream's own units."""
        one, size = self.parameters[layer], self._size[layer]
        return one["v"] * (size / math.sqrt(one["v"].shape[0])), one["w"] / size, one["c"]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Runs a block in which they edit the model."""

        def editor(layer: int) -> ResidualHook:
            def edit(hidden: Tensor) -> Tensor:
                v, w, c = (part.to(hidden.device) for part in self.tensors(layer))
                wide = hidden.to(v.dtype)
                return (wide + torch.sigmoid(wide @ w + c)[..., None] * v).to(hidden.dtype)

            return edit

        with attach(self._adapter, [(layer, editor(layer)) for layer in self.layers]):
            yield

    def vector(self, **said: Any) -> SteeringVector:
        """What was trained, as a vector."""
        made = {layer: tuple(part.detach().cpu() for part in self.tensors(layer)) for layer in self.layers}
        gates = {layer: TokenGate("sigmoid", w, float(c)) for layer, (_, w, c) in made.items()}
        return SteeringVector({layer: v for layer, (v, _, _) in made.items()}, terms=Terms(gates), **said)


def _train(gates: _Gates, groups: Sequence[_ChatGroup], steps: int, seed: int, progress: bool) -> None:
    """Adam on the mean KL of a group a step, each group in turn in an order drawn anew; the rate falls to zero."""
    parameters = [part for one in gates.parameters.values() for part in one.values()]
    optimizer = torch.optim.Adam(parameters, lr=_RATE)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in tqdm(range(steps), desc="system prompt", unit="step", disable=not progress):
        pause()
        order = order or torch.randperm(len(groups), generator=generator).tolist()
        for settings in optimizer.param_groups:
            settings["lr"] = _RATE * (1 - step / steps)
        with gates.applied():
            loss = groups[order.pop()].kl().mean()
            if not bool(torch.isfinite(loss)):
                raise ValidationError(
                    "the loss is not finite: the model's dtype is too narrow for this training; load it in float32."
                )
            optimizer.zero_grad()
            # Inside, as a model that checkpoints computes its layers anew here.
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def prompt_shift(
    model: nn.Module | ModelAdapter,
    system_prompt: str,
    vector: SteeringVector,
    prompts: Sequence[Prompt],
    tokenizer: Any = None,
    *,
    strength: float = 1.0,
    answer_tokens: int = 20,
    seed: int = 0,
) -> tuple[float, float]:
    """How far a system prompt moves the model, and how far it still is from there with a vector in the prompt's place.

    Args:
        model: a Hugging Face or TransformerLens model.
        system_prompt, prompts, tokenizer, answer_tokens, seed: as for :func:`from_system_prompt`; the prompts should be
            others than those that the vector was trained on.
        vector: the vector.
        strength: multiplies it.

    Returns:
        Mean nats per token over the answers under the prompt: KL(with the prompt‖plain), KL(with the prompt‖steered).
    """
    adapter = adapter_for(model)
    tokenizer = tokenizer if tokenizer is not None else adapter.tokenizer
    chats = _chats(model, tokenizer, system_prompt, prompts, answer_tokens, seed)
    plan = vector.plan(adapter, strength)
    with exclusive(adapter), undisturbed(adapter.hf_model), torch.no_grad():
        group = _ChatGroup(adapter, chats, min(adapter.layer_index(i.layer) for i in plan.interventions))
        plain = float(group.kl().mean())
        with plan.apply(adapter):
            return plain, float(group.kl().mean())
