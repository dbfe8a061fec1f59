"""The bundled model: it loads offline, writes its language, and can be steered."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import pytest
import torch

from mechanex import bundled
from mechanex.engine.caa import caa_vectors
from mechanex.engine.datasets import read_pairs
from mechanex.engine.models.resolve import LoadedModel, load
from mechanex.engine.text import encode_prompt
from mechanex.engine.vectors import SteeringVector
from mechanex.errors import NotFoundError

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts")]

import steerability  # noqa: E402
import tones  # noqa: E402
import train_tiny  # noqa: E402
from tiny import grammar, pairs  # noqa: E402

DATASETS = ("calm_angry", "kind_rude", "hopeful_gloomy", "true_false", "paris_rome")


@pytest.fixture(scope="module", autouse=True)
def _one_thread(_threads: None) -> Iterator[None]:
    # Batches this small only wait for each other on more.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load("mx-tiny", backend="transformers")


def lines_of(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in bundled.data_path(name).read_text().splitlines()]


def sentences_of(text: str) -> set[str]:
    # A full stop inside quotation marks ends no sentence of the text.
    found, open_part = set(), ""
    for part in re.split(r'(?<=[.!?"]) (?=["A-Z])', text.strip()):
        open_part += part + " "
        if open_part.count('"') % 2 == 0:
            found.add(open_part.strip())
            open_part = ""
    return found


def test_loads_with_transformers_alone_and_offline() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = bundled.model_path("mx-tiny")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert model.dtype == torch.float32
    assert len(tokenizer) == model.config.vocab_size
    assert {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token} == {"<s>", "</s>", "<pad>"}


def test_is_small() -> None:
    files = [path for path in Path(bundled.__file__).parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if "__pycache__" not in path.parts) < 5_000_000


def test_names_what_there_is() -> None:
    assert "mx-tiny" in bundled.model_names()
    with pytest.raises(NotFoundError, match="mx-tiny"):
        bundled.model_path("mx-huge")
    with pytest.raises(NotFoundError, match="calm_angry"):
        bundled.data_path("hot_cold")
    assert bundled.data_path("calm_angry.jsonl") == bundled.data_path("calm_angry")


def test_text_begins_with_one_bos(loaded: LoadedModel) -> None:
    tokenizer: Any = loaded.tokenizer
    messages = [{"role": "user", "content": "Where is Paris?"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for prompt in ("Tom went home.", "<s>Tom went home.", messages, chat):
        ids = encode_prompt(tokenizer, prompt)
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.eos_token_id not in ids


def test_tokenizer_gives_any_text_back(loaded: LoadedModel) -> None:
    text = 'A "naïve" café — 東京, 3 × 4\n\ttabs  and spaces '
    ids = loaded.tokenizer(text)["input_ids"]
    assert loaded.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_answers_what_it_learned(loaded: LoadedModel) -> None:
    tokenizer = loaded.tokenizer
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "Where is Paris?"}])
    end = tokenizer.convert_tokens_to_ids(grammar.END)
    assert end in loaded.model.generation_config.eos_token_id
    out = loaded.model.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False)
    assert "Paris is in France." in tokenizer.decode(out[0, len(ids) :])


def test_perplexity_on_fresh_text(loaded: LoadedModel) -> None:
    measured = train_tiny.perplexity(loaded.model, loaded.tokenizer, seed=5, n_rows=64)
    assert measured < 3.2


@pytest.mark.parametrize("name", DATASETS)
def test_datasets_are_contrastive_and_split(name: str) -> None:
    lines = lines_of(name)
    parts: dict[str, set[str]] = {"train": set(), "heldout": set()}
    for line in lines:
        assert set(line) == {"prompt", "positive", "negative", "split"}
        assert line["positive"].startswith(" ") and line["negative"].startswith(" ")
        assert line["positive"] != line["negative"]
        for key in ("prompt", "positive", "negative"):
            parts[line["split"]] |= sentences_of(line[key])
    assert all(sum(line["split"] == split for line in lines) >= 40 for split in parts)
    assert parts["train"].isdisjoint(parts["heldout"])
    assert len({line["prompt"] + line["positive"] for line in lines}) == len(lines)
    assert len(read_pairs(bundled.data_path(name), split="heldout")) >= 40


@pytest.mark.parametrize("name", DATASETS)
def test_datasets_come_from_the_script(name: str) -> None:
    assert lines_of(name) == pairs.dataset(name, seed=0)


def test_prompts_are_neutral() -> None:
    toned = {word for words in bundled.tone_words().values() for word in words}
    prompts = {line["prompt"] for name in DATASETS for line in lines_of(name)}
    assert not {p for p in prompts if toned & set(tones.words_of(p))}


def test_tone_words_belong_to_one_tone() -> None:
    words = bundled.tone_words()
    assert words == grammar.tone_words()
    every = [word for group in words.values() for word in group]
    assert len(every) == len(set(every))
    assert min(map(len, words.values())) >= 30


def test_corpus_follows_from_its_seed() -> None:
    first, again, other = (list(islice(grammar.documents(seed), 20)) for seed in (3, 3, 4))
    assert first == again != other


def test_judges_know_the_tones() -> None:
    assert min(tones.accuracy(500).values()) > 0.9


@pytest.fixture(scope="module")
def vectors(loaded: LoadedModel) -> dict[str, SteeringVector]:
    """The three contrasts at layer 4, of the train split."""
    found = {}
    for name in steerability.PAIRS:
        train = read_pairs(bundled.data_path(name), split="train")
        answers = train.positive_answers, train.negative_answers
        found[name] = caa_vectors(loaded.model, train.prompts, *answers, [4], loaded.tokenizer)
    return found


def heldout_prompts(name: str, n: int) -> list[str]:
    return [str(prompt) for prompt in read_pairs(bundled.data_path(name), split="heldout").prompts[:n]]


@pytest.mark.parametrize(("name", "strength"), [("calm_angry", -0.8), ("hopeful_gloomy", 0.8)])
def test_steering_sets_the_tone(
    loaded: LoadedModel, vectors: dict[str, SteeringVector], name: str, strength: float
) -> None:
    tone = name.split("_")[strength < 0]
    prompts = heldout_prompts(name, 32)
    plain = steerability.sample(loaded, prompts, 1, seed=11)
    steered = steerability.sample(loaded, prompts, 1, seed=12, vector=vectors[name], strength=strength)
    assert steered.share(tone) - plain.share(tone) >= 0.4
    assert steered.perplexity / plain.perplexity <= steerability.MOST_PERPLEXITY


def test_an_opposite_strength_gives_the_opposite_tone(
    loaded: LoadedModel, vectors: dict[str, SteeringVector]
) -> None:
    prompts, vector = heldout_prompts("kind_rude", 32), vectors["kind_rude"]
    kind, rude = (steerability.sample(loaded, prompts, 1, seed=5, vector=vector, strength=s) for s in (1, -1))
    assert kind.share("kind") > 0.5 > 0.1 > kind.share("rude")
    assert rude.share("rude") > 0.5 > 0.1 > rude.share("kind")


def test_the_three_contrasts_are_different_directions(vectors: dict[str, SteeringVector]) -> None:
    for one, other in combinations(vectors.values(), 2):
        assert abs(one.cosine_similarity(other)[4]) < 0.4
