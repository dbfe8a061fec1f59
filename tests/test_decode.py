"""The decoder: what transformers' own generate writes, for every model, however rows are put together and steered."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES, N_VOCAB, SLIDING, build, n_hooks, sliding_family, tiny_tokenizer
from families import _family as family
from families import _like_llama as like_llama
from test_lens import HookedTransformer
from transformers import GenerationMixin, LlamaForCausalLM
from transformers.generation import logits_process

from mechanex import ValidationError
from mechanex.engine.capabilities.decoding import form, rolls
from mechanex.engine.decode.decoder import Decoder
from mechanex.engine.decode.draw import Draws
from mechanex.engine.decode.request import Steer, TextRequest
from mechanex.engine.decode.row import Row
from mechanex.engine.decode.run import decode
from mechanex.engine.generate import generate_batch, stream
from mechanex.engine.hooks import Intervention, SteeringPlan
from mechanex.engine.intervention import Edit
from mechanex.engine.models import adapter_for
from mechanex.engine.sampling import Sampling
from mechanex.errors import MechanexError

PROMPTS = ("The morning was cold and", "She", "He knew every child by name, and the old man at the")
N_NEW = 6


@pytest.fixture
def no_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' ``generate`` can't be called."""

    def called(*_: Any, **__: Any) -> Any:
        raise AssertionError("transformers' generate was called")

    monkeypatch.setattr(GenerationMixin, "generate", called)


def ids_of(prompts: tuple[str, ...] = PROMPTS) -> list[list[int]]:
    return [tiny_tokenizer()(text).input_ids for text in prompts]


def truth(model: Any, ids: list[int], n: int = N_NEW) -> list[int]:
    inputs = torch.tensor([ids])
    with torch.no_grad():
        found = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=n,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return found[0, len(ids) :].tolist()


def written(model: Any, requests: list[TextRequest], tokenizer: Any = None) -> list[list[int]]:
    """The tokens that the decoder adds to each prompt, together."""
    n = len(requests)
    rows = [Row(one, tokenizer or tiny_tokenizer(), (), prompt=(i, n)) for i, one in enumerate(requests)]
    decode(adapter_for(model), rows, 0)
    return [row.chosen for row in rows]


RECURRENT = {
    "qwen3_next": like_llama(
        "Qwen3Next",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=48,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"] * 2,
    ),
    "rwkv": family("Rwkv", hidden_size=48, num_hidden_layers=2, attention_hidden_size=48),
}


def model_of(family: str) -> Any:
    name, _, windowed = family.partition(" ")
    if name in RECURRENT:
        return RECURRENT[name]()
    return sliding_family(name, 8) if windowed else build(name)


@pytest.mark.parametrize("family", [*FAMILIES, *(f"{name} with a window" for name in SLIDING), *RECURRENT])
def test_greedy_tokens_are_those_of_transformers_generate(family: str) -> None:
    model = model_of(family)
    hooks = n_hooks(model)
    ids = ids_of()
    expected = [truth(model, one) for one in ids]
    assert written(model, [TextRequest(one, N_NEW) for one in ids]) == expected
    assert written(model, [TextRequest(ids[2], N_NEW)]) == expected[2:]
    adapter = adapter_for(model)
    assert rolls(adapter) == (family not in (*RECURRENT, "mamba"))
    assert form(adapter, 1) == "unmasked"
    assert n_hooks(model) == hooks


@pytest.mark.usefixtures("no_generate")
@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_nothing_goes_through_transformers_generate(family: str) -> None:
    model, tokenizer = FAMILIES[family](), tiny_tokenizer()
    texts = generate_batch(model, tokenizer, list(PROMPTS), max_tokens=5, seed=0)
    assert "".join(stream(model, tokenizer, PROMPTS[1], max_tokens=5, seed=1)) == texts[1]


# Models that keep what they have read in ways of their own


class _Renamed(LlamaForCausalLM):
    """A model whose forward has a name of its own for the cache."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        memory: Any = None,
        **rest: Any,
    ) -> Any:
        assert "past_key_values" not in rest and "cache" not in rest
        known = {_Renamed.cache_name: memory}
        found = super().forward(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, **known, **rest
        )
        kept = getattr(found, _Renamed.cache_name)
        return SimpleNamespace(logits=found.logits, memory=kept if rest.get("use_cache") else None)

    cache_name = "past_key_values"


class _Forgetful(LlamaForCausalLM):
    """A model that returns no cache."""

    def forward(self, input_ids: Any, use_cache: Any = None, return_dict: Any = None) -> Any:  # type: ignore[override]
        return SimpleNamespace(logits=super().forward(input_ids, use_cache=False).logits)


def _as(kind: type[LlamaForCausalLM]) -> Any:
    import inspect

    plain = build("llama")
    if "past_key_values" not in inspect.signature(LlamaForCausalLM.forward).parameters:
        _Renamed.cache_name = "cache"
    model = kind(plain.config)
    model.load_state_dict(plain.state_dict())
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "forms"), [(_Renamed, ("rolling", "unmasked")), (_Forgetful, ("reread", "reread"))]
)
def test_a_cache_is_found_by_what_the_model_returns(kind: Any, forms: tuple[str, str]) -> None:
    model, ids = _as(kind), ids_of()
    expected = [truth(build("llama"), one) for one in ids]
    vector = torch.randn(48, generator=torch.Generator().manual_seed(0))
    assert written(model, [TextRequest(one, N_NEW) for one in ids]) == expected
    assert written(model, [TextRequest(ids[0], N_NEW)]) == expected[:1]
    assert (form(adapter_for(model), 3), form(adapter_for(model), 1)) == forms
    steered = [
        TextRequest(one, N_NEW, steering=(Steer(1, Edit.add(4 * vector), slice(-2, 9)),)) for one in ids
    ]
    assert written(model, steered) == written(build("llama"), steered) != expected


def test_a_forward_that_names_no_arguments_is_called_as_it_was() -> None:
    model, ids = FAMILIES["llama"](), ids_of()
    expected = [truth(model, one) for one in ids]
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    assert written(model, [TextRequest(one, N_NEW) for one in ids]) == expected
    assert form(adapter_for(model), 3) == "rolling"


def test_a_hooked_transformer_of_version_3_generates() -> None:
    torch.manual_seed(4)
    hooked = HookedTransformer().eval()
    ids = [one[:9] for one in ids_of()]
    with torch.no_grad():
        expected = [hooked.generate(torch.tensor([one]), 5)[0, len(one) :].tolist() for one in ids]
    assert written(hooked, [TextRequest(one, 5) for one in ids]) == expected


# Steering that the caller has attached


def steered_truth(model: Any, ids: list[int], *interventions: Intervention) -> list[int]:
    with SteeringPlan(interventions).apply(model):
        return truth(model, ids)


def test_a_plan_on_the_model_acts_by_rows_and_by_positions_of_each_prompt() -> None:
    model, ids = build("llama"), ids_of()
    direction = torch.randn(48, generator=torch.Generator().manual_seed(1))
    add, clamp = Edit.add(4 * direction), Edit.clamp(direction, 3.0)
    plan = SteeringPlan(
        [
            Intervention(1, add, rows=[0, 2]),
            Intervention(2, clamp, slice(-2, None)),
            Intervention(3, add, slice(3, 9), rows=[1]),
        ]
    )
    both, late = Intervention(2, clamp, slice(-2, None)), Intervention(3, add, slice(3, 9))
    expected = [
        steered_truth(model, ids[0], Intervention(1, add), both),
        steered_truth(model, ids[1], both, late),
        steered_truth(model, ids[2], Intervention(1, add), both),
    ]
    # Of different lengths, so that rows leave and others take their places.
    lengths = (N_NEW, 4, 6)
    with plan.apply(model):
        found = written(model, [TextRequest(one, n) for one, n in zip(ids, lengths, strict=True)])
    assert found == [one[:n] for one, n in zip(expected, lengths, strict=True)]
    assert expected[0] != truth(model, ids[0]) and expected[1] != truth(model, ids[1])


def test_what_is_attached_to_a_model_says_nothing_of_its_form() -> None:
    """A model that is tried out while a hook breaks its logits is put together rightly afterwards."""
    model, ids = FAMILIES["llama"](), ids_of()
    broken = Edit.add(torch.full((48,), 3e38))
    with (
        SteeringPlan([Intervention(1, broken), Intervention(1, broken)]).apply(model),
        pytest.raises(MechanexError, match="not finite"),
    ):
        written(model, [TextRequest(one, 3) for one in ids])
    assert form(adapter_for(model), 3) == "rolling"
    assert written(model, [TextRequest(one, 3) for one in ids]) == [truth(model, one, 3) for one in ids]


# Draws


@pytest.mark.parametrize(
    ("sampling", "warpers"),
    [
        (Sampling("top-k", top_k=7), [logits_process.TopKLogitsWarper(7)]),
        (
            Sampling("top-k", top_k=40, temperature=0.6),
            [logits_process.TemperatureLogitsWarper(0.6), logits_process.TopKLogitsWarper(40)],
        ),
        (Sampling("top-p", top_p=0.7), [logits_process.TopPLogitsWarper(0.7)]),
        (Sampling("top-p", top_p=1.0, temperature=1.7), [logits_process.TemperatureLogitsWarper(1.7)]),
        (Sampling("min-p", min_p=0.2), [logits_process.MinPLogitsWarper(0.2)]),
        (Sampling("typical", typical_p=0.6), [logits_process.TypicalLogitsWarper(0.6)]),
        (
            Sampling("combined", top_k=12, top_p=0.8, min_p=0.01, temperature=1.5),
            [
                logits_process.TemperatureLogitsWarper(1.5),
                logits_process.MinPLogitsWarper(0.01),
                logits_process.TopKLogitsWarper(12),
                logits_process.TopPLogitsWarper(0.8),
            ],
        ),
        (
            Sampling("combined", top_k=9, top_p=1.0, min_p=0),
            [logits_process.TopKLogitsWarper(9)],
        ),
    ],
    ids=["top-k", "top-k warm", "top-p", "top-p whole", "min-p", "typical", "combined", "combined of one"],
)
def test_draws_follow_the_methods_probabilities(sampling: Sampling, warpers: list[Any]) -> None:
    logits = 3 * torch.randn(N_VOCAB, generator=torch.Generator().manual_seed(2))
    logits[5] = -torch.inf
    expected = logits[None]
    for warper in warpers:
        expected = warper(None, expected)
    n = 20_000
    numbers = (torch.arange(n) + 0.5) / n
    many = logits.expand(n, -1)
    # Beside rows of other methods, which don't touch it.
    others = [Sampling("top-k", top_k=3), Sampling("typical", typical_p=0.2, temperature=3.0)]
    draws = Draws([sampling] * n + others, torch.device("cpu"))
    scores = torch.cat([many, logits.expand(2, -1)])
    tokens = draws(scores, scores.amax(-1), torch.cat([numbers, torch.tensor([0.3, 0.9])]))
    shares = tokens[:n].bincount(minlength=N_VOCAB) / n
    torch.testing.assert_close(shares, expected.softmax(-1)[0], atol=2 / n, rtol=0)
    alone = Draws([sampling] * n, torch.device("cpu"))(many, many.amax(-1), numbers)
    assert torch.equal(alone, tokens[:n])


def test_the_ends_of_the_unit_interval_draw_tokens_that_can_come() -> None:
    logits = torch.tensor([[-torch.inf, 1.0, 1.0, -torch.inf]] * 2)
    draws = Draws([Sampling("top-p", top_p=1.0)] * 2, torch.device("cpu"))
    ends = torch.tensor([0.0, torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))])
    assert draws(logits, logits.amax(-1), ends).tolist() == [1, 2]


# Steps that overlap


def _all_of(decoder: Decoder, rows: list[Row], later: list[Row], steps: int) -> None:
    """Decodes rows, of which some come when others have made a few steps, and one is taken out and comes back."""

    def join(some: list[Row]) -> None:
        reading = decoder.read(some)
        while not decoder.advance(reading):
            pass
        decoder.join(reading)

    join(rows)
    for _ in range(steps):
        decoder.step()
    join(later)
    decoder.step()
    decoder.catch_up()
    again = [row for row in decoder.rows[:1] if row.result is None]
    decoder.drop(again)
    for row in again:
        row.suspend()
    while decoder.rows:
        decoder.step()
    if again:
        join(again)
    while decoder.rows:
        decoder.step()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_steps_that_overlap_choose_the_same_tokens(name: str) -> None:
    """As on a GPU, where the next step runs before the host has read the last one's tokens."""
    model, ids = build(name), ids_of()
    direction = torch.randn(48, generator=torch.Generator().manual_seed(3))
    requests = [
        TextRequest(ids[0], 12, logprobs=2),
        TextRequest(
            ids[1], 5, Sampling("top-k", top_k=20), seed=3, frequency_penalty=3.0, presence_penalty=2.0
        ),
        TextRequest(
            ids[2], 9, Sampling("top-p"), seed=4, steering=(Steer(1, Edit.add(direction), slice(3, 12)),)
        ),
        TextRequest(ids[0], 1),
        TextRequest(ids[1], 14, frequency_penalty=4.0, logit_bias=((7, -100.0), (9, 3.0)), logprobs=0),
        TextRequest(ids[2], 7, Sampling("min-p"), seed=5, steering=(Steer(2, Edit.ablate(direction)),)),
        TextRequest(ids[0], 12, Sampling("combined", top_k=9), seed=6, repetition_penalty=3.0, min_tokens=9),
    ]
    found = []
    for overlapped in (False, True):
        rows = [Row(one, tiny_tokenizer(), (2,)) for one in requests]
        decoder = Decoder(adapter_for(model), 0, form="rolling", overlapped=overlapped)
        with torch.no_grad():
            _all_of(decoder, rows[:4], rows[4:], 2)
        decoder.detach()
        assert all(row.result is not None for row in rows)
        found.append([(row.chosen, row.result) for row in rows])
    for (chosen, result), (others, other) in zip(*found, strict=True):
        assert chosen == others and result.text == other.text and result.finish_reason == other.finish_reason
        assert [one.token for one in result.logprobs] == [one.token for one in other.logprobs]
    alone = [written(model, [one])[0] for one in requests]
    assert [chosen for chosen, _ in found[0] if 2 not in chosen] == [one for one in alone if 2 not in one]


def test_a_repetition_penalty_and_a_least_length_are_those_of_transformers() -> None:
    model, ids = build("llama"), ids_of()[0]
    plain = truth(model, ids, 12)
    end = plain[3]
    inputs = torch.tensor([ids])
    with torch.no_grad():
        expected = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=12,
            min_new_tokens=8,
            repetition_penalty=1.7,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=0,
        )[0, len(ids) :].tolist()
    row = Row(TextRequest(ids, 12, repetition_penalty=1.7, min_tokens=8), tiny_tokenizer(), (end,))
    decode(adapter_for(model), [row], 0)
    assert row.chosen == expected and end not in row.chosen[:8]


def test_ends_and_prompt_tokens_beyond_the_head_are_no_matter() -> None:
    model = FAMILIES["llama"](vocab_size=128)
    head = torch.nn.Linear(model.config.hidden_size, 100, bias=False)
    model.lm_head = head
    row = Row(
        TextRequest([3, 120, 7], 6, min_tokens=4, repetition_penalty=1.5), tiny_tokenizer(), (110, 5000)
    )
    decode(adapter_for(model), [row], 0)
    assert len(row.chosen) == 6 and max(row.chosen) < 100


def test_further_end_tokens_end_a_row_and_are_named() -> None:
    model, ids = build("llama"), ids_of()[0]
    plain = truth(model, ids, 8)
    end = plain[3]
    for stop, rules, finish in (
        (end, {"stop_token_ids": (end,)}, "stop"),
        (None, {}, "stop"),
        (None, {"ignore_ends": True}, "length"),
    ):
        row = Row(TextRequest(ids, 8, **rules), tiny_tokenizer(), () if stop else (end,))  # type: ignore[arg-type]
        decode(adapter_for(model), [row], 0)
        assert row.result is not None and (row.result.stop, row.result.finish_reason) == (stop, finish)
        assert row.chosen == (plain if finish == "length" else plain[: plain.index(end) + 1])


# Errors by row


def test_rows_that_do_not_fit_say_so_before_anything_runs() -> None:
    model, ids = build("llama"), ids_of()
    decoder = Decoder(adapter_for(model), 0, form="rolling")
    wide, nowhere = Edit.add(torch.ones(49)), Edit.add(torch.ones(48, device="meta"))
    asked = {
        "49 wide": TextRequest(ids[0], steering=(Steer(1, wide),)),
        "Layer 7": TextRequest(ids[0], steering=(Steer(7, Edit.add(torch.ones(48))),)),
        "vocabulary": TextRequest([3, N_VOCAB]),
        "int": TextRequest(ids[0], steering=(Steer(1, Edit.add(torch.ones(48)), "last"),)),  # type: ignore[arg-type]
        "can't be used": TextRequest(
            ids[0], steering=(Steer(1, nowhere), Steer(1, Edit.add(torch.ones(48))))
        ),
    }
    for says, request in asked.items():
        error = decoder.unfit(Row(request, tiny_tokenizer(), ()))
        assert isinstance(error, ValidationError) and says in str(error)
    assert decoder.unfit(Row(TextRequest(ids[0]), tiny_tokenizer(), ())) is None


def test_a_row_whose_token_cannot_be_decoded_ends_alone() -> None:
    model, ids, tokenizer = build("llama"), ids_of(), tiny_tokenizer()
    expected = [truth(model, one) for one in ids]
    bad = expected[0][2:4]
    assert all(bad != one[i : i + 2] for one in expected[1:] for i in range(N_NEW))

    class Picky:
        def decode(self, tokens: list[int], **options: Any) -> str:
            if tokens[-2:] == bad:
                raise OverflowError("out of range")
            return str(tokenizer.decode(tokens, **options))

    rows = [Row(TextRequest(one, N_NEW, stream=True), Picky(), ()) for one in ids]
    decoder = Decoder(adapter_for(model), 0, form="rolling")
    with torch.no_grad():
        reading = decoder.read(rows)
        decoder.advance(reading)
        news = decoder.join(reading)
        while decoder.rows:
            news += decoder.step()
    decoder.detach()
    errors = [(row, one) for row, one in news if isinstance(one, MechanexError)]
    assert [row for row, _ in errors] == rows[:1]
    assert "can't decode token" in str(errors[0][1])
    assert [row.chosen for row in rows[1:]] == expected[1:]


# What the model is given


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_the_unembedding_is_given_hidden_states_without_gaps(name: str) -> None:
    """Of a slice with gaps, frozen bfloat16 weights are copied once for every row, a hundred times slower."""
    model, ids = FAMILIES[name]().to(torch.bfloat16), ids_of()
    seen: list[tuple[bool, int]] = []

    def look(_: Any, args: tuple[torch.Tensor, ...]) -> None:
        seen.append((args[0].is_contiguous(), args[0].shape[:-1].numel()))

    written(model, [TextRequest(one, 2) for one in ids])
    handle = model.get_output_embeddings().register_forward_hook(lambda m, a, _: look(m, a))
    try:
        written(model, [TextRequest(one, 4) for one in ids])
    finally:
        handle.remove()
    assert seen and all(contiguous and rows == 3 for contiguous, rows in seen)


def test_log_probabilities_of_a_prompt_come_from_every_form() -> None:
    for model in (build("llama"), build("mamba"), _as(_Forgetful)):
        ids = ids_of()[0]
        row = Row(TextRequest(ids, 2, logprobs=1, prompt_logprobs=True), tiny_tokenizer(), ())
        decode(adapter_for(model), [row], 0)
        with torch.no_grad():
            shares = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert row.result is not None and row.result.prompt_logprobs[0] is None
        for i, one in enumerate(row.result.prompt_logprobs[1:]):
            assert one is not None and one.token == ids[i + 1]
            assert one.logprob == pytest.approx(float(shares[i, one.token]), abs=1e-4)
