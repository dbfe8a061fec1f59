"""Scores of many completions at once are those of one call per completion, whatever the model, order and steering."""

from __future__ import annotations

import math

import pytest
import torch
from families import BOS, D_MODEL, FAMILIES, build, n_hooks, sliding_family, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from mechanex import SteeringVector
from mechanex.engine.forward import packs_for
from mechanex.engine.hooks import Intervention, SteeringPlan
from mechanex.engine.intervention import Edit
from mechanex.engine.models import adapter_for
from mechanex.engine.score import completion_logprobs, perplexity, rank_completions
from mechanex.engine.text import encode_pair, encode_prompt
from mechanex.errors import MechanexError, ValidationError
from mechanex.utils.steering_opt import TrainingDatapoint, optimize_vector

TOKENIZER = tiny_tokenizer()
PROMPTS, COMPLETIONS = (
    ["The morning was", "A woman", "A woman"],
    [" cold and quiet.", " sings", " knew every child"],
)
# Ragged, in no order, with a prompt that comes back and an answer of one token.
MANY_PROMPTS = [
    "The morning was",
    "A",
    "What is the capital of France? The capital of France is",
    "The morning was",
]
MANY_COMPLETIONS = [
    [" cold and the street was quiet.", " warm"],
    [" woman opened the window and looked at the river below.", "n", " man"],
    [" Paris", " Rome.", " a city that is full of music in the summer"],
    [" so", " cold"],
]
CHAT = "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}<assistant>"
printable = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=20)


def vector(seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))


def plan(prompt_tokens: int | None = None) -> SteeringPlan:
    """Steers by position: from the end of the prompt, which a call of the model alone must be told."""
    start = -2 if prompt_tokens is None else max(0, prompt_tokens - 2)
    return SteeringPlan(
        [
            Intervention(1, Edit.add(vector(1)), tokens=slice(start, None)),
            Intervention(2, Edit.clamp(vector(2), 0.5)),
            Intervention(-1, Edit.ablate(vector(3)), tokens=slice(1, 4)),
        ]
    )


def flat_pairs(prompts, completions):
    return [(p, c) for p, group in zip(prompts, completions, strict=True) for c in group]


def alone(model, prompt, completion, coldness=1.0):
    """[n_tokens] log-probabilities by one call of the model, as a plain script computes them."""
    ids, answer = encode_pair(TOKENIZER, prompt, completion)
    logits = model(input_ids=torch.tensor([ids + answer]), use_cache=False).logits[0, len(ids) - 1 : -1]
    return (coldness * logits.double()).log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def check(found, truths, rel=1e-4):
    assert len(found) == len(truths)
    for value, tokens, truth in zip(found.sums.tolist(), found.tokens, truths, strict=True):
        assert value == pytest.approx(float(truth.sum()), rel=rel)
        torch.testing.assert_close(tokens.double(), truth, rtol=rel, atol=rel)


@pytest.mark.parametrize("steered", [False, True], ids=["plain", "steered"])
@pytest.mark.parametrize("name", FAMILIES)
def test_many_at_once_equal_one_by_one(name, steered):
    model = build(name)
    truths, hooks = [], n_hooks(model)
    for prompt, completion in flat_pairs(MANY_PROMPTS, MANY_COMPLETIONS):
        by_hand = plan(len(encode_prompt(TOKENIZER, prompt))) if steered else SteeringPlan([])
        with torch.no_grad(), by_hand.apply(model):
            truths.append(alone(model, prompt, completion))
    found = completion_logprobs(
        model, MANY_PROMPTS, MANY_COMPLETIONS, TOKENIZER, edits=plan() if steered else None, batch_tokens=90
    )
    check(found, truths)
    assert found.counts == [2, 3, 3, 2]
    assert n_hooks(model) == hooks
    if steered:
        with plan().apply(model):
            attached = completion_logprobs(model, MANY_PROMPTS, MANY_COMPLETIONS, TOKENIZER)
        torch.testing.assert_close(attached.sums, found.sums, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss"])
def test_long_prompts_with_many_completions_past_and_within_a_sliding_window(name):
    prompts = ["The old man at the corner sold apples, oranges and flowers; he knew every child by name."] * 2
    completions = [
        [f" {word} and {word}" for word in ("cold", "warm", "quiet", "The lawyer", "Paris", "seven")]
    ] * 2
    for window in (8, 48):
        model = sliding_family(name, window)
        with torch.no_grad():
            truths = [alone(model, p, c) for p, c in flat_pairs(prompts, completions)]
        check(completion_logprobs(model, prompts, completions, TOKENIZER), truths)


@given(
    st.lists(
        st.tuples(printable, st.lists(printable.filter(bool), min_size=1, max_size=3)), min_size=1, max_size=3
    ),
    st.sampled_from([1, 40, 4000]),
)
@settings(deadline=None, max_examples=30)
def test_any_text_scores_as_it_does_alone(examples, batch_tokens):
    """Unicode, spaces at the prompt's end, empty prompts (a BOS stays), completions that merge with the prompt."""
    model = build("llama")
    prompts, completions = [p for p, _ in examples], [c for _, c in examples]
    found = completion_logprobs(model, prompts, completions, TOKENIZER, batch_tokens=batch_tokens)
    with torch.no_grad():
        check(found, [alone(model, p, c) for p, c in flat_pairs(prompts, completions)])


def test_a_completion_that_merges_with_its_prompt_and_one_after_a_trailing_space():
    model = build("llama")
    merged = completion_logprobs(model, "The mo", ["rning", "rning was"], TOKENIZER)
    apart = completion_logprobs(
        model, TOKENIZER("The mo")["input_ids"], [TOKENIZER("rning", add_special_tokens=False)["input_ids"]]
    )
    assert float(merged.sums[0]) == pytest.approx(float(apart.sums[0]), rel=1e-5)
    spaced = completion_logprobs(model, ["The morning was ", "The morning was"], ["cold", " cold"], TOKENIZER)
    assert spaced.token_ids[0] == spaced.token_ids[1]
    assert float(spaced.sums[0]) == pytest.approx(float(spaced.sums[1]), rel=1e-6)


def test_the_forms_that_prompts_and_completions_come_in():
    model = build("llama")
    nested = completion_logprobs(model, ["A woman", "The"], [[" sings", " knew"], [" morning"]], TOKENIZER)
    pairs = completion_logprobs(
        model, ["A woman", "A woman", "The"], [" sings", " knew", " morning"], TOKENIZER
    )
    one = completion_logprobs(model, "A woman", [" sings", " knew"], TOKENIZER)
    single = completion_logprobs(model, "A woman", " sings", TOKENIZER)
    torch.testing.assert_close(nested.sums, pairs.sums, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nested.sums[:2], one.sums, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nested.sums[:1], single.sums, rtol=1e-5, atol=1e-5)
    assert (nested.counts, pairs.counts, one.counts) == ([2, 1], [1, 1, 1], [2])
    assert [part.shape[0] for part in nested.sums.split(nested.counts)] == [2, 1]


def test_token_ids_and_chat_messages_score_as_the_text_that_they_stand_for():
    model, tokenizer = build("llama"), tiny_tokenizer()
    tokenizer.chat_template = CHAT
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<bos><user> What is the capital of France? <assistant>"
    answers = [" Paris.", " Rome."]
    by_text = completion_logprobs(model, text, answers, tokenizer)
    ids = encode_prompt(tokenizer, text)
    assert ids.count(BOS) == 1
    as_ids = [tokenizer(a, add_special_tokens=False)["input_ids"] for a in answers]
    for prompt, completions in ((chat, answers), (ids, answers), (ids, as_ids), ([chat], [answers])):
        found = completion_logprobs(model, prompt, completions, tokenizer)
        torch.testing.assert_close(found.sums, by_text.sums, rtol=1e-5, atol=1e-5)
    untokenized = completion_logprobs(model, ids, as_ids)
    torch.testing.assert_close(untokenized.sums, by_text.sums, rtol=1e-5, atol=1e-5)


def test_coldness_multiplies_the_logits():
    model = build("gemma2")
    with torch.no_grad():
        truths = [alone(model, p, c, coldness=2.5) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    check(completion_logprobs(model, PROMPTS, COMPLETIONS, TOKENIZER, coldness=2.5), truths)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_greedy_tells_which_tokens_the_model_would_have_chosen(name):
    model = build(name)
    ids = encode_prompt(TOKENIZER, "The morning was")
    with torch.no_grad():
        chosen = []
        for _ in range(3):
            chosen.append(int(model(torch.tensor([ids + chosen])).logits[0, -1].argmax()))
    other = [*chosen[:2], (chosen[2] + 1) % 300]
    found = completion_logprobs(model, ids, [chosen, other], greedy=True)
    assert [first.tolist() for first in found.greedy] == [[True] * 3, [True, True, False]]
    without = completion_logprobs(model, ids, [chosen, other])
    assert without.greedy is None
    torch.testing.assert_close(found.sums, without.sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_models_of_other_dtypes(name, dtype):
    """float64 to what norms in float32 leave of it; half types as close to float64 truth as one call for each."""
    truth_model, model = FAMILIES[name]().double(), FAMILIES[name]().to(dtype)
    with torch.no_grad():
        exact = torch.cat([alone(truth_model, p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
        own = torch.cat([alone(model, p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
    found = completion_logprobs(model, PROMPTS, COMPLETIONS, TOKENIZER)
    assert found.sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    error, theirs = (torch.cat(found.tokens).double() - exact).norm(), (own - exact).norm()
    assert float(error) <= 2 * float(theirs) + 2e-6


def test_scores_of_one_call_do_not_depend_on_what_else_is_in_it():
    model = build("llama")
    both = completion_logprobs(
        model, ["A woman", MANY_PROMPTS[2]], [[" sings"], MANY_COMPLETIONS[2]], TOKENIZER
    )
    only = completion_logprobs(model, "A woman", [" sings"], TOKENIZER)
    assert float(both.sums[0]) == pytest.approx(float(only.sums[0]), rel=1e-5)


def test_the_ways_to_give_edits():
    model = build("llama")
    steering = SteeringVector({1: vector(1), 3: vector(2)})

    def score(edits):
        return completion_logprobs(model, PROMPTS, COMPLETIONS, TOKENIZER, edits=edits).sums

    with steering.apply(model):
        truth = score(None)
    interventions = [Intervention(1, Edit.add(vector(1))), Intervention(-1, Edit.add(vector(2)))]
    for edits in (
        steering,
        {1: vector(1), -1: vector(2)},
        interventions,
        iter(interventions),
        SteeringPlan(interventions),
    ):
        torch.testing.assert_close(score(edits), truth, rtol=1e-6, atol=1e-6)
    one = score(interventions[0])
    assert not torch.allclose(one, truth)
    assert torch.equal(score(SteeringVector({1: torch.zeros(D_MODEL)})), score(None))
    with SteeringPlan(interventions[:1]).apply(model):
        torch.testing.assert_close(score(interventions[1]), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "bloom", "gemma2", "gpt2", "mamba"])
def test_gradients_are_those_of_one_call_per_completion(name):
    model = build(name)
    model.zero_grad(set_to_none=True)  # others share it
    add, turn = vector(1).requires_grad_(), vector(2).requires_grad_()

    def edits():
        return SteeringPlan(
            [Intervention(1, Edit.add(add)), Intervention(2, Edit.ablate(turn), tokens=slice(1, 6))]
        )

    pairs = flat_pairs(MANY_PROMPTS, MANY_COMPLETIONS)
    weights = torch.linspace(-1, 2, len(pairs))
    with edits().apply(model):
        truth = sum(w * alone(model, p, c).sum() for w, (p, c) in zip(weights, pairs, strict=True))
    expected = torch.autograd.grad(truth, (add, turn))
    found = completion_logprobs(
        model, MANY_PROMPTS, MANY_COMPLETIONS, TOKENIZER, edits=edits(), differentiable=True, batch_tokens=100
    )
    for gradient, wanted in zip(
        torch.autograd.grad((weights * found.sums).sum(), (add, turn)), expected, strict=True
    ):
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    assert all(p.grad is None for p in model.parameters())


def test_gradients_only_when_asked_and_never_in_vain():
    model, v = build("llama"), vector().requires_grad_()
    assert not completion_logprobs(model, PROMPTS, COMPLETIONS, TOKENIZER, edits={1: v}).sums.requires_grad
    with torch.no_grad():
        found = completion_logprobs(model, PROMPTS, COMPLETIONS, TOKENIZER, edits={1: v}, differentiable=True)
    assert found.sums.requires_grad and found.tokens[0].requires_grad
    with pytest.raises(ValidationError, match="nothing that the scores depend on requires gradients"):
        completion_logprobs(model, PROMPTS, COMPLETIONS, TOKENIZER, differentiable=True)


def test_the_model_is_left_as_it_was_also_after_an_error():
    model = FAMILIES["llama"]().train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)

    def state():
        return (
            [m.training for m in model.modules()],
            [p.requires_grad for p in model.parameters()],
            n_hooks(model),
        )

    before = state()
    v = vector().requires_grad_()
    completion_logprobs(
        model, PROMPTS, COMPLETIONS, TOKENIZER, edits={1: v}, differentiable=True
    ).sums.sum().backward()
    assert state() == before and all(p.grad is None for p in model.parameters())

    def fail(*_):
        raise RuntimeError("in the middle")

    handle = model.model.layers[3].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        completion_logprobs(model, PROMPTS, COMPLETIONS, TOKENIZER, edits=plan())
    handle.remove()
    assert state() == before


def test_dropout_plays_no_part():
    model = FAMILIES["gpt2"](resid_pdrop=0.5).train()
    first = completion_logprobs(model, PROMPTS, COMPLETIONS, TOKENIZER).sums
    assert torch.equal(completion_logprobs(model, PROMPTS, COMPLETIONS, TOKENIZER).sums, first)


def test_only_what_is_scored_from_is_run():
    """The prompt once, also where its tree outgrows a row; no last tokens; never the language head."""
    model = build("llama")
    prompt = [5] * 90
    pairs = [(prompt, [10 + i] * 8) for i in range(20)]
    packs = packs_for(adapter_for(model), pairs, scoring=True)
    assert sum(int((p.segment >= 0).sum()) for p in packs) == 90 + 20 * 7
    short = packs_for(adapter_for(model), [([5] * 9, [10 + i] * 9) for i in range(60)], scoring=True)
    assert all(p.input_ids.shape[1] <= 192 for p in short)
    calls = []
    handle = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    completion_logprobs(
        model, prompt, [c for _, c in pairs]
    )  # a hook on the head might change it: it is tried anew
    calls.clear()
    completion_logprobs(model, prompt, [c for _, c in pairs])
    handle.remove()
    assert not calls


def test_a_language_head_of_its_own_kind_is_used_itself():
    model = FAMILIES["llama"]()
    plain = completion_logprobs(FAMILIES["llama"](), PROMPTS, COMPLETIONS, TOKENIZER).sums
    model.lm_head.register_forward_hook(lambda _m, _a, logits: 0.5 * logits)
    with torch.no_grad():
        truths = [alone(model, p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    for greedy in (False, True):
        found = completion_logprobs(model, PROMPTS, COMPLETIONS, TOKENIZER, greedy=greedy)
        check(found, truths)
    assert not torch.allclose(found.sums, plain, rtol=1e-2)


@pytest.mark.parametrize("n_maps", [1, 2])
def test_a_language_head_of_several_modules_is_used_itself(n_maps):
    model = FAMILIES["llama"]()
    width = model.config.hidden_size
    more = [torch.nn.Linear(width, width, bias=False) for _ in range(n_maps - 1)]
    model.lm_head = torch.nn.Sequential(*more, model.lm_head)
    with torch.no_grad():
        truths = [alone(model, p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    for greedy in (False, True):
        check(completion_logprobs(model, PROMPTS, COMPLETIONS, TOKENIZER, greedy=greedy), truths)
    check(completion_logprobs(model, PROMPTS[:1], COMPLETIONS[:1], TOKENIZER), truths[:1])
    data = [TrainingDatapoint("The morning was", dst_completions=[" calm."])]
    options = {"tokenizer": TOKENIZER, "max_iters": 2, "return_info": True}
    assert optimize_vector(model, data, 1, **options)[0].isfinite().all()
    with pytest.raises(ValidationError, match=r"Sequential and no single matrix"):
        _ = adapter_for(model).unembedding


def test_progress_shows_a_bar(capsys):
    completion_logprobs(build("llama"), PROMPTS, COMPLETIONS, TOKENIZER, progress=True)
    assert "Scoring" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        (["a"], ["b", "c"], "1 prompts but 2 completions"),
        ("a", [""], "no tokens"),
        ("a", ["b", ""], "no tokens"),
        ("a", [], "Prompt 0 has no completions"),
        (["a", "b"], ["c", []], "Prompt 1 has no completions"),
        ([], [], "no prompts"),
        (["a"], "b", "1 prompts need a list"),
        (3, ["b"], "got int"),
        ("a", 3, "got int"),
        ([5, 400], ["b"], "outside the vocabulary"),
        ([5, "x"], ["b"], "token ids must hold ints"),
        ([5] * 400, ["b"], "256 positions"),
        ([{"role": "user", "content": "hi"}], ["b"], "no chat template"),
    ],
    ids=str,
)
def test_wrong_input_is_an_error(prompts, completions, message):
    with pytest.raises(ValidationError, match=message):
        completion_logprobs(build("gpt2"), prompts, completions, TOKENIZER)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coldness": math.nan}, "coldness is a finite number"),
        ({"coldness": "1"}, "coldness is a finite number"),
        ({"edits": {9: vector()}}, "Layer 9 does not exist"),
        ({"edits": {1: torch.ones(5)}}, "5 wide"),
        ({"edits": 3}, "got int"),
        ({"edits": [vector()]}, "got Tensor"),
        ({"edits": [Intervention(1, Edit.add(vector()), rows=[0])]}, "lays out its own batches"),
        (
            {"edits": [Intervention(1, Edit.add(vector()), mask=torch.ones(1, 4, dtype=torch.bool))]},
            "own batches",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_options_are_errors(options, message):
    model = build("llama")
    hooks = n_hooks(model)
    with pytest.raises(ValidationError, match=message):
        completion_logprobs(model, PROMPTS, COMPLETIONS, TOKENIZER, **options)
    assert n_hooks(model) == hooks


def test_text_without_a_tokenizer_is_an_error():
    with pytest.raises(ValidationError, match="needs a tokenizer"):
        completion_logprobs(FAMILIES["llama"](), "a", ["b"])


# Ranking


def test_choices_come_best_first_with_their_probabilities():
    model, choices = build("llama"), MANY_COMPLETIONS[2]
    ranked = rank_completions(model, MANY_PROMPTS[2], choices, TOKENIZER)
    with torch.no_grad():
        truth = torch.stack([alone(model, MANY_PROMPTS[2], c).sum() for c in choices])
    assert [r.index for r in ranked] == truth.argsort(descending=True).tolist()
    for r in ranked:
        assert r.choice == choices[r.index]
        assert r.score == r.logprob == pytest.approx(float(truth[r.index]), rel=1e-4)
        assert r.probability == pytest.approx(float(truth.softmax(0)[r.index]), rel=1e-3)
        assert r.n_tokens == len(encode_pair(TOKENIZER, MANY_PROMPTS[2], r.choice)[1])
    assert sum(r.probability for r in ranked) == pytest.approx(1)


def test_normalizations():
    model, prompt = build("llama"), "What is the capital of France? "
    choices = ["Paris", "Rome, and música", "a city"]
    plain = {r.choice: r for r in rank_completions(model, prompt, choices, TOKENIZER)}
    tokens = {r.choice: r for r in rank_completions(model, prompt, choices, TOKENIZER, normalize="tokens")}
    n_bytes = {r.choice: r for r in rank_completions(model, prompt, choices, TOKENIZER, normalize="bytes")}
    for choice, r in plain.items():
        assert tokens[choice].score == pytest.approx(r.logprob / r.n_tokens)
        assert n_bytes[choice].score == pytest.approx(r.logprob / len(choice.encode()))
        assert tokens[choice].logprob == pytest.approx(r.logprob)


def test_bytes_of_token_ids_need_a_tokenizer():
    with pytest.raises(ValidationError, match="needs a tokenizer"):
        rank_completions(build("llama"), [5, 6], [[7], [8]], normalize="bytes")


@pytest.mark.parametrize("neutral", [None, "Answer:"])
def test_the_unconditional_normalization_takes_away_what_is_likely_anywhere(neutral):
    model, prompt, choices = build("llama"), "What is the capital of France? ", ["Paris", "Rome"]
    ranked = rank_completions(
        model, prompt, choices, TOKENIZER, normalize="unconditional", neutral_prompt=neutral, edits=plan()
    )
    before = [BOS] if neutral is None else TOKENIZER(neutral)["input_ids"]
    for r in ranked:
        ids = encode_pair(TOKENIZER, prompt, r.choice)[1]  # " Paris": the same tokens after both prompts
        anywhere = completion_logprobs(model, before, [ids], edits=plan())
        assert r.score == pytest.approx(r.logprob - float(anywhere.sums), abs=1e-4)


def test_equal_choices_stay_in_order_and_steering_counts():
    model = build("llama")
    ranked = rank_completions(model, "A woman", [" sings", " knew", " sings"], TOKENIZER)
    assert [r.index for r in ranked if r.choice == " sings"] == [0, 2]
    steered = rank_completions(model, "A woman", [" sings", " knew"], TOKENIZER, edits={1: 5 * vector(4)})
    assert steered[0].logprob != pytest.approx(ranked[0].logprob, rel=1e-3)


def test_a_ranking_that_can_not_be_made_is_an_error():
    model, tokenizer = build("llama"), tiny_tokenizer()
    with pytest.raises(ValidationError, match="normalize is None, 'tokens'"):
        rank_completions(model, "A", [" b"], tokenizer, normalize="length")
    with pytest.raises(ValidationError, match="goes with normalize='unconditional'"):
        rank_completions(model, "A", [" b"], tokenizer, neutral_prompt="Answer:")
    with pytest.raises(ValidationError, match="has no completions"):
        rank_completions(model, "A", [], tokenizer)
    with pytest.raises(ValidationError, match="got str"):
        rank_completions(model, "A", " b", tokenizer)
    tokenizer.bos_token = None
    with pytest.raises(ValidationError, match="no BOS to stand for it: pass one"):
        rank_completions(model, "A", [" b"], tokenizer, normalize="unconditional")
    broken = FAMILIES["llama"]()
    broken.model.norm.weight.data[0] = math.nan
    with pytest.raises(MechanexError, match="NaN"):
        rank_completions(broken, "A", [" b", " c"], tiny_tokenizer())


# Perplexity


@pytest.mark.parametrize("name", ["llama", "bloom", "cohere", "gemma2"])
def test_perplexity_is_the_mean_over_tokens_of_one_by_one_losses(name):
    model = build(name)
    with torch.no_grad():
        logprobs = torch.cat([alone(model, p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
    expected = math.exp(-float(logprobs.mean()))
    assert perplexity(model, PROMPTS, COMPLETIONS, TOKENIZER) == pytest.approx(expected, rel=1e-4)


def test_perplexity_takes_lists_of_one_length():
    with pytest.raises(ValidationError, match="1 prompts but 2 completions"):
        perplexity(build("llama"), ["a"], ["b", "c"], TOKENIZER)
    with pytest.raises(ValidationError, match="no tokens"):
        perplexity(build("llama"), ["a"], [""], TOKENIZER)
    with pytest.raises(ValidationError, match="got a single text"):
        perplexity(build("llama"), "a", ["b"], TOKENIZER)


@pytest.mark.parametrize("tokens", [None, slice(None, -1), slice(-2, None), 1], ids=str)
@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_steered_by_position_batched_equals_one_by_one(name, tokens):
    model = build(name)
    with SteeringPlan([Intervention(1, Edit.add(vector(0, 3)), tokens=tokens)]).apply(model):
        together = math.log(perplexity(model, PROMPTS, COMPLETIONS, TOKENIZER))
        apart = [
            math.log(perplexity(model, [p], [c], TOKENIZER))
            for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
        ]
    sizes = [len(encode_pair(TOKENIZER, p, c)[1]) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    expected = sum(a * n for a, n in zip(apart, sizes, strict=True)) / sum(sizes)
    assert together == pytest.approx(expected, rel=1e-4)


def test_rows_of_a_batch_mean_nothing_to_the_engines_own_batches():
    model = FAMILIES["llama"]()
    by_row = SteeringPlan([Intervention(1, Edit.add(torch.ones(D_MODEL)), rows=[1])])
    with by_row.apply(model), pytest.raises(ValidationError, match="lays out its own batches"):
        perplexity(model, PROMPTS, COMPLETIONS, TOKENIZER)
    assert perplexity(model, PROMPTS, COMPLETIONS, TOKENIZER) > 1
    assert adapter_for(model).findings["form"] == "plain"


def test_a_text_that_could_not_be_less_likely_is_infinite_not_an_error():
    model = FAMILIES["llama"]()
    model.lm_head.weight.data *= 1e4
    assert perplexity(model, PROMPTS, COMPLETIONS, TOKENIZER) == math.inf


def test_modules_are_walked_once_a_call_and_not_for_every_pack(monkeypatch):
    """A walk takes as long as a layer of a pass."""
    model, walks = build("llama"), []
    named = torch.nn.Module.named_modules

    def counted(module, *args, **kwargs):
        walks.extend([1] * (module is model and not args))
        return named(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "named_modules", counted)
    found = []
    for batch_tokens in (8192, 16):
        completion_logprobs(model, PROMPTS, COMPLETIONS, TOKENIZER, batch_tokens=batch_tokens)
        walks.clear()
        completion_logprobs(model, PROMPTS, COMPLETIONS, TOKENIZER, batch_tokens=batch_tokens)
        found.append(len(walks))
    assert found[0] == found[1] <= 3
