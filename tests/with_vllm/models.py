"""Small random models in float32, and what transformers and this project's engine make of a prompt that is steered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mechanex.engine.decode.request import Steer, TextRequest
from mechanex.engine.decode.row import Row
from mechanex.engine.decode.run import decode
from mechanex.engine.intervention import Edit
from mechanex.engine.models import adapter_for
from mechanex.engine.models.resolve import load
from mechanex.vllm import SteerBy
from mechanex.vllm.asked import Scope, in_scope

WIDTH, LAYERS, VOCABULARY = 128, 4, 512
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
N_NEW = 12


def save_random(
    folder: Path, kind: str = "llama", seed: int = 0, embedding_size: float = 0.7, **options: Any
) -> Path:
    """A random model of this kind, saved; weights of usual sizes, so that steering changes what it says."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**SIZES, **options})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                is_embedding = any(part in name for part in ("emb", "wte", "wpe"))
                parameter.normal_(0, embedding_size if is_embedding else 1.2 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    return folder


@cache
def hf_model(folder: Path) -> Any:
    """The model in transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@dataclass(frozen=True)
class Case:
    """A prompt, and its steering: as this package is asked for it, and as edits at layers.

    Args:
        prompt: token ids.
        asked: what ``LLM.generate`` is given.
        steers: layer, edit (strength included) and tokens.
    """

    prompt: tuple[int, ...]
    asked: Any = None
    steers: tuple[tuple[int, Edit, Scope], ...] = ()


def vectors(width: int = WIDTH, seed: int = 1) -> dict[str, dict[int, Edit]]:
    """Vectors by id: two that add, one of them at two layers; a clamp; one of rank 2 behind a gate; both ends."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, size: float = 1.0) -> Tensor:
        return size * torch.randn(*shape, width, generator=generator)

    a, b, c = random(), random(), random()
    return {
        "a": {2: Edit.add(a)},
        "b": {1: Edit.add(b), 3: Edit.add(c)},
        "clamp": {2: Edit.clamp(a, 3.0)},
        "low": {1: Edit.affine(random(size=0.5), random(2, size=0.3), random(2, size=0.3))},
        "gated": {3: Edit.add(3 * c).gated("sigmoid", random(size=0.1))},
        "first": {0: Edit.add(c)},
        "last": {LAYERS: Edit.add(3 * a)},
    }


def batch(known: dict[str, dict[int, Edit]], vocabulary: int = VOCABULARY) -> list[Case]:
    """The requests that are answered together; the first eight need neither gates nor a second rank."""
    generator = torch.Generator().manual_seed(2)
    long = tuple(torch.randint(3, vocabulary, (130,), generator=generator).tolist())
    short = long[:7]

    def case(prompt: tuple[int, ...], *by: SteerBy) -> Case:
        steers = tuple(
            (layer, edit.scaled(one.strength), one.tokens)
            for one in by
            for layer, edit in known[one.vector].items()
            if one.layers is None or layer in one.layers
        )
        return Case(prompt, list(by), steers)

    return [
        case(short),
        case(short, SteerBy("a", 3.0)),
        case(long, SteerBy("b", -2.0)),
        case(long, SteerBy("a", 1.5), SteerBy("b", 1.0)),
        case(long, SteerBy("b", 2.0, tokens="prompt")),
        case(long, SteerBy("b", 2.0, tokens="generated")),
        case(long, SteerBy("clamp")),
        case(short, SteerBy("a", 1.0)),
        case(long, SteerBy("b", 2.0, layers=[3], tokens=slice(-40, None, 3))),
        case(short, SteerBy("first"), SteerBy("last")),
        case(long, SteerBy("low", 0.7)),
        case(long, SteerBy("gated", 2.0), SteerBy("clamp")),
        case(long),
    ]


@torch.no_grad()
def by_transformers(model: Any, case: Case, n: int = N_NEW) -> list[int]:
    """What the model says next, token by token: every pass over the whole text, edits by plain hooks and arithmetic."""
    layers = adapter_for(model).layers
    ids = list(case.prompt)

    def edited(x: Tensor, site: int) -> Tensor:
        for layer, edit, tokens in case.steers:
            if layer != site:
                continue
            where = torch.tensor([bool(in_scope(tokens, i, len(case.prompt))) for i in range(x.shape[1])])
            change = edit.bias
            if edit.left is not None and edit.right is not None:
                change = change + (x @ edit.right.T) @ edit.left
            if edit.gate is not None:
                change = change * torch.sigmoid(x @ edit.gate.weight[0] + edit.gate.offset)[..., None]
            x = torch.where(where[None, :, None], x + change, x)
        return x

    def before(site: int) -> Callable[..., Any]:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            if args:
                return (edited(args[0], site), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": edited(kwargs["hidden_states"], site)}

        return hook

    def after(module: Any, args: Any, out: Any) -> Any:
        if isinstance(out, Tensor):
            return edited(out, len(layers))
        return (edited(out[0], len(layers)), *out[1:])

    handles = [layer.register_forward_pre_hook(before(i), with_kwargs=True) for i, layer in enumerate(layers)]
    handles.append(layers[-1].register_forward_hook(after))
    try:
        for _ in range(n):
            logits = model(torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
    finally:
        for handle in handles:
            handle.remove()
    return ids[len(case.prompt) :]


def by_engine(model: Any, cases: Sequence[Case], n: int = N_NEW) -> list[list[int]]:
    """What this project's own loop makes of them, in one batch."""
    tokenizer = load("mx-tiny", backend="transformers").tokenizer

    def selector(tokens: Scope, length: int) -> Any:
        return {"prompt": slice(0, length), "generated": slice(length, None)}.get(tokens, tokens)  # type: ignore[arg-type]

    rows = []
    for i, case in enumerate(cases):
        steering = tuple(
            Steer(layer, edit, tokens if isinstance(tokens, slice) else selector(tokens, len(case.prompt)))
            for layer, edit, tokens in case.steers
        )
        request = TextRequest(case.prompt, max_tokens=n, steering=steering)
        rows.append(Row(request, tokenizer, (), prompt=(i, len(cases))))
    decode(adapter_for(model), rows, 0)
    return [row.chosen for row in rows]


def by_vllm(llm: Any, cases: Sequence[Case], n: int = N_NEW) -> list[list[int]]:
    """What vLLM makes of them, in one batch."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": list(case.prompt)} for case in cases]
    answers = llm.generate(prompts, params, steering=[case.asked for case in cases], use_tqdm=False)
    return [list(answer.outputs[0].token_ids) for answer in answers]


__all__ = ["Case", "batch", "by_engine", "by_transformers", "by_vllm", "hf_model", "save_random", "vectors"]
