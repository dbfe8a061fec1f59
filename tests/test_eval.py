"""The lm-evaluation-harness gets from our adapter what its own Hugging Face model gives it, and steered models too."""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
import runpy
import sys

import pytest

# Read once, when they are imported.
os.environ["HF_DATASETS_OFFLINE"] = "1"
lm_eval = pytest.importorskip("lm_eval", reason="lm-eval (the eval extra) is not installed")
pytest.importorskip("accelerate", reason="accelerate, which the harness's own model needs, is not installed")

import torch  # noqa: E402
from families import BOS, D_MODEL, FAMILIES, MAX_POSITIONS, build, tiny_tokenizer  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from mechanex import SteeringVector  # noqa: E402
from mechanex.engine.hooks import Intervention, SteeringPlan  # noqa: E402
from mechanex.engine.intervention import Edit  # noqa: E402
from mechanex.engine.models.resolve import load  # noqa: E402
from mechanex.engine.score import completion_logprobs  # noqa: E402
from mechanex.errors import NotFoundError, ValidationError  # noqa: E402
from mechanex.eval import LM  # noqa: E402
from mechanex.eval.sampling import generation_options  # noqa: E402

DOCUMENTS = [
    {
        "text": "Anna went to the market on Friday.",
        "choices": [" She took a slow breath.", " He shouted.", " She"],
    },
    {"text": "What is the capital of France? ", "choices": ["Paris", "Rome", "London is a city in England."]},
    {"text": "", "choices": ["Leo is kind.", "Where is Leo?", " "]},
]
MULTIPLE_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{text}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": 0,
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}{{choices | join('')}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}
GENERATE = {
    "output_type": "generate_until",
    "doc_to_text": "{{text}}",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 12},
    "metric_list": [{"metric": "exact_match"}],
}
TASKS = {"mx_choice": MULTIPLE_CHOICE, "mx_rolling": ROLLING, "mx_generate": GENERATE}


@pytest.fixture(scope="module")
def tiny():
    return load("mx-tiny", backend="transformers")


@pytest.fixture(scope="module")
def calm():
    generator = torch.Generator().manual_seed(0)
    return SteeringVector(
        {3: torch.randn(128, generator=generator), 4: torch.randn(128, generator=generator)}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks as YAML over a JSONL file."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.jsonl").write_text("".join(json.dumps(d) + "\n" for d in DOCUMENTS), encoding="utf-8")
    for name, settings in TASKS.items():
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(folder / "data.jsonl")},
                "cache_dir": str(folder / "cache"),
            },
            "test_split": "test",
            **settings,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    return folder


def evaluate(model, folder, tasks=tuple(TASKS), **options):
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **options
    )


def answers(found, task):
    """Per document, what the model answered: (log-likelihood, greedy) pairs, log-likelihoods or texts."""
    return [sample["filtered_resps"] for sample in found["samples"][task]]


def assert_same(ours, theirs):
    for name in ("mx_choice", "mx_rolling"):
        for a, b in zip(answers(ours, name), answers(theirs, name), strict=True):
            if name == "mx_choice":
                assert [greedy for _, greedy in a] == [greedy for _, greedy in b]
                a, b = [score for score, _ in a], [score for score, _ in b]
            assert a == pytest.approx(b, rel=1e-4)
        for metric, value in theirs["results"][name].items():
            if isinstance(value, float):
                assert ours["results"][name][metric] == pytest.approx(value, rel=1e-4)
    assert answers(ours, "mx_generate") == answers(theirs, "mx_generate")


def test_scores_and_texts_are_those_of_the_harness_own_model(tiny, folder):
    theirs = evaluate(HFLM(pretrained=tiny.model, tokenizer=tiny.tokenizer, batch_size=2), folder)
    ours = evaluate(LM(tiny), folder)
    assert_same(ours, theirs)
    assert ours["config"]["model_id"] == "mx-tiny" and ours["config"]["steering_strength"] is None


def test_a_steered_model_scores_as_the_harness_own_model_under_the_same_steering(
    tiny, calm, folder, tmp_path
):
    calm.save(tmp_path / "calm.safetensors")
    with calm.apply(tiny.model, strength=-3):
        theirs = evaluate(HFLM(pretrained=tiny.model, tokenizer=tiny.tokenizer), folder)
    ours = evaluate(LM("mx-tiny", vector=tmp_path / "calm.safetensors", strength=-3), folder)
    assert_same(ours, theirs)
    plain = evaluate(LM(tiny), folder, ["mx_choice"])
    for steered, unsteered in zip(answers(ours, "mx_choice"), answers(plain, "mx_choice"), strict=True):
        assert all(abs(a - b) > 1e-2 for (a, _), (b, _) in zip(steered, unsteered, strict=True))
    assert ours["config"]["steering_strength"] == -3
    assert ours["config"]["steering_norm_by_layer"] == pytest.approx(
        {str(n): x for n, x in calm.norms().items()}
    )
    by_hand = completion_logprobs(
        tiny.model, DOCUMENTS[0]["text"], DOCUMENTS[0]["choices"], tiny.tokenizer, edits=-3 * calm
    )
    assert [score for score, _ in answers(ours, "mx_choice")[0]] == pytest.approx(
        by_hand.sums.tolist(), rel=1e-4
    )


def requests(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma2"])
def test_texts_longer_than_the_context_are_cut_as_the_harness_cuts_them(name, caplog):
    """gpt2 has a table of positions: a window that fills it may not be longer by the token that is only predicted."""
    model, tokenizer = build(name), tiny_tokenizer()
    texts = ["The morning was cold. " * 90, "A woman opened the window.", "¿Dónde está? 東京"]
    context = "He was calm when he heard the news. " * 40
    options = {"max_length": 64} if name == "bloom" else {}
    ours, theirs = (
        LM(model, tokenizer=tokenizer, **options),
        HFLM(pretrained=model, tokenizer=tokenizer, **options),
    )
    assert ours.max_length == theirs.max_length <= MAX_POSITIONS
    for kind, arguments in (
        ("loglikelihood_rolling", [(text,) for text in texts]),
        ("loglikelihood", [(context, " She was not."), (context, " n"), ("a ", "b"), ("", "b")]),
    ):
        found = getattr(ours, kind)(requests(kind, arguments), disable_tqdm=True)
        expected = getattr(theirs, kind)(requests(kind, arguments), disable_tqdm=True)
        if kind == "loglikelihood":
            assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
            found, expected = [score for score, _ in found], [score for score, _ in expected]
        assert found == pytest.approx(expected, rel=1e-4)


def test_what_the_harness_own_model_gives_for_greedy_answers_and_prefixes():
    model, tokenizer = build("llama"), tiny_tokenizer()
    ours, theirs = LM(model, tokenizer=tokenizer), HFLM(pretrained=model, tokenizer=tokenizer)
    (text,) = ours.generate_until(requests("generate_until", [("The morning was", {"max_gen_toks": 4})]))
    found = ours.loglikelihood(
        requests("loglikelihood", [("The morning was", text), ("The morning was", "x")])
    )
    expected = theirs.loglikelihood(
        requests("loglikelihood", [("The morning was", text), ("The morning was", "x")])
    )
    assert [g for _, g in found] == [g for _, g in expected] and found[1][1] is False
    for strings in ("The morning", "<bos>The morning", ""):
        assert ours.tok_encode(strings) == theirs.tok_encode(strings)
    assert ours.prefix_token_id == theirs.prefix_token_id == BOS
    assert LM(model, tokenizer=tokenizer, prefix_token_id=7).prefix_token_id == 7
    assert LM(model, tokenizer=tokenizer, add_bos_token=False).tok_encode("The")[0] != BOS


def test_the_model_type_is_registered_and_made_from_an_argument_string(calm, tmp_path):
    assert get_model("mechanex") is LM
    calm.save(tmp_path / "calm.gguf")
    made = LM.create_from_arg_string(
        f"pretrained=mx-tiny,vector={tmp_path / 'calm.gguf'},strength=-2.5,dtype=float64",
        {"batch_size": "auto"},
    )
    assert made.strength == -2.5 and made.vector.layers == calm.layers
    assert made.adapter.dtype == torch.float64 and made.batch_size > 1


def test_the_command_line_takes_a_steered_model(calm, folder, tmp_path, monkeypatch, capsys):
    calm.save(tmp_path / "calm.safetensors")
    arguments = f"pretrained=mx-tiny,vector={tmp_path / 'calm.safetensors'},strength=2"
    command = [
        "--model",
        "mechanex",
        "--model_args",
        arguments,
        "--tasks",
        "mx_choice",
        "--include_path",
        str(folder),
    ]
    output = ["--output_path", str(tmp_path / "out"), "--log_samples"]
    monkeypatch.setattr(sys, "argv", ["mechanex.eval", *command, *output])
    monkeypatch.setattr(logging.root, "handlers", list(logging.root.handlers))
    # The harness's own thousands of tasks take ten seconds to look through.
    few = functools.partialmethod(TaskManager.__init__, include_defaults=False)
    monkeypatch.setattr(TaskManager, "__init__", few)
    runpy.run_module("mechanex.eval", run_name="__main__")
    assert "mx_choice" in capsys.readouterr().out
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["config"]["steering_strength"] == 2
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    first = next(s for s in map(json.loads, samples.read_text().splitlines()) if s["doc_id"] == 0)
    by_hand = LM("mx-tiny", vector=calm, strength=2).loglikelihood(
        requests("loglikelihood", [(DOCUMENTS[0]["text"], c) for c in DOCUMENTS[0]["choices"]])
    )
    assert [float(r[0]) for r in first["filtered_resps"]] == pytest.approx([s for s, _ in by_hand], rel=1e-4)


def test_generation_follows_the_tasks_settings(tiny, calm):
    lm = LM(tiny, vector=calm, strength=2, batch_size=2)
    settings = {
        "until": [" and"],
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 20,
        "max_gen_toks": 30,
        "seed": 3,
    }
    prompts = ["Anna went to the market on Friday.", "Leo", "Dear Maria, it is Sunday"]
    texts = lm.generate_until(requests("generate_until", [(p, settings) for p in prompts]), disable_tqdm=True)
    again = lm.generate_until(requests("generate_until", [(p, settings) for p in prompts]), disable_tqdm=True)
    assert texts == again and any(texts) and not any(" and" in text for text in texts)
    greedy = lm.generate_until(requests("generate_until", [(p, {"max_gen_toks": 30}) for p in prompts]))
    assert greedy != texts
    repeats = lm.generate_until(requests("generate_until", [(prompts[0], settings)] * 5), disable_tqdm=True)
    assert len(set(repeats)) > 2


def test_chat_templates(tiny):
    lm, chat = LM(tiny), [{"role": "user", "content": "Where is Leo?"}]
    theirs = HFLM(pretrained=tiny.model, tokenizer=tiny.tokenizer)
    assert lm.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    open_end = [*chat, {"role": "assistant", "content": "Leo is"}]
    assert lm.apply_chat_template(open_end, False) == theirs.apply_chat_template(open_end, False)
    assert lm.chat_template(True) == theirs.chat_template(True)
    assert lm.tokenizer_name == theirs.tokenizer_name


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"max_tokens": 99, "sampling_method": "greedy", "stop": ["</s>"]}),
        ({"do_sample": False, "temperature": 0.0, "top_p": 0.9}, {"sampling_method": "greedy"}),
        (
            {"do_sample": True, "temperature": 0.5},
            {"sampling_method": "top-p", "top_p": 1.0, "temperature": 0.5},
        ),
        ({"temperature": 0.5, "top_p": 0.8}, {"sampling_method": "top-p", "top_p": 0.8, "temperature": 0.5}),
        ({"do_sample": True, "top_k": 5, "top_p": 1.0}, {"sampling_method": "top-k", "top_k": 5}),
        ({"until": ["a", "", "b"], "max_new_tokens": 7}, {"stop": ["a", "b", "</s>"], "max_tokens": 7}),
        ({"num_beams": 1, "repetition_penalty": 1.0}, {"sampling_method": "greedy"}),
    ],
    ids=str,
)
def test_generation_settings(settings, expected):
    given = json.loads(json.dumps(settings))
    found = generation_options(given, 99, "</s>")
    assert {name: found[name] for name in expected} == expected
    assert given == settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "num_beams"),
        ({"do_sample": True, "top_k": 5, "top_p": 0.5}, "several methods"),
    ],
    ids=str,
)
def test_generation_settings_that_the_engine_has_not_are_errors(settings, message):
    with pytest.raises(ValidationError, match=message):
        generation_options(settings, 99, "</s>")


def test_what_can_not_be_evaluated_is_an_error(tiny, calm):
    with pytest.raises(NotFoundError, match="neither the id of a stored vector nor a vector file"):
        LM(tiny, vector="nonsense")
    with pytest.raises(ValidationError, match="128 wide"):
        LM(build("llama"), tokenizer=tiny_tokenizer(), vector=calm)
    with pytest.raises(ValidationError, match="carries no tokenizer"):
        LM(FAMILIES["llama"]())
    with pytest.raises(ValidationError, match="revision can't be given"):
        LM(tiny, revision="main")
    lm = LM(tiny)
    with pytest.raises(ValidationError, match="continuation has no tokens"):
        lm.loglikelihood(requests("loglikelihood", [("a", "")]))
    with pytest.raises(ValidationError, match="more than the context"):
        lm.loglikelihood(requests("loglikelihood", [("a", " went to the market" * 300)]))
    with pytest.raises(ValidationError, match="lower max_gen_toks"):
        lm.generate_until(requests("generate_until", [("a", {"max_gen_toks": 600})]))


def test_a_gpu_that_is_not_there_is_said_and_not_needed(caplog, monkeypatch):
    """The harness's command line asks for one by default."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING, "mechanex"):
        assert LM("mx-tiny", device="cuda:0").device.type == "cpu"
    assert any("no CUDA device" in record.message for record in caplog.records)


def test_other_steering_of_the_model_counts_too(tiny):
    """As everywhere in the engine: what is attached to a model when it is called."""
    ask = requests("loglikelihood", [("Leo", " went home.")])
    plan = SteeringPlan([Intervention(2, Edit.add(torch.ones(128)))])
    with plan.apply(tiny.model):
        ((attached, _),) = LM(tiny).loglikelihood(ask)
    assert attached == pytest.approx(LM(tiny, vector={2: torch.ones(128)}).loglikelihood(ask)[0][0], rel=1e-5)
    assert D_MODEL != 128


def test_without_the_harness_the_import_says_what_to_install(monkeypatch):
    for name in [n for n in sys.modules if n.startswith("mechanex.eval")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[eval\]'"):
        importlib.import_module("mechanex.eval")


def test_a_misspelt_argument_is_no_argument_of_the_loader() -> None:
    with pytest.raises(ValueError, match=r"'vektor' is no argument.*did you mean 'vector'"):
        importlib.import_module("mechanex.eval").LM.create_from_arg_string("pretrained=mx-tiny,vektor=a")
