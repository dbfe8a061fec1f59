"""The same two tasks in other libraries, on one model in one process: whether results agree, and CPU seconds.

    python -m pip install --no-deps --target build/others repeng==0.4.0 steering-vectors==0.12.2 nnsight==0.8.1 \\
        websocket-client zstandard
    PYTHONPATH=build/others python benchmarks/others.py

Reading: the mean difference (or first principal component) of the residual stream at the last token of answers, at
every layer. Writing: greedy answers to a left-padded batch of chats, a vector added to every token at one layer. Each
library is called as its documentation shows; where it has no such method, in the few lines that its documentation
suggests. Of each task the best of `--rounds` rounds counts, in which the libraries take turns; CPU seconds of one
thread. A library that isn't installed, or fails, is named with the reason.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import numpy
import torch

from mechanex.engine.caa import caa_vectors
from mechanex.engine.directions import pca_vectors
from mechanex.engine.generate import generate_batch
from mechanex.engine.models.resolve import load
from mechanex.engine.vectors import SteeringVector

QUESTIONS = Path(__file__).parent / "behaviors" / "ability.jsonl"
ANSWERS = " Yes", " No"
BATCH = 32


@dataclass
class Task:
    """What every library is given.

    Args:
        model, tokenizer: of transformers, float32.
        prompts: what answers are read after.
        chats: the texts of chats that are answered.
        layer: where the vector is added: what leaves this block, counted from 0.
        vector: ``[d_model]``.
        max_tokens: of an answer.
    """

    model: Any
    tokenizer: Any
    prompts: list[str]
    chats: list[str]
    layer: int
    vector: torch.Tensor
    max_tokens: int
    n_layers: int = field(init=False)

    def __post_init__(self) -> None:
        self.n_layers = len(self.model.model.layers)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return [(prompt + ANSWERS[0], prompt + ANSWERS[1]) for prompt in self.prompts]

    def padded(self, texts: list[str], side: str) -> Any:
        return self.tokenizer(texts, return_tensors="pt", padding=True, padding_side=side)

    def written(self, ids: torch.Tensor) -> list[str]:
        """The answers' texts, from ids that begin with the padded prompts."""
        begin = self.padded(self.chats, "left")["input_ids"].shape[1]
        return self.tokenizer.batch_decode(ids[:, begin:], skip_special_tokens=True)

    def greedy(self) -> dict[str, Any]:
        return {
            "max_new_tokens": self.max_tokens,
            "do_sample": False,
            "pad_token_id": self.tokenizer.pad_token_id,
        }


Vectors = dict[int, torch.Tensor]
Work = Callable[[], Any]


def ours(task: Task) -> dict[str, Work]:
    layers = range(1, task.n_layers + 1)
    positive, negative = ([answer] * len(task.prompts) for answer in ANSWERS)
    examples = (task.prompts, positive, negative)
    vector = SteeringVector({task.layer + 1: task.vector})

    def shifted(found: SteeringVector) -> Vectors:
        return {layer - 1: one for layer, one in found.items()}

    def write() -> list[str]:
        options: dict[str, Any] = {
            "sampling_method": "greedy",
            "max_tokens": task.max_tokens,
            "vector": vector,
        }
        texts = generate_batch(task.model, task.tokenizer, task.chats, **options)
        return [text[len(chat) :] for text, chat in zip(texts, task.chats, strict=True)]

    return {
        "mean": lambda: shifted(caa_vectors(task.model, *examples, layers, task.tokenizer, tokens="last")),
        "component": lambda: shifted(pca_vectors(task.model, *examples, layers, task.tokenizer)),
        "write": write,
    }


def by_hand(task: Task) -> dict[str, Work]:
    """transformers and a hook of one's own: what the others are compared with."""

    def read() -> Vectors:
        sums = torch.zeros(2, task.n_layers, task.model.config.hidden_size)
        for side, texts in enumerate(zip(*task.pairs, strict=True)):
            for begin in range(0, len(texts), BATCH):
                batch = task.padded(list(texts[begin : begin + BATCH]), "left")
                with torch.no_grad():
                    states = blocks_of(task.model, batch)
                sums[side] += torch.stack([state[:, -1].sum(0) for state in states])
        return dict(enumerate((sums[0] - sums[1]) / len(task.prompts)))

    def write() -> list[str]:
        block = task.model.model.layers[task.layer]
        handle = block.register_forward_hook(lambda _module, _args, output: output + task.vector)
        try:
            with torch.no_grad():
                return task.written(task.model.generate(**task.padded(task.chats, "left"), **task.greedy()))
        finally:
            handle.remove()

    return {"mean": read, "write": write}


def blocks_of(model: Any, batch: Any) -> list[torch.Tensor]:
    """What leaves each block; ``hidden_states`` has the last one after the final norm only."""
    found: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(lambda _module, _args, output: found.append(output))
        for block in model.model.layers
    ]
    try:
        model.model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def repeng(task: Task) -> dict[str, Work]:
    numpy.float_ = numpy.float64  # type: ignore[attr-defined]  # it declares numpy<2, and asks for this old name alone
    from repeng import ControlModel, ControlVector, DatasetEntry

    data = [DatasetEntry(positive, negative) for positive, negative in task.pairs]

    def component() -> Vectors:
        task.tokenizer.padding_side = "right"
        try:
            found = ControlVector.train(task.model, task.tokenizer, data, batch_size=BATCH)
        finally:
            task.tokenizer.padding_side = "left"
        return {layer: torch.from_numpy(one) for layer, one in found.directions.items()}

    def write() -> list[str]:
        controlled = ControlModel(task.model, [task.layer])
        try:
            controlled.set_control(ControlVector("llama", {task.layer: task.vector.numpy()}), 1.0)
            with torch.no_grad():
                return task.written(controlled.generate(**task.padded(task.chats, "left"), **task.greedy()))
        finally:
            controlled.unwrap()

    return {"component": component, "write": write}


def steering_vectors(task: Task) -> dict[str, Work]:
    from steering_vectors import SteeringVector as Theirs
    from steering_vectors import train_steering_vector

    def mean() -> Vectors:
        found = train_steering_vector(task.model, task.tokenizer, task.pairs, batch_size=BATCH)
        return dict(found.layer_activations)

    def write() -> list[str]:
        with Theirs({task.layer: task.vector}, "decoder_block").apply(task.model), torch.no_grad():
            return task.written(task.model.generate(**task.padded(task.chats, "left"), **task.greedy()))

    return {"mean": mean, "write": write}


def nnsight(task: Task) -> dict[str, Work]:
    import nnsight as library

    wrapped = library.TransformersModel(task.model, tokenizer=task.tokenizer, task="text-generation")

    def mean() -> Vectors:
        sums = torch.zeros(2, task.n_layers, task.model.config.hidden_size)
        for side, texts in enumerate(zip(*task.pairs, strict=True)):
            for begin in range(0, len(texts), BATCH):
                batch = list(texts[begin : begin + BATCH])
                with torch.no_grad(), wrapped.trace(batch):
                    last = library.save([block.output[:, -1].sum(0) for block in wrapped.model.layers])
                sums[side] += torch.stack(list(last))
        return dict(enumerate((sums[0] - sums[1]) / len(task.prompts)))

    def write() -> list[str]:
        vector, steps, options = task.vector, task.max_tokens, task.greedy()
        with torch.no_grad(), wrapped.generate(task.chats, **options) as tracer:
            for _step in tracer.iter[:steps]:
                wrapped.model.layers[task.layer].output[:] += vector
            ids = tracer.result.save()
        return task.written(ids)

    return {"mean": mean, "write": write}


def transformer_lens(task: Task) -> dict[str, Work]:
    from transformer_lens.model_bridge import TransformerBridge

    # It replaces modules in place, so it gets a model of its own.
    copy = type(task.model)(task.model.config).eval()
    copy.load_state_dict(task.model.state_dict())
    name = task.model.config.name_or_path or "model"
    bridge = TransformerBridge.boot_transformers(name, device="cpu", hf_model=copy, tokenizer=task.tokenizer)
    names = [f"blocks.{layer}.hook_out" for layer in range(task.n_layers)]

    def mean() -> Vectors:
        sums = torch.zeros(2, task.n_layers, task.model.config.hidden_size)
        for side, texts in enumerate(zip(*task.pairs, strict=True)):
            for begin in range(0, len(texts), BATCH):
                batch = task.padded(list(texts[begin : begin + BATCH]), "left")
                with torch.no_grad():
                    _, cache = bridge.run_with_cache(
                        batch["input_ids"], attention_mask=batch["attention_mask"], names_filter=names
                    )
                sums[side] += torch.stack([cache[one][:, -1].sum(0) for one in names])
        return dict(enumerate((sums[0] - sums[1]) / len(task.prompts)))

    def write() -> list[str]:
        texts = []
        # With its cache, answers differ from the model's own on transformers 5.24.
        options: dict[str, Any] = {
            "use_past_kv_cache": False,
            "max_new_tokens": task.max_tokens,
            "verbose": False,
        }
        with bridge.hooks([(names[task.layer], lambda stream, hook: stream + task.vector)]), torch.no_grad():
            for chat in task.chats:
                ids = task.tokenizer(chat, return_tensors="pt")["input_ids"]
                found = bridge.generate(ids, do_sample=False, return_type="tokens", **options)
                texts.append(task.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))
        return texts

    return {"mean": mean, "write": write}


LIBRARIES: dict[str, Callable[[Task], dict[str, Work]]] = {
    "mechanex": ours,
    "transformers": by_hand,
    "repeng": repeng,
    "steering-vectors": steering_vectors,
    "nnsight": nnsight,
    "transformer-lens": transformer_lens,
}


def measured(task: Task, rounds: int) -> dict[str, Any]:
    """For each library and task: the result of the last round, and the least CPU seconds; or why there are none."""
    works: dict[str, dict[str, Work]] = {}
    failed: dict[str, str] = {}
    for name, make in LIBRARIES.items():
        try:
            works[name] = make(task)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
    results: dict[str, dict[str, Any]] = {name: {} for name in works}
    seconds: dict[str, dict[str, float]] = {name: {} for name in works}
    for _ in range(rounds):
        for name, kinds in works.items():
            for kind, work in kinds.items():
                if f"{name}, {kind}" in failed:
                    continue
                begun = time.process_time()
                try:
                    results[name][kind] = work()
                except Exception as error:
                    failed[f"{name}, {kind}"] = f"{type(error).__name__}: {error}"
                    continue
                spent = time.process_time() - begun
                seconds[name][kind] = min(spent, seconds[name].get(kind, spent))
    return {"results": results, "seconds": seconds, "failed": failed}


def compared(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each library and task: how far from the reference, and how many times our seconds."""
    results, seconds = found["results"], found["seconds"]
    rows = []
    for kind, reference in (("mean", "transformers"), ("component", "mechanex"), ("write", "transformers")):
        for name in results:
            if kind not in seconds[name]:
                continue
            row: dict[str, Any] = {"task": kind, "library": name, "seconds": seconds[name][kind]}
            row["times ours"] = seconds[name][kind] / seconds["mechanex"][kind]
            truth, got = results[reference].get(kind), results[name][kind]
            if kind == "write":
                row["agrees"] = sum(a == b for a, b in zip(truth, got, strict=True)) / len(truth)
            else:
                shared = sorted(set(truth) & set(got))
                row["layers"] = len(shared)
                if kind == "mean":
                    row["agrees"] = max(
                        float((truth[i] - got[i].float()).norm() / truth[i].norm()) for i in shared
                    )
                else:
                    cosine = [
                        torch.cosine_similarity(truth[i].float(), got[i].float(), dim=0) for i in shared
                    ]
                    row["agrees"] = float(min(cosine))
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--chats", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    loaded = load(args.model, backend="transformers", dtype="float32")
    tokenizer = loaded.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    lines = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    prompts = [
        f"{one['question']} Is it {one['choices'][i % 4]}?" for i, one in enumerate(lines[: args.prompts])
    ]
    chats = [one["question"] for one in lines[-args.chats :]]
    if tokenizer.chat_template:
        chats = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": chat}], tokenize=False, add_generation_prompt=True
            )
            for chat in chats
        ]
    layer = len(loaded.model.model.layers) // 2
    draw = torch.Generator().manual_seed(0)
    vector = torch.randn(loaded.model.config.hidden_size, generator=draw)
    scale = (
        blocks_of(loaded.model, tokenizer(chats[0], return_tensors="pt"))[layer][0, 1:].norm(dim=-1).mean()
    )
    vector = (0.1 * scale / vector.norm() * vector).detach()
    task = Task(loaded.model, tokenizer, prompts, chats, layer, vector, args.max_tokens)
    found = measured(task, args.rounds)
    rows = compared(found)
    print(
        f"{args.model}, {len(prompts)} pairs, {len(chats)} chats of {args.max_tokens} tokens, {platform.machine()}"
    )
    for name in ("torch", "transformers", *(name for name in LIBRARIES if name != "transformers")):
        print(f"  {name} {importlib.metadata.version(name) if installed(name) else 'not installed'}")
    print("| task | library | layers | agreement | CPU seconds | times ours |\n|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['task']} | {row['library']} | {row.get('layers', '')} | {row['agrees']:.3g} "
            f"| {row['seconds']:.2f} | {row['times ours']:.2f} |"
        )
    for name, why in found["failed"].items():
        print(f"{name}: {why[:300]}")
    if args.out:
        args.out.write_text(json.dumps({"rows": rows, "failed": found["failed"]}, indent=1) + "\n")


def installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
