"""Random models that are decoded, and the ways to decode them: transformers' ``generate`` and the engine's decoder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

from mechanex.engine.decode.request import Steer, TextRequest
from mechanex.engine.decode.row import Row
from mechanex.engine.decode.run import decode
from mechanex.engine.intervention import Edit
from mechanex.engine.models.adapter import ModelAdapter
from mechanex.engine.sae.behavior import Behavior
from mechanex.engine.sae.watching import Watch, WatchingSteering

N_PROMPT = 16
N_EDITS = 8


def llama(
    device: str, dtype: torch.dtype, width: int, n_layers: int, vocab: int, n_heads: int
) -> LlamaForCausalLM:
    """A random Llama, made on the device; grouped queries, tied embeddings, an answer never ends by itself."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=max(1, n_heads // 4),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model.eval().requires_grad_(False)


def prompts(n_rows: int, vocab: int, seed: int = 0, lengths: Sequence[int] = (N_PROMPT,)) -> list[list[int]]:
    """Token ids of prompts of these lengths in turn."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(3, vocab, (lengths[i % len(lengths)],), generator=generator).tolist()
        for i in range(n_rows)
    ]


def clamps(width: int, seed: int = 0, value: float = 1.0) -> list[Edit]:
    """Eight edits of rank 1."""
    generator = torch.Generator().manual_seed(seed)
    return [Edit.clamp(torch.randn(width, generator=generator), value) for _ in range(N_EDITS)]


class Letters:
    """A tokenizer that writes every token as a letter."""

    pad_token_id = None

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return "".join(chr(97 + int(i) % 26) for i in ids)


@dataclass
class Pace:
    """How quickly rows were decoded.

    Attributes:
        rate: steps a second from the second token on.
        first: seconds to the first token.
        whole: seconds of the whole call.
        tokens: what each row was given.
    """

    rate: float
    first: float
    whole: float
    tokens: list[list[int]]


def ours(
    adapter: ModelAdapter,
    given: Sequence[Sequence[int]],
    n_tokens: int,
    edits: Sequence[Edit] = (),
    behaviors: tuple[Behavior, ...] = (),
) -> Pace:
    """The decoder. Every layer of row i is steered by the edit i modulo their number, if there are any, and every row
    is watched for the behaviors."""
    rows = []
    for i, ids in enumerate(given):
        steering = tuple(Steer(layer, edits[i % len(edits)]) for layer in range(adapter.n_layers) if edits)
        watch = Watch(behaviors, "report") if behaviors else None
        request = TextRequest(ids, n_tokens, steering=steering, onlooker=watch)
        rows.append(Row(request, Letters(), (), prompt=(i, len(given))))
    times: list[float] = []

    def tell(_: object) -> bool:
        times.append(time.perf_counter())
        return False

    synchronize(adapter.device)
    begun = time.perf_counter()
    decode(adapter, rows, 0, tell, steering=WatchingSteering(adapter) if behaviors else None)
    synchronize(adapter.device)
    ended = time.perf_counter()
    # Told once a row and step; the second token has been read when its first row is told of it.
    second = times[min(len(rows), len(times) - 1)]
    rate = (n_tokens - 2) / max(ended - second, 1e-9)
    return Pace(rate, times[0] - begun, ended - begun, [row.chosen for row in rows])


class _Times(StoppingCriteria):
    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        self.at.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def theirs(
    model: LlamaForCausalLM, given: Sequence[Sequence[int]], n_tokens: int, cache: str | None = None
) -> Pace:
    """transformers' ``generate`` of rows of one length, greedy.

    Args:
        cache: ``"static"`` for the cache with which the step is compiled.
    """
    ids = torch.tensor([list(row) for row in given], device=model.device)
    times = _Times()
    more = {} if cache is None else {"cache_implementation": cache}
    synchronize(model.device)
    begun = time.perf_counter()
    with torch.no_grad():
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n_tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([times]),
            **more,
        )
    synchronize(model.device)
    ended = time.perf_counter()
    assert found.shape[1] == ids.shape[1] + n_tokens, "generate ended early"
    # Told when a step is launched: from the second time on, all steps but the first are to be waited for.
    rate = (n_tokens - 1) / max(ended - times.at[1], 1e-9)
    return Pace(rate, times.at[0] - begun, ended - begun, found[:, ids.shape[1] :].tolist())


def forget_compiled(model: LlamaForCausalLM) -> None:
    """Drops what transformers has compiled, so that another number of rows is compiled for itself."""
    torch.compiler.reset()
    for name in ("_compiled_call", "_previous_max_cache_length", "_cache"):
        model.__dict__.pop(name, None)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
