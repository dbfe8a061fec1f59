"""What a process of a job does in test_split.py, or one alone; writes what it found to OUT/RANK.pt."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import mechanex.distributed
from mechanex import SteeringVector
from mechanex.engine.activations import activations
from mechanex.engine.attribution.scores import attribution_scores
from mechanex.engine.caa import caa_vectors
from mechanex.engine.doses.forced import ForcedAnswers
from mechanex.engine.generate import generate, generate_batch, stream
from mechanex.engine.logit_lens import logit_lens
from mechanex.engine.models import adapter_for
from mechanex.engine.models.resolve import LoadedModel, load
from mechanex.engine.orthogonalize import orthogonalize
from mechanex.engine.sae.hook_points import HookPoint, check_point
from mechanex.engine.score import completion_logprobs
from mechanex.engine.text import encode_pair
from mechanex.engine.token_shifts import token_shifts
from mechanex.errors import MechanexError
from mechanex.utils.optimization import TrainingDatapoint, optimize_vector

PROMPTS = ["The morning was cold", "What is", "She said that the bread", "Nothing is better than a good book"]
YES, NO = (
    [" and calm", " music", " was warm", "."],
    [" and angry", " the weather", " was not", " and a letter"],
)


def opened(folder: str, how: str) -> LoadedModel:
    """A model that is whole, or split by ``"tp"`` or ``"fsdp"``."""
    loaded = load(folder, backend="transformers", dtype="float32", tp="auto" if how == "tp" else None)
    if how == "fsdp":
        assert mechanex.distributed.size() == 2
        for module in (*adapter_for(loaded.model).layers, loaded.model):
            fully_shard(module, mesh=init_device_mesh(loaded.model.device.type, (2,)))
    return loaded


def found(folder: str, how: str = "") -> dict[str, Any]:
    """What a user does with a model, split over the processes or whole."""
    loaded = opened(folder, how)
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = torch.tensor([tokenizer(PROMPTS[3])["input_ids"][:8]], device=model.device)
    told: dict[str, Any] = {}
    with torch.no_grad():
        told["logits"] = model(ids).logits
    vector = caa_vectors(model, PROMPTS, YES, NO, [1, 2])
    told["caa"] = dict(vector)
    with vector.apply(model, strength=0.5), torch.no_grad():
        told["steered logits"] = model(ids).logits
    both = [[a, b] for a, b in zip(YES, NO, strict=True)]
    told["scores"] = completion_logprobs(model, PROMPTS, both, edits=vector).sums
    told["activations"] = dict(activations(model, PROMPTS, [1, 4], tokens="all"))
    points = [
        TrainingDatapoint(p, dst_completions=[yes], src_completions=[no])
        for p, yes, no in zip(PROMPTS, YES, NO, strict=True)
    ]
    told["optimized"], info = optimize_vector(
        model, points, 2, lr=0.1, max_iters=8, seed=3, tokenizer=tokenizer
    )
    told["loss"] = info["loss"]
    adapter = adapter_for(model)
    pairs = [encode_pair(tokenizer, p, yes) for p, yes in zip(PROMPTS, YES, strict=True)]
    edits = vector.plan(adapter, 0.5).interventions
    told["kl"] = ForcedAnswers(adapter, pairs).under([edits])[0].kl
    told["shifts"] = [one.kl for shifts in token_shifts(adapter, pairs, edits) for one in shifts]
    texts = generate_batch(
        model, tokenizer, PROMPTS, vector=vector, strength=2.0, sampling_method="greedy", max_tokens=12
    )
    told["greedy tokens"] = [tokenizer(text)["input_ids"] for text in texts]
    told["drawn tokens"] = tokenizer(generate(model, tokenizer, PROMPTS[0], seed=5, max_tokens=12))[
        "input_ids"
    ]
    if how:
        told["unseeded"] = generate(model, tokenizer, PROMPTS[0], max_tokens=12)
        pieces = stream(model, tokenizer, PROMPTS[0], seed=1, max_tokens=100)
        told["pieces"] = [next(pieces) for _ in range(4)]
        pieces.close()  # type: ignore[attr-defined]
        told["after"] = generate(model, tokenizer, PROMPTS[1], sampling_method="greedy", max_tokens=6)
    return told


def refused(folder: str, without_plan: str) -> dict[str, str]:
    """What is said where something can't be done with a split model."""
    told: dict[str, str] = {}

    def note(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except MechanexError as error:
            told[name] = str(error)

    loaded = opened(folder, "tp")
    model, vector = loaded.model, SteeringVector({1: torch.ones(adapter_for(loaded.model).d_model)})
    with mechanex.distributed.alone():
        note("alone", lambda: completion_logprobs(model, PROMPTS, YES))
    note("attribution", lambda: attribution_scores(model, PROMPTS[0], PROMPTS[0]))
    note("orthogonal", lambda: orthogonalize(model, vector))
    note("heads", lambda: check_point(adapter_for(model), HookPoint("attn_z", 1)))
    note("lens", lambda: logit_lens(model, PROMPTS, tokenizer=loaded.tokenizer))
    note("number", lambda: load(folder, tp=3))
    note("kind", lambda: load(folder, tp="all"))
    note("device", lambda: load(folder, tp="auto", device="cpu"))
    note("plan", lambda: load(without_plan, tp="auto", backend="transformers"))
    return told


def main() -> None:
    out, what, *rest = sys.argv[1:]
    told: Any = refused(*rest) if what == "refused" else {folder: found(folder, what) for folder in rest}
    torch.save(told, Path(out) / f"{mechanex.distributed.rank()}.pt")


if __name__ == "__main__":
    main()
