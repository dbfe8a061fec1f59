"""Whether edges name the fact that an answer was copied from, and whether documents without the answer give none.

How often the chunk that holds the answer costs its tokens most; and of true answers that no document holds: how often
no edge is validated. The bundled model is asked the kind of question that it was trained on, and those count that it
answers right with the fact and not without it: it guesses too. SmolLM2-135M-Instruct (where a home with it is named) is
given answers that it can only copy.

    [MECHANEX_REAL_HOME=HOME] python benchmarks/raag_facts.py [--questions 50] [--absent 20]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from facts import Asked, copied_facts, given_sentences

from mechanex.engine.models.resolve import LoadedModel, load
from mechanex.engine.raag.answer import answer_questions
from mechanex.engine.raag.documents import question_text

HELD_OUT = 100_000
"""First seed of the questions, none of which anything was tuned on."""


def copies(loaded: LoadedModel, asked: Asked) -> bool:
    """Whether the model's own answer begins with the true one, and no more without the fact."""
    where = asked.where
    without = [one for i, one in enumerate(asked.sentences) if i != where]
    return _answers(loaded, asked, asked.sentences) and not _answers(loaded, asked, without)


def _answers(loaded: LoadedModel, asked: Asked, sentences: Sequence[str]) -> bool:
    text = f"{' '.join(sentences)} {question_text(asked.question)}"
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids
    wanted = len(loaded.tokenizer(f" {asked.answer}", add_special_tokens=False).input_ids)
    out = loaded.model.generate(ids, max_new_tokens=wanted, do_sample=False)[0, ids.shape[1] :]
    written = loaded.tokenizer.decode(out, skip_special_tokens=True).strip()
    return bool(written.startswith(asked.answer.removesuffix(".")))


def traced(loaded: LoadedModel, asked: Asked, **options: Any) -> dict[str, Any]:
    """What the true answer rests on."""
    entry = {"question": asked.question, "answer": asked.answer}
    docs = [{"text": sentence} for sentence in asked.sentences]
    found = answer_questions(loaded.model, loaded.tokenizer, [entry], docs, **options)
    data: dict[str, Any] = found["data_by_question"]["0"]
    return data


def show(
    name: str,
    loaded: LoadedModel,
    make: Callable[..., Asked],
    counts: Callable[[LoadedModel, Asked], bool],
    questions: int,
    absent: int,
) -> None:
    """Prints both shares."""
    every = (make(HELD_OUT + i) for i in range(20 * questions))
    first = tried = 0
    for asked in islice((one for one in every if counts(loaded, one)), questions):
        drops = torch.tensor(traced(loaded, asked, n_removed=0, shuffles=0)["scores"]["blocked"])
        tried += 1
        first += int(drops.amax(1).argmax()) == asked.where
    print(f"{name}: the chunk with the answer first in {first} of {tried} questions", flush=True)
    silent = 0
    for i in range(absent):
        found = traced(loaded, make(HELD_OUT + i, absent=True))
        silent += not found["validated"]["validated_edges"]
    print(f"{name}: no validated edge for {silent} of {absent} answers that no document holds", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--absent", type=int, default=20)
    parser.add_argument("--only", choices=("mx-tiny", "smollm2"))
    asked = parser.parse_args()
    if asked.only != "smollm2":
        loaded = load("mx-tiny", backend="transformers", device="cpu")
        show("mx-tiny", loaded, given_sentences, copies, asked.questions, asked.absent)
    home = os.environ.get("MECHANEX_REAL_HOME")
    if home and asked.only != "mx-tiny":
        loaded = load(f"{home}/models/smollm2-135m", backend="transformers", device="cpu", dtype="float32")
        every = partial(show, "SmolLM2-135M-Instruct", loaded, copied_facts, lambda *_: True)
        every(asked.questions, asked.absent)


if __name__ == "__main__":
    main()
