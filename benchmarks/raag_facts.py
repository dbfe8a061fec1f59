"""Whether edges name the fact that an answer was copied from, and whether documents without the answer give none.

Of questions that the model answers right (greedily, the true answer first): how often the chunk that holds the answer
costs its tokens most. Of true answers that no document holds: how often no edge is validated. The bundled model is asked
the kind of question that it was trained on, SmolLM2-135M (where a home with it is named) about facts that it can only copy.

    [MECHANEX_REAL_HOME=HOME] python benchmarks/raag_facts.py [--questions 50] [--absent 20]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
from facts import Asked, copied_facts, given_sentences

from mechanex.engine.models.resolve import LoadedModel, load
from mechanex.engine.raag.answer import answer_questions
from mechanex.engine.raag.documents import question_text

HELD_OUT = 100_000
"""First seed of the questions, none of which anything was tuned on."""


def answers_right(loaded: LoadedModel, asked: Asked) -> bool:
    """Whether the model's own answer begins with the true one."""
    text = f"{' '.join(asked.sentences)} {question_text(asked.question)}"
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids
    wanted = len(loaded.tokenizer(f" {asked.answer}", add_special_tokens=False).input_ids)
    out = loaded.model.generate(ids, max_new_tokens=wanted, do_sample=False)[0, ids.shape[1] :]
    written = loaded.tokenizer.decode(out, skip_special_tokens=True).strip()
    return bool(written.startswith(asked.answer.rstrip(".")))


def traced(loaded: LoadedModel, asked: Asked, **options: Any) -> dict[str, Any]:
    """What the true answer rests on."""
    entry = {"question": asked.question, "answer": asked.answer}
    docs = [{"text": sentence} for sentence in asked.sentences]
    found = answer_questions(loaded.model, loaded.tokenizer, [entry], docs, **options)
    data: dict[str, Any] = found["data_by_question"]["0"]
    return data


def show(name: str, loaded: LoadedModel, make: Callable[..., Asked], questions: int, absent: int) -> None:
    """Prints both shares."""
    right = first = seed = 0
    while right < questions and seed < 5 * questions:
        asked = make(HELD_OUT + seed)
        seed += 1
        if answers_right(loaded, asked):
            right += 1
            drops = torch.tensor(traced(loaded, asked, n_removed=0, shuffles=0)["scores"]["blocked"])
            first += int(drops.amax(1).argmax()) == asked.where
    print(f"{name}: {right} of {seed} questions answered right; the chunk with the answer first in {first}")
    silent = sum(
        not traced(loaded, make(HELD_OUT + i, absent=True))["validated"]["validated_edges"] for i in range(absent)
    )
    print(f"{name}: {absent} answers that no document holds; no validated edge in {silent}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--absent", type=int, default=20)
    parser.add_argument("--only", choices=("mx-tiny", "smollm2"))
    asked = parser.parse_args()
    if asked.only != "smollm2":
        loaded = load("mx-tiny", backend="transformers", device="cpu")
        show("mx-tiny", loaded, given_sentences, asked.questions, asked.absent)
    home = os.environ.get("MECHANEX_REAL_HOME")
    if home and asked.only != "mx-tiny":
        loaded = load(f"{home}/models/smollm2-135m", backend="transformers", device="cpu", dtype="float32")
        show("SmolLM2-135M-Instruct", loaded, copied_facts, asked.questions, asked.absent)


if __name__ == "__main__":
    main()
