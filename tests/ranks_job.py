"""What every process of a job does in test_ranks.py; writes what it found to a file of its own: OUT/RANK.pt."""

from __future__ import annotations

import io
import os
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import torch

import mechanex.distributed
from mechanex.bundled import data_path
from mechanex.cli import main as main_command
from mechanex.engine import activation_files
from mechanex.engine.activations import activations
from mechanex.engine.attribution.edge_scores import attribution_edges
from mechanex.engine.attribution.scores import attribution_scores
from mechanex.engine.caa import caa_vectors
from mechanex.engine.conditions.fitting import fit_condition
from mechanex.engine.datasets import read_pairs
from mechanex.engine.directions import pca_vectors, probe_vectors
from mechanex.engine.doses.calibrate import calibrate
from mechanex.engine.models import adapter_for
from mechanex.engine.models.resolve import load
from mechanex.engine.ranks import current_ranks
from mechanex.engine.sae.train import train_sae
from mechanex.engine.sae.train_step import TrainingSettings
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


def attributed() -> dict[str, Any]:
    """What an answer hangs on, by gradients on the way, by patching and by edges; and how faithful circuits are."""
    loaded = load("mx-tiny", backend="transformers")
    prompts = "Anna went home. She was calm. She", "Anna went home. She was angry. She"
    told: dict[str, Any] = {}
    options: dict[str, dict[str, Any]] = {
        "gradient": {"steps": 5},
        "exact": {"method": "exact"},
        "dropped": {"drop_layers": True},
    }
    for name, chosen in options.items():
        found = attribution_scores(loaded.model, *prompts, tokenizer=loaded.tokenizer, **chosen)
        told[name] = {**found.scores, **found.positions}
    for name in ("gradient", "exact"):
        edges = attribution_edges(
            loaded.model,
            *prompts,
            tokenizer=loaded.tokenizer,
            method=name,  # type: ignore[arg-type]
            steps=3 if name == "gradient" else 1,
        )
        told[name + " edges"] = list(edges.scores.values())
    told["curve"] = edges.curve().faithfulness
    return told


def trained(out: str) -> dict[str, Any]:
    """Autoencoders under each rule, and what they are worth."""
    loaded = load("mx-tiny", backend="transformers")
    texts = read_pairs(data_path("calm_angry"), split="train").positive_answers[:120]
    told: dict[str, Any] = {}
    for rule in ("topk", "batchtopk", "jumprelu"):
        settings = TrainingSettings(
            rule,  # type: ignore[arg-type]
            n_features=128,
            k=8,
            steps=12,
            batch=128,
            buffer=512,
            dead_after=300,
        )
        found = train_sae(
            loaded.model, texts, settings=settings, tokenizer=loaded.tokenizer, out=f"{out}/{rule}"
        )
        told[rule] = found.sae.encoder, found.sae.decoder, found.sae.bias, found.sae.threshold
        told[rule] = [one for one in told[rule] if one is not None]
        if rule != "batchtopk":  # whose threshold is an activation, so that rounding decides about its equals
            told[rule + " report"] = [found.report[name] for name in ("l0", "dead", "loss_spliced")]
    return told


COMMANDS = (
    "activations mx-tiny texts.txt acts --layer 3",
    "attribute mx-tiny --clean CLEAN --corrupted CORRUPTED",
    "attribute mx-tiny --clean CLEAN --corrupted CORRUPTED --edges --circuit 5",
    "score mx-tiny --prompt CLEAN --completion _was --completion _is",
    "optimize mx-tiny --data rome_delhi --split promote --layer 2 --max-iters 4 --out optimized",
    "sae train mx-tiny --data texts.txt --out sae --steps 4 --batch 64 --buffer 256 --features 32 --k 4",
    "sweep mx-tiny --data calm_angry --split train --layer 3 --strength 0.5 --strength 1 --edit add --tokens all "
    "--finalists 2 --max-tokens 8 --out swept",
    "measure mx-tiny --vector optimized/vector.safetensors --data calm_angry --split heldout --most 6 --max-tokens 8 "
    "--out measured",
    "orthogonalize mx-tiny optimized/vector.safetensors orthogonal",
)


def commands(folder: str) -> list[Any]:
    """How each heavy command ends, one after another, and what it has printed in this process."""
    os.chdir(folder)
    if mechanex.distributed.is_first():
        Path("texts.txt").write_text("Anna went to the market. She was calm and bought bread.\n\n" * 60)
    with current_ranks(None).together():
        pass
    words = {"CLEAN": "Anna went home. She was calm. She", "CORRUPTED": "Anna went home. She was angry. She"}
    ended: list[Any] = []
    for line in COMMANDS:
        printed = io.StringIO()
        arguments = [
            words.get(word, word.replace("_was", " was").replace("_is", " is")) for word in line.split()
        ]
        with redirect_stdout(printed), redirect_stderr(printed):
            try:
                main_command(arguments)
            except SystemExit as end:
                ended.append((line, end.code, printed.getvalue()))
    return ended


def failing() -> None:
    """Passes of which the second process's meet an error, and the others would take a quarter of an hour."""
    loaded = load("mx-tiny", backend="transformers")
    model = adapter_for(loaded.model)
    data = read_pairs(data_path("calm_angry"), split="train")
    texts = data.prompts[:150], data.positive_answers[:150]
    completion_logprobs(model, *texts, loaded.tokenizer)

    def hook(*_: Any) -> None:
        if mechanex.distributed.rank() == 1:
            raise RuntimeError("the second process is out of memory")
        time.sleep(10)

    model.layers[3].register_forward_hook(hook)
    completion_logprobs(model, *texts, loaded.tokenizer, batch_tokens=30)


def kept(folder: str, slowly: str = "") -> dict[str, Any]:
    """Activations in files, of which each process writes some, and in memory."""
    loaded = load("mx-tiny", backend="transformers")
    if slowly:
        adapter_for(loaded.model).layers[0].register_forward_hook(lambda *_: time.sleep(float(slowly)))
    prompts = read_pairs(data_path("calm_angry"), split="train").prompts[:60]
    given: dict[str, Any] = {"layers": [2, 5], "tokenizer": loaded.tokenizer, "tokens": "all"}
    with mock.patch.object(activation_files, "SHARD_TOKENS", 64):
        found = activations(loaded.model, prompts, out=folder, **given)
    told = {f"in files {layer}": torch.from_numpy(numpy.asarray(rows)) for layer, rows in found.items()}
    if not slowly:
        memory = activations(loaded.model, prompts, **given)
        told |= {f"in memory {layer}": torch.from_numpy(rows) for layer, rows in memory.items()}
    return {"lengths": found.lengths, **told}


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
    jobs = (found, attributed, trained, commands, failing, kept, optimized)
    told = {job.__name__: job for job in jobs}[what](*more)  # type: ignore[operator]
    torch.save(told, Path(out) / f"{mechanex.distributed.rank()}.pt")


if __name__ == "__main__":
    main()
