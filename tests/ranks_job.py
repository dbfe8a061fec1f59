"""What every process of a job does in test_ranks.py; writes what it found to a file of its own: OUT/RANK.pt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

import mechanex.distributed
from mechanex.bundled import data_path
from mechanex.engine.activations import activations
from mechanex.engine.caa import caa_vectors
from mechanex.engine.conditions.fitting import fit_condition
from mechanex.engine.datasets import read_pairs
from mechanex.engine.directions import pca_vectors, probe_vectors
from mechanex.engine.doses.calibrate import calibrate
from mechanex.engine.models import adapter_for
from mechanex.engine.models.resolve import load
from mechanex.engine.score import completion_logprobs, rank_completions
from mechanex.utils.optimization import TrainingDatapoint, optimize_vector
from mechanex.utils.optimize_many import optimize_vector_minibatch_hf


def found() -> dict[str, Any]:
    """Everything that processes share, on the bundled model."""
    loaded = load("mx-tiny", backend="transformers")
    model, tokenizer = adapter_for(loaded.model), loaded.tokenizer
    model.tokenizer = tokenizer
    data = read_pairs(data_path("calm_angry"), split="train")
    some = data.prompts[:10], data.positive_answers[:10], data.negative_answers[:10]
    told: dict[str, Any] = {}
    for method in (caa_vectors, pca_vectors, probe_vectors):
        told[method.__name__] = dict(method(model, *some, [2, 5]))
    scored = completion_logprobs(
        model, some[0], [[a, b] for a, b in zip(*some[1:], strict=True)], greedy=True
    )
    told["sums"], told["tokens"], told["greedy"] = scored.sums, scored.tokens, scored.greedy
    told["ranked"] = [(one.index, one.logprob) for one in rank_completions(model, some[0][0], some[1][:4])]
    points = [
        TrainingDatapoint(prompt, dst_completions=[yes], src_completions=[no])
        for prompt, yes, no in zip(*some, strict=True)
    ]
    options: dict[str, Any] = {"lr": 0.1, "max_iters": 8, "tokenizer": tokenizer, "seed": 3}
    told["optimized"], info = optimize_vector(model, points, 3, **options)
    told["loss"] = info["loss"]
    told["in minibatches"] = optimize_vector_minibatch_hf(
        model,
        tokenizer,
        some[0],
        3,
        dst_completions=some[1][:1],
        minibatch_size=3,
        lr=0.1,
        max_iters=8,
        seed=3,
    )[0]
    told["noisy"], _ = optimize_vector(model, points[:4], 3, noise_scale=0.5, **options)
    unseeded = {name: value for name, value in options.items() if name != "seed"}
    told["unseeded"], _ = optimize_vector(model, points[:4], 3, **unseeded)
    vector = caa_vectors(model, *some, [4])
    dose = calibrate(model, vector, prompts=some[0][:6], max_tokens=12).calibration
    told["dose"] = None if dose is None else dose.strength
    condition = fit_condition(model, data.positive_answers[:12], data.negative_answers[:12], [3, 5])
    told["condition"] = condition.weight, condition.threshold, condition.layer
    return told


def failing() -> None:
    """A pass in which the second process meets an error."""
    loaded = load("mx-tiny", backend="transformers")
    model = adapter_for(loaded.model)

    def hook(*_: Any) -> None:
        if mechanex.distributed.rank() == 1:
            raise RuntimeError("the second process is out of memory")

    model.layers[3].register_forward_hook(hook)
    data = read_pairs(data_path("calm_angry"), split="train")
    completion_logprobs(model, data.prompts[:24], data.positive_answers[:24], loaded.tokenizer)


def kept(folder: str) -> dict[str, Any]:
    """Activations in files, which the first process alone reads and writes."""
    loaded = load("mx-tiny", backend="transformers")

    def hook(*_: Any) -> None:
        assert mechanex.distributed.is_first()

    adapter_for(loaded.model).layers[0].register_forward_hook(hook)
    prompts = read_pairs(data_path("calm_angry"), split="train").prompts[:6]
    found = activations(loaded.model, prompts, [2, 5], loaded.tokenizer, tokens="all", out=folder)
    return {"lengths": found.lengths, **{str(layer): rows.tolist() for layer, rows in found.items()}}


def optimized(checkpoint: str) -> Any:
    """A longer optimization, which may be stopped at any moment and goes on from its checkpoint."""
    loaded = load("mx-tiny", backend="transformers")
    data = read_pairs(data_path("calm_angry"), split="train")
    some = data.prompts[:12], data.positive_answers[:12]
    points = [TrainingDatapoint(p, dst_completions=[a]) for p, a in zip(*some, strict=True)]
    options: dict[str, Any] = {"lr": 0.05, "max_iters": 60, "seed": 3, "checkpoint": checkpoint or None}
    vector, info = optimize_vector(loaded.model, points, 3, tokenizer=loaded.tokenizer, **options)
    return {"vector": vector, "iters": info["iters"]}


def main() -> None:
    what, out, *more = sys.argv[1:]
    told = {"found": found, "failing": failing, "kept": kept, "optimized": optimized}[what](*more)  # type: ignore[operator]
    torch.save(told, Path(out) / f"{mechanex.distributed.rank()}.pt")


if __name__ == "__main__":
    main()
