"""The documented scoring functions: what their options compute, gradients through hooks, both kinds of model."""

from __future__ import annotations

import math

import pytest
import torch
from families import D_MODEL, FAMILIES, build, n_hooks, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from mechanex.engine.hooks import Intervention, SteeringPlan
from mechanex.engine.intervention import Edit
from mechanex.engine.models import lens
from mechanex.engine.score import completion_logprobs
from mechanex.engine.text import encode_pair
from mechanex.errors import ValidationError
from mechanex.utils import steering_opt
from mechanex.utils.steering_opt import (
    get_completion_logprob,
    get_completion_logprob_hf,
    hf_hooks_contextmanager,
    make_activs_hook_hf,
    make_steering_hook_hf,
    make_steering_hook_tflens,
)

TOKENIZER = tiny_tokenizer()
PROMPT, COMPLETION = "The old man at the corner", " sold apples, oranges and flowers"
needs_lens = pytest.mark.skipif(
    not lens.installed(), reason="transformer-lens (the lens extra) is not installed"
)


def vector(seed: int = 0) -> torch.Tensor:
    return torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))


def alone(model, prompt=PROMPT, completion=COMPLETION, coldness=1.0, dtype=torch.float64):
    """[n_tokens] log-probabilities by a plain call of the model."""
    ids, answer = encode_pair(TOKENIZER, prompt, completion)
    logits = model(input_ids=torch.tensor([ids + answer]), use_cache=False).logits[0, len(ids) - 1 : -1]
    return (coldness * logits.to(dtype)).log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


@torch.no_grad()
@pytest.mark.parametrize("do_one_minus", [False, True])
@pytest.mark.parametrize("eps", [0, 1e-6, 0.1])
@pytest.mark.parametrize("coldness", [1, 0.3, 3.0])
@pytest.mark.parametrize("name", ["llama", "bloom", "gemma2"])
def test_every_option_computes_what_it_says(name, coldness, eps, do_one_minus):
    model = build(name)
    p = alone(model, coldness=coldness).exp()
    p = (1 - p if do_one_minus else p) + eps
    options = {"coldness": coldness, "eps": eps, "do_one_minus": do_one_minus}
    joint, values = get_completion_logprob_hf(
        model, PROMPT, COMPLETION, TOKENIZER, return_all_probs=True, **options
    )
    assert values == pytest.approx(p.log().tolist(), rel=1e-4, abs=1e-6)
    assert joint.ndim == 0 and float(joint) == pytest.approx(float(p.log().sum()), rel=1e-4)
    product, values = get_completion_logprob_hf(
        model, PROMPT, COMPLETION, TOKENIZER, return_all_probs=True, do_log=False, **options
    )
    assert values == pytest.approx(p.tolist(), rel=1e-3, abs=1e-9)
    assert float(product) == pytest.approx(float(p.prod()), rel=1e-3)
    only = get_completion_logprob(model, PROMPT, COMPLETION, TOKENIZER, **options)
    assert isinstance(only, torch.Tensor) and torch.equal(only, joint)


def test_logs_stay_exact_where_probabilities_vanish_or_are_certain():
    """log p = -200, and p so close to 1 that 1 - p is lost in float32."""
    model = build("llama")
    ids, answer = TOKENIZER(PROMPT)["input_ids"], [7]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1].double()
        best, second = logits.topk(2).values.tolist()
        cold = 200 / (best - float(logits[answer[0]]))
        unlikely = get_completion_logprob_hf(model, ids, answer, None, coldness=cold)
        assert float(unlikely) == pytest.approx(-200, rel=1e-3)
        lifted = get_completion_logprob_hf(model, ids, answer, None, coldness=cold, eps=1e-6)
        assert float(lifted) == pytest.approx(math.log(1e-6), rel=1e-6)
        # The likeliest token, e^30 times as likely as the next: what is left to all others.
        cold, likeliest = 30 / (best - second), [int(logits.argmax())]
        left = (cold * logits).log_softmax(0)
        left[likeliest] = -math.inf
        certain = get_completion_logprob_hf(model, ids, likeliest, None, coldness=cold, do_one_minus=True)
        assert float(certain) == pytest.approx(float(left.logsumexp(0)), rel=1e-4)


def test_the_logarithm_is_natural():
    with torch.no_grad():
        log = get_completion_logprob_hf(build("llama"), PROMPT, " sold", TOKENIZER)
        p = get_completion_logprob_hf(build("llama"), PROMPT, " sold", TOKENIZER, do_log=False)
    assert float(log) == pytest.approx(math.log(float(p)), rel=1e-3)


@pytest.mark.parametrize("do_log", [True, False])
@pytest.mark.parametrize("do_one_minus", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma2", "mamba"])
def test_gradients_flow_through_hooks_to_the_steering_vector(name, do_one_minus, do_log):
    model = build(name)
    gradients = []
    for plain in (True, False):
        v, w = vector(1).requires_grad_(), vector(2).requires_grad_()
        hooks = [(1, make_steering_hook_hf(v, token=slice(2, None))), (3, make_steering_hook_hf(w))]
        with hf_hooks_contextmanager(model, hooks):
            if plain:
                p = alone(model, coldness=0.5).exp()
                p = (1 - p if do_one_minus else p) + 0.05
                joint = p.log().sum() if do_log else p.prod()
            else:
                joint = get_completion_logprob_hf(
                    model,
                    PROMPT,
                    COMPLETION,
                    TOKENIZER,
                    coldness=0.5,
                    eps=0.05,
                    do_one_minus=do_one_minus,
                    do_log=do_log,
                )
        gradients.append((joint.detach().float(), *torch.autograd.grad(joint, (v, w))))
    for ours, truth in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-3, atol=1e-3 * float(truth.abs().max()))


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom", "gpt2"])
def test_weights_that_require_gradients_get_the_true_ones(name):
    """Their flags are the caller's; embeddings that are tied to the head get both parts."""
    model = FAMILIES[name](tie_word_embeddings=name == "gpt2")
    joint = get_completion_logprob_hf(model, PROMPT, COMPLETION, TOKENIZER)
    joint.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone(model, dtype=torch.float32).sum().backward()
    for n, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(ours[n], p.grad, rtol=1e-3, atol=1e-3 * float(p.grad.abs().max()))
    assert "lm_head.weight" in ours or name in ("gpt2", "bloom")
    assert all(p.requires_grad for p in model.parameters())


def test_there_is_a_graph_only_when_gradients_are_on_and_something_needs_them():
    model, v = FAMILIES["llama"]().requires_grad_(False), vector().requires_grad_()
    assert not get_completion_logprob_hf(model, PROMPT, COMPLETION, TOKENIZER).requires_grad
    with hf_hooks_contextmanager(model, [(1, make_steering_hook_hf(v))]):
        assert get_completion_logprob_hf(model, PROMPT, COMPLETION, TOKENIZER).requires_grad
        for off in (torch.no_grad, torch.inference_mode):
            with off():
                assert not get_completion_logprob_hf(model, PROMPT, COMPLETION, TOKENIZER).requires_grad


def test_steering_that_is_attached_counts_and_equals_the_batched_function():
    model = build("llama")
    plan = SteeringPlan([Intervention(2, Edit.add(vector(3)), tokens=slice(-2, None))])
    with plan.apply(model), torch.no_grad():
        one = get_completion_logprob_hf(model, PROMPT, COMPLETION, TOKENIZER)
    many = completion_logprobs(model, [PROMPT, "A"], [COMPLETION, " woman"], TOKENIZER, edits=plan)
    assert float(one) == pytest.approx(float(many.sums[0]), rel=1e-5)
    with torch.no_grad():
        assert float(get_completion_logprob_hf(model, PROMPT, COMPLETION, TOKENIZER)) != pytest.approx(
            float(one)
        )


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "bloom", "gemma2"])
def test_hooks_see_one_pass_over_the_whole_text(name):
    """Also in the first call for a model, which is when others find out what it can do."""
    model, seen = FAMILIES[name](), []
    with hf_hooks_contextmanager(model, [(2, make_activs_hook_hf(seen))]):
        first = get_completion_logprob_hf(model, PROMPT, COMPLETION, TOKENIZER)
        second = get_completion_logprob_hf(model, PROMPT, COMPLETION, TOKENIZER)
    ids, answer = encode_pair(TOKENIZER, PROMPT, COMPLETION)
    states = model(torch.tensor([ids + answer]), output_hidden_states=True).hidden_states
    assert len(seen) == 2
    for activations in seen:
        torch.testing.assert_close(activations, states[2], rtol=1e-5, atol=1e-5)
    assert float(first) == pytest.approx(float(second), rel=1e-5)


@needs_lens
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_transformer_lens_models_score_as_the_hugging_face_ones(name):
    plain, bridge = build(name), lens.wrap(FAMILIES[name](), name, tiny_tokenizer())
    v = vector(4).requires_grad_()
    gradients = []
    with hf_hooks_contextmanager(plain, [(1, make_steering_hook_hf(v))]):
        truth = get_completion_logprob(plain, PROMPT, COMPLETION, TOKENIZER, use_transformer_lens=False)
    gradients.append(torch.autograd.grad(truth, v)[0])
    with bridge.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", make_steering_hook_tflens(v))]):
        ours = get_completion_logprob(bridge, PROMPT, COMPLETION)
    gradients.append(torch.autograd.grad(ours, v)[0])
    ours, truth = ours.detach(), truth.detach()
    assert float(ours) == pytest.approx(float(truth), rel=1e-4)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3 * float(gradients[0].abs().max()))
    with torch.no_grad():
        unsteered = get_completion_logprob(bridge, PROMPT, COMPLETION)
        assert float(unsteered) == pytest.approx(float(alone(plain).sum()), rel=1e-4)
        assert float(unsteered) != pytest.approx(float(ours), rel=1e-3)


def test_either_kind_of_model_whatever_use_transformer_lens_says():
    with torch.no_grad():
        a = get_completion_logprob(build("llama"), PROMPT, COMPLETION, TOKENIZER)
        b = get_completion_logprob(build("llama"), PROMPT, COMPLETION, TOKENIZER, use_transformer_lens=False)
    assert torch.equal(a, b)


def test_further_arguments_reach_the_model():
    model, seen = FAMILIES["llama"](), {}
    handle = model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.update(kwargs), with_kwargs=True)
    with torch.no_grad():
        plain = get_completion_logprob_hf(model, PROMPT, COMPLETION, TOKENIZER)
        found = get_completion_logprob_hf(
            model, PROMPT, COMPLETION, TOKENIZER, output_hidden_states=True, use_cache=True
        )
    handle.remove()
    assert seen["output_hidden_states"] is True and seen["use_cache"] is False
    assert torch.equal(plain, found)


def test_the_model_is_left_as_it_was_also_after_an_error():
    model = FAMILIES["gpt2"](resid_pdrop=0.5).train()
    model.transformer.h[1].eval()
    model.transformer.wte.weight.requires_grad_(False)

    def state():
        return (
            [m.training for m in model.modules()],
            [p.requires_grad for p in model.parameters()],
            n_hooks(model),
        )

    before = state()
    first = get_completion_logprob_hf(model, PROMPT, COMPLETION, TOKENIZER).detach()
    assert torch.equal(get_completion_logprob_hf(model, PROMPT, COMPLETION, TOKENIZER).detach(), first)
    assert state() == before
    handle = model.transformer.h[3].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        get_completion_logprob_hf(model, PROMPT, COMPLETION, TOKENIZER)
    handle.remove()
    assert state() == before


printable = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=20)


@given(printable, printable)
@settings(deadline=None, max_examples=40)
def test_any_text_scores_as_by_a_plain_call(prompt, completion):
    model = build("gpt2")
    with torch.no_grad():
        if not completion and not prompt.endswith(" "):
            with pytest.raises(ValidationError, match="no tokens"):
                get_completion_logprob_hf(model, prompt, completion, TOKENIZER)
            return
        if not completion:
            return
        joint = get_completion_logprob_hf(model, prompt, completion, TOKENIZER)
        assert float(joint) == pytest.approx(float(alone(model, prompt, completion).sum()), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models_score_in_float32(dtype):
    model = FAMILIES["llama"]().to(dtype)
    v = vector(1).requires_grad_()
    with hf_hooks_contextmanager(model, [(2, make_steering_hook_hf(v))]):
        joint = get_completion_logprob_hf(model, PROMPT, COMPLETION, TOKENIZER)
        with torch.no_grad():
            own = float(alone(model).sum())
    assert joint.dtype == torch.float32 and float(joint.detach()) == pytest.approx(own, rel=2e-2)
    (gradient,) = torch.autograd.grad(joint, v)
    assert gradient.dtype == torch.float32 and bool(gradient.isfinite().all()) and float(gradient.norm()) > 0


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((PROMPT, ""), {}, "no tokens"),
        ((PROMPT, COMPLETION), {"eps": -1}, "0 or more; got -1"),
        ((PROMPT, COMPLETION), {"eps": math.inf}, "0 or more; got inf"),
        ((PROMPT, COMPLETION), {"do_log": False, "eps": math.nan}, "0 or more; got nan"),
        ((PROMPT, COMPLETION), {"coldness": math.inf}, "coldness is a finite number"),
        ((PROMPT, COMPLETION), {"attention_mask": torch.ones(1, 3)}, "attention_mask can't be passed on"),
        ((3, COMPLETION), {}, "A prompt is text"),
        ((PROMPT, [5, 999]), {}, "outside the vocabulary"),
    ],
    ids=str,
)
def test_wrong_input_is_an_error(arguments, options, message):
    with pytest.raises(ValidationError, match=message):
        get_completion_logprob_hf(build("llama"), *arguments, TOKENIZER, **options)


def test_an_empty_prompt_needs_a_bos():
    model, bare = build("llama"), tiny_tokenizer()
    with torch.no_grad():
        assert float(get_completion_logprob_hf(model, "", " sold", TOKENIZER)) < 0
    bare.backend_tokenizer.post_processor = None
    with pytest.raises(ValidationError, match="adds no BOS"):
        get_completion_logprob_hf(model, "", " sold", bare)


def test_no_tokenizer_at_all_is_an_error():
    with pytest.raises(ValidationError, match="needs a tokenizer"):
        get_completion_logprob(FAMILIES["llama"](), PROMPT, COMPLETION)
    with pytest.raises(ValidationError, match="got str"):
        get_completion_logprob("mx-tiny", PROMPT, COMPLETION)


def test_they_are_documented_names():
    for name in ("get_completion_logprob", "get_completion_logprob_hf"):
        assert name in steering_opt.__all__ and getattr(steering_opt, name).__doc__


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "bloom", "gemma2"])
def test_a_models_first_score_has_the_bits_of_later_ones(name):
    """The first pass is the probe of the unembedding too."""
    model = build(name)
    first, second = (
        get_completion_logprob(model, PROMPT, COMPLETION, TOKENIZER, return_all_probs=True)[1]
        for _ in range(2)
    )
    assert first == second
