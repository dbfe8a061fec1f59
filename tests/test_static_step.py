"""Steps over tensors that stay: the same tokens as by calls of the model, whoever comes, goes and is steered how."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from families import D_MODEL, FAMILIES, SLIDING, sliding_family, tiny_tokenizer
from test_decode import N_NEW, PROMPTS, _all_of, ids_of, truth
from torch import Tensor

from mechanex.engine.capabilities.decoding import form
from mechanex.engine.decode import grouped, static, static_step
from mechanex.engine.decode.calls import Calls
from mechanex.engine.decode.decoder import Decoder
from mechanex.engine.decode.graphs import Graphs, Key, state_of
from mechanex.engine.decode.prefixes import Prefixes
from mechanex.engine.decode.request import Steer, TextRequest
from mechanex.engine.decode.row import Row
from mechanex.engine.decode.run import decode
from mechanex.engine.decode.slot_steering import SlotSteering
from mechanex.engine.decode.slots import SlotCache
from mechanex.engine.decode.static import StaticBatch
from mechanex.engine.decode.static_step import StaticStep, bucket
from mechanex.engine.decode.steering import RowSteering
from mechanex.engine.hooks import Intervention, SteeringPlan
from mechanex.engine.intervention import Edit
from mechanex.engine.models import adapter_for
from mechanex.engine.orthogonalize import ablate_everywhere
from mechanex.engine.positions import given_positions, whole_pass
from mechanex.engine.reset import reset
from mechanex.engine.sampling import Sampling
from mechanex.engine.vectors import SteeringVector

# Those of the families that take no mask which says which token sees which.
OTHERS = ("gpt_neo", "bloom", "mpt", "mamba")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    ),
]


@cache
def build(name: str) -> Any:
    """A model that this file shares: a step that other files' tests left on theirs has graphs of another kind."""
    return FAMILIES[name]()


class HostGraphs(Graphs):
    """In the place of CUDA graphs: what was captured is run again by the host, with the sizes of that time."""

    supported = True

    def capture(self, key: Key, step: Callable[[], Tensor], undo: Callable[[], object]) -> bool:
        step()
        undo()
        self.captures += 1
        self._kept[key] = step, torch.empty(0)  # type: ignore[assignment]
        return True

    def replay(self, key: Key) -> Any:
        self._kept.move_to_end(key)
        again: Any = self._kept[key][0]
        try:
            return again()
        finally:
            # A graph has no hooks: those of the batch that it was captured by go again.
            batch = inspect.getclosurevars(again).nonlocals["self"]
            batch._leave_model()
            batch._steering.detach()
            batch._calls.detach()


@pytest.fixture(params=DEVICES)
def device(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where models are; steps are captured there, on a CPU in the way that it can."""
    if request.param == "cpu":
        monkeypatch.setattr(static_step, "Graphs", HostGraphs)
    return str(request.param)


def rows_of(requests: list[TextRequest], ends: tuple[int, ...] = ()) -> list[Row]:
    n = len(requests)
    return [Row(one, tiny_tokenizer(), ends, prompt=(i, n)) for i, one in enumerate(requests)]


def decoded(model: Any, requests: list[TextRequest], form: Any = "static", **options: Any) -> list[list[int]]:
    rows = rows_of(requests)
    run(Decoder(adapter_for(model), 0, form=form, **options), rows)
    return [row.chosen for row in rows]


def run(decoder: Decoder, rows: list[Row]) -> None:
    with torch.no_grad():
        reading = decoder.read(rows)
        while not decoder.advance(reading):
            pass
        decoder.join(reading)
        while decoder.rows:
            decoder.step()
    decoder.detach()


def n_captures(model: Any) -> int:
    """How often steps were captured for a model."""
    return int(adapter_for(model).kept.step.graphs.captures)


def both(model: Any, requests: list[TextRequest]) -> None:
    assert decoded(model, requests) == decoded(model, requests, "rolling")


def random_edit(seed: int, size: float = 3.0) -> Edit:
    return Edit.add(size * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed)))


V = random_edit(0).bias
W = random_edit(1).bias


TYPICAL = (
    "llama",
    "mixtral",
    "gpt2",
    "gpt_neox",
    "falcon",
    "opt",
    "gemma2",
    "gpt_oss",
    "deepseek_v3",
    "cohere2",
)


WINDOWED = ("mistral with a window", "gemma2 with a window")


def every_family() -> list[Any]:
    names = [*(f for f in FAMILIES if f not in OTHERS), *(f"{f} with a window" for f in SLIDING)]
    return [n if n in (*TYPICAL, *WINDOWED) else pytest.param(n, marks=pytest.mark.long) for n in names]


@pytest.mark.parametrize("family", every_family())
def test_tokens_are_those_of_transformers_generate(family: str, device: str) -> None:
    name, _, windowed = family.partition(" ")
    model = (sliding_family(name, 8) if windowed else build(name)).to(device)
    ids = ids_of()
    rows = rows_of([TextRequest(one, N_NEW) for one in ids])
    decoder = Decoder(adapter_for(model), 0, form="static")
    with torch.no_grad():
        _all_of(decoder, rows[:2], rows[2:], 2)
    decoder.detach()
    model.cpu()
    assert [row.chosen for row in rows] == [truth(model, one) for one in ids]


@pytest.mark.parametrize("overlapped", [False, True])
def test_rows_that_come_and_go_get_what_calls_of_the_model_give(device: str, overlapped: bool) -> None:
    model, ids = build("llama").to(device), ids_of()
    requests = [
        TextRequest(ids[0], 150, logprobs=2),  # beyond the first room for columns
        TextRequest(
            ids[1], 5, Sampling("top-k", top_k=20), seed=3, frequency_penalty=3.0, presence_penalty=2.0
        ),
        TextRequest(ids[2], 9, Sampling("top-p"), seed=4, steering=(Steer(1, random_edit(0), slice(3, 12)),)),
        TextRequest(ids[0], 1),
        TextRequest(ids[1], 14, frequency_penalty=4.0, logit_bias=((7, -100.0), (9, 3.0)), logprobs=0),
        TextRequest(ids[2], 7, Sampling("min-p"), seed=5, steering=(Steer(2, Edit.ablate(V)),)),
    ]
    found = []
    for kind in ("static", "rolling"):
        rows = rows_of(requests, (2,))
        decoder = Decoder(adapter_for(model), 0, form=kind, overlapped=overlapped)  # type: ignore[arg-type]
        with torch.no_grad():
            _all_of(decoder, rows[:3], rows[3:], 2)
        decoder.detach()
        found.append([(row.chosen, row.result.text, row.result.finish_reason) for row in rows if row.result])
    assert found[0] == found[1] and len(found[0]) == len(requests)


@pytest.mark.parametrize(
    "steering",
    [
        (
            Steer(0, random_edit(0)),
            Steer(1, Edit.clamp(V, 2.0)),
            Steer(1, Edit.ablate(W)),
            Steer(2, random_edit(3)),
        ),
        (
            Steer(1, Edit.add(V).gated("sigmoid", W, 0.5)),
            Steer(1, Edit.add(W)),
            Steer(1, Edit.add(-V).gated("norm")),
        ),
        (
            Steer(1, random_edit(0), slice(-2, None)),
            Steer(1, random_edit(1), 16),
            Steer(2, Edit.clamp(W, 1), -1),
        ),
        (Steer(1, Edit.dense(V, torch.eye(D_MODEL) * 0.3)), Steer(2, random_edit(2))),
    ],
    ids=["chains", "gates", "tokens", "dense"],
)
def test_steered_rows_are_steered_inside_the_step(device: str, steering: tuple[Steer, ...]) -> None:
    model, ids = build("llama").to(device), ids_of()
    plain = [TextRequest(one, 12) for one in ids]
    steered = [TextRequest(one, 12, steering=steering) for one in ids]
    one = TextRequest(ids[1], 12, steering=(Steer(1, random_edit(7)),))
    both(model, [plain[0], steered[0], one, steered[2], plain[1]])
    assert decoded(model, steered) != decoded(model, plain)


def test_the_stream_that_leaves_the_last_block_is_steered_too(device: str) -> None:
    model, ids = build("llama").to(device), ids_of()
    last = adapter_for(model).n_layers
    both(model, [TextRequest(ids[0], 9, steering=(Steer(last, random_edit(5)),)), TextRequest(ids[0], 9)])


def test_values_change_without_capturing_again(device: str) -> None:
    model, ids = build("llama").to(device), ids_of()
    adapter = adapter_for(model)

    def run(edits: list[Edit]) -> int:
        requests = [TextRequest(ids[i], 9, steering=(Steer(1, e), Steer(2, e))) for i, e in enumerate(edits)]
        both(model, requests)
        return int(adapter.kept.step.graphs.captures)

    edits = [Edit.clamp(V, 1.0), Edit.clamp(W, 2.0), Edit.ablate(V)]
    captures = run(edits)
    assert captures >= 1
    assert run([Edit.clamp(W, -3.0), Edit.clamp(V, 5.0), Edit.add(W)]) == captures
    edits[0].bias.mul_(-1)  # the same objects, other numbers
    assert run(edits) == captures
    # Somebody else is steered, or nobody: the step with more edits serves, where there is none with fewer.
    both(
        model,
        [
            TextRequest(ids[0], 9),
            TextRequest(ids[1], 9, steering=(Steer(2, edits[1]),)),
            TextRequest(ids[2], 9),
        ],
    )
    assert adapter.kept.step.graphs.captures == captures


def test_a_table_that_grows_is_not_that_of_steps_before(device: str) -> None:
    model, ids = build("llama").to(device), ids_of()
    many = [Steer(1, random_edit(seed)) for seed in range(11)]
    both(model, [TextRequest(ids[0], 5, steering=(many[0],))])
    both(model, [TextRequest(ids[i % 3], 5, steering=(one,)) for i, one in enumerate(many)])
    both(
        model,
        [
            TextRequest(
                ids[0], 5, steering=(Steer(1, Edit.affine(V, torch.stack([V, W]), torch.stack([W, V]))),)
            )
        ],
    )
    both(model, [TextRequest(ids[0], 5, steering=(many[3],)), TextRequest(ids[1], 5)])


def test_a_captured_step_does_not_outlive_what_it_was_captured_of(device: str) -> None:
    model, ids = FAMILIES["llama"]().to(device), ids_of()
    requests = [TextRequest(one, 6) for one in ids]
    first = decoded(model, requests)
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight.mul_(-1)  # in place: the step reads it anew
    second = decoded(model, requests)
    assert first != second == decoded(model, requests, "rolling")
    layer = model.model.layers[1].mlp
    layer.up_proj = torch.nn.Linear(*reversed(layer.up_proj.weight.shape), bias=False).to(device)
    assert second != decoded(model, requests) == decoded(model, requests, "rolling")


def test_hooks_of_others_are_heard_at_every_step(device: str) -> None:
    model, ids = build("llama").to(device), ids_of()
    requests = [TextRequest(one, 6) for one in ids]
    plain = decoded(model, requests)
    plan = SteeringPlan(
        [Intervention(1, random_edit(0), tokens=slice(-1, None)), Intervention(2, random_edit(1), rows=[1])]
    )
    with plan.apply(model):
        steered = decoded(model, requests)
        assert steered == decoded(model, requests, "rolling") != plain
    calls: list[int] = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    assert decoded(model, requests) == plain
    handle.remove()
    assert len(calls) == N_NEW
    assert decoded(model, requests) == plain and len(calls) == N_NEW


def meanwhile(
    model: Any, kind: Any, steering: tuple[Steer, ...], then: Callable[[], object]
) -> list[list[int]]:
    """The answers of rows that are steered so, when something happens after three steps."""
    rows = rows_of([TextRequest(one, 8, steering=steering) for one in ids_of()])
    decoder = Decoder(adapter_for(model), 0, form=kind)
    with torch.no_grad():
        reading = decoder.read(rows)
        while not decoder.advance(reading):
            pass
        decoder.join(reading)
        for _ in range(3):
            decoder.step()
        then()
        while decoder.rows:
            decoder.step()
    decoder.detach()
    reset(model)
    return [row.chosen for row in rows]


def test_a_plan_that_comes_while_answers_are_written_edits_before_their_own(device: str) -> None:
    model = build("llama").to(device)
    edits = Edit.clamp(V, 9.0), Edit.clamp(V + W, 30.0)  # the later one wins
    own, late = (SteeringPlan([Intervention(2, edit)]) for edit in edits)
    expected, wrong = [], []
    for order, found in (((late, own), expected), ((own, late), wrong)):
        first = own.apply(model)

        def then(order: Any = order, first: Any = first) -> None:
            first.remove()
            for plan in order:
                plan.apply(model)

        found += meanwhile(model, "rolling", (), then)
    assert expected != wrong
    for kind in ("static", "rolling"):
        assert meanwhile(model, kind, (Steer(2, edits[0]),), lambda: late.apply(model)) == expected


def test_an_ablation_everywhere_is_part_of_the_captured_step(device: str) -> None:
    model, requests = build("llama").to(device), [TextRequest(one, 6) for one in ids_of()]
    plain = decoded(model, requests)
    for vector in (V, W):
        before = n_captures(model)
        with ablate_everywhere(model, SteeringVector({1: 2 * vector})):
            ablated = decoded(model, requests)
            assert n_captures(model) > before, "the steps ran by the host"
            assert ablated == decoded(model, requests, "rolling") != plain
    before = n_captures(model)
    assert decoded(model, requests) == plain
    assert n_captures(model) > before, "the ablation's steps were taken for the plain model's"


@pytest.mark.parametrize("window", [None, 8])
def test_texts_that_were_read_are_gone_on_from(device: str, window: int | None) -> None:
    model = (build("gemma2") if window is None else sliding_family("mistral", window)).to(device)
    prefixes = Prefixes(2**30)
    first = list(range(20, 60))

    def answer(tokens: list[int], **options: Any) -> Row:
        (row,) = rows_of([TextRequest(tokens, 7, **options)])
        run(Decoder(adapter_for(model), 0, form="static", prefixes=prefixes), [row])
        return row

    one = answer(first)
    asked = [*first, *one.chosen, 5, 6, 7, 8]
    two = answer(asked)
    assert two.cached_tokens >= len(first) + 6
    assert (
        [two.chosen]
        == decoded(model, [TextRequest(asked, 7)])
        == decoded(model, [TextRequest(asked, 7)], "rolling")
    )
    short = answer(first[:18])
    again = [*first[:18], *short.chosen, 9]
    assert [answer(again).chosen] == decoded(model, [TextRequest(again, 7)])


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
@pytest.mark.parametrize("kind", ["static", "rolling"])
def test_texts_longer_than_a_window_are_gone_on_from(device: str, kind: Any, family: str) -> None:
    """Where they ended: layers with a window have let go of what one sees that branches off earlier."""
    model, prefixes = sliding_family(family, 8).to(device), Prefixes(2**30)
    texts = [list(range(20, 60)), list(range(30, 90))]

    def answers(asked: list[list[int]]) -> list[Row]:
        rows = rows_of([TextRequest(one, 7) for one in asked])
        run(Decoder(adapter_for(model), 0, form=kind, prefixes=prefixes), rows)
        assert [row.chosen for row in rows] == decoded(model, [TextRequest(one, 7) for one in asked])
        return rows

    for _ in range(2):
        rows = answers(texts)
        texts = [[*row.ids, *row.chosen, 5, 6, 7] for row in rows]
    assert [row.cached_tokens for row in answers(texts)] != [0, 0]
    alone = answers([[*texts[0], 9]])
    assert alone[0].cached_tokens >= len(texts[0]) - 4
    # One branches off where it can't be gone on from, and the other is read with it.
    branch = answers([[*texts[0][:30], 9, 8], texts[1]])
    assert branch[0].cached_tokens == 0
    (again,) = answers([[*alone[0].ids, *alone[0].chosen, 3]])
    assert again.cached_tokens == len(alone[0].ids) + 6


def test_a_text_that_outgrew_a_window_step_by_step_is_gone_on_from(device: str) -> None:
    model, prefixes = sliding_family("mistral", 32).to(device), Prefixes(2**30)
    found = []
    for kind in ("static", "rolling"):
        rows = rows_of([TextRequest(list(range(20, 40)), 30)])
        run(Decoder(adapter_for(model), 0, form=kind, prefixes=prefixes), rows)  # type: ignore[arg-type]
        asked = [*range(20, 40), *rows[0].chosen, 7]
        rows = rows_of([TextRequest(asked, 5)])
        run(Decoder(adapter_for(model), 0, form=kind, prefixes=prefixes), rows)  # type: ignore[arg-type]
        found.append((rows[0].chosen, rows[0].cached_tokens))
        assert [rows[0].chosen] == decoded(model, [TextRequest(asked, 5)])
    assert found[0] == (found[1][0], 49)


def test_a_slot_with_broken_numbers_does_not_break_who_has_it_next(device: str) -> None:
    model, ids = build("llama").to(device), ids_of()
    broken = TextRequest(ids[2], 6, steering=(Steer(1, Edit.add(torch.full((D_MODEL,), torch.nan))),))
    rows = rows_of([broken, TextRequest(ids[0], 6)])
    decoder = Decoder(adapter_for(model), 0, form="static")
    run(decoder, rows[:1])
    run(decoder, rows[1:])
    assert rows[1].chosen == decoded(model, [TextRequest(ids[0], 6)], "rolling")[0]


def test_what_is_left_for_the_next_decoder_goes_with_the_model() -> None:
    model = FAMILIES["llama"]()
    decoded(model, [TextRequest(ids_of()[0], 4)])
    step = weakref.ref(adapter_for(model).kept.step)
    assert step() is not None
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None and step() is None
    finally:
        gc.enable()


def test_a_model_that_moves_or_changes_its_dtype_gets_another_cache() -> None:
    model, ids = FAMILIES["llama"](), ids_of()
    requests = [TextRequest(one, 6) for one in ids]
    decoded(model, requests)
    model.double()
    assert decoded(model, requests) == decoded(model, requests, "rolling")


@pytest.mark.parametrize("kind", ["draft", "alternatives"])
def test_a_row_may_bring_several_columns(kind: str, device: str) -> None:
    """The logits of each are those of the text that it sees."""
    model = build("mistral").to(device)
    adapter = adapter_for(model)
    prompts, new = ids_of()[:2], torch.tensor([[5, 6, 7], [8, 9, 11]], device=device)
    with torch.no_grad():
        decoder = Decoder(adapter, 0, form="static")
        reading = decoder.read(rows_of([TextRequest(one, 3) for one in prompts]))
        decoder.advance(reading)
        ((name, source),) = reading.kept.items()
        step = StaticStep(
            SlotCache(source), SlotSteering(D_MODEL, adapter.device, adapter.dtype), adapter.device, 3
        )
        step.reserve(2, 64, source)
        step.cache.admit(source, [0, 1], [len(one) for one in prompts])
        step.lay_out([len(one) for one in prompts])
        step.ids[:2] = new
        if kind == "alternatives":
            step.offsets[:] = 0
            step.own[:] = torch.eye(3, dtype=torch.bool)
        batch = StaticBatch(adapter, Calls(adapter, "static"), RowSteering(adapter))
        batch._name = name
        logits = batch._forward(step, 2, 32, frozenset(), 3)
        for row, prompt in enumerate(prompts):
            for j in range(3):
                tail = new[row, : j + 1] if kind == "draft" else new[row, j : j + 1]
                whole = torch.cat([torch.tensor(prompt, device=device), tail])[None]
                with given_positions(whole_pass(whole)):
                    alone = model(input_ids=whole).logits[0, -1]
                torch.testing.assert_close(logits[row, j], alone, atol=1e-4, rtol=1e-4)


def test_buckets_hold_what_they_are_for() -> None:
    sizes = [bucket(n) for n in range(1, 2000)]
    assert all(size >= n for n, size in enumerate(sizes, 1)) and sizes == sorted(sizes)
    assert len(set(sizes)) < 20 and bucket(3, 128) == 128


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_steps_are_static_and_captured() -> None:
    model = build("llama").cuda()
    adapter = adapter_for(model)
    assert form(adapter, 1) == form(adapter, 3) == "static"
    rows = rows_of(
        [TextRequest(one, 20, steering=(Steer(1, Edit.clamp(V, 2.0)),)) for one in ids_of(PROMPTS)]
    )
    decode(adapter, rows, 0)
    assert adapter.kept.step.graphs.failure is None and adapter.kept.step.graphs.captures >= 1
    cpu = model.cpu()
    again = rows_of(
        [TextRequest(one, 20, steering=(Steer(1, Edit.clamp(V, 2.0)),)) for one in ids_of(PROMPTS)]
    )
    decode(adapter_for(cpu), again, 0)
    assert [row.chosen for row in rows] == [row.chosen for row in again]


def test_the_state_of_a_model_tells_switches_from_numbers() -> None:
    model = FAMILIES["llama"]()
    before = state_of(model)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    assert state_of(model) == before
    model.model.layers[0].self_attn.scaling = 3.0
    assert state_of(model) != before


@pytest.mark.parametrize("new", [1, 3])
def test_keys_that_queries_share_are_not_copied_and_attend_alike(
    new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 8, new, 16, generator=draw), torch.randn(2, 2, 5, 16, generator=draw)
    value, mask = torch.randn(2, 2, 5, 16, generator=draw), torch.randn(2, 1, new, 5, generator=draw)
    found, _ = grouped._attend(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    many = [states.repeat_interleave(4, dim=1) for states in (key, value)]
    right = torch.nn.functional.scaled_dot_product_attention(query, *many, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(found, right.transpose(1, 2))


@pytest.mark.parametrize("extra", [{"softcap": 30.0}, {"s_aux": torch.zeros(8)}])
def test_attention_that_bends_its_scores_is_left_to_transformers(
    extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []

    def plain(*_: Any, **options: Any) -> tuple[Tensor, None]:
        given.append(options)
        return torch.zeros(0), None

    monkeypatch.setitem(grouped.ALL_ATTENTION_FUNCTIONS, "sdpa", plain)
    query, key = torch.zeros(2, 8, 1, 16), torch.zeros(2, 2, 5, 16)
    grouped._attend(torch.nn.Module(), query, key, key, torch.zeros(2, 1, 1, 5), **extra)
    assert given and given[0].items() >= extra.items()


def test_older_transformers_attend_so_inside_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "GROUPS_QUERIES", False)
    calls: list[int] = []
    attend = grouped._attend

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return attend(*args, **kwargs)

    monkeypatch.setattr(grouped, "_attend", counted)
    monkeypatch.setattr(grouped, "_NAME", "counted")
    model = FAMILIES["llama"]()
    both(model, [TextRequest(one, 5) for one in ids_of()])
    assert len(calls) == 4 * adapter_for(model).n_layers
    assert model.config._attn_implementation == "sdpa"


def test_applied_plans_are_part_of_the_step(device: str) -> None:
    model, ids = build("llama").to(device), ids_of()
    adapter = adapter_for(model)
    requests = [
        TextRequest(ids[0], 8),
        TextRequest(ids[1], 8, steering=(Steer(1, random_edit(5)),)),
        TextRequest(ids[2], 8),
    ]
    plain = decoded(model, requests)
    first = SteeringPlan([Intervention(1, random_edit(0)), Intervention(2, Edit.clamp(V, 2.0), rows=[0, 1])])
    second = SteeringPlan([Intervention(-1, random_edit(3), tokens=slice(-1, None))])
    with first.apply(model), second.apply(model):
        steered = decoded(model, requests)
        assert adapter.kept.step.graphs.captures and not adapter.kept.step.graphs.failure
        n = sum(len(module._forward_pre_hooks) for module in model.modules())
        assert steered == decoded(model, requests, "rolling") != plain
        assert n == sum(len(module._forward_pre_hooks) for module in model.modules())
    assert adapter.kept.applied == [] and decoded(model, requests) == plain


def test_a_plan_that_comes_while_rows_are_decoded_counts_from_the_next_step(device: str) -> None:
    model, ids = build("llama").to(device), ids_of()
    found = []
    for kind in ("static", "rolling"):
        rows = rows_of([TextRequest(one, 9) for one in ids])
        decoder = Decoder(adapter_for(model), 0, form=kind, overlapped=False)  # type: ignore[arg-type]
        with torch.no_grad():
            reading = decoder.read(rows)
            decoder.advance(reading)
            decoder.join(reading)
            for _ in range(3):
                decoder.step()
            with SteeringPlan([Intervention(1, random_edit(0, 9.0))]).apply(model):
                decoder.step()
                decoder.step()
            while decoder.rows:
                decoder.step()
        decoder.close()
        found.append([row.chosen for row in rows])
    assert found[0] == found[1] != decoded(model, [TextRequest(one, 9) for one in ids])


def test_writes_that_torch_does_not_count_reach_the_next_run(device: str) -> None:
    model, ids = build("llama").to(device), ids_of()
    numbers = V.numpy().copy()
    shared = Edit.add(torch.from_numpy(numbers))
    plain = Edit.add(V.clone())
    with torch.inference_mode():
        inferred = Edit.add(V.clone())
    for edit, write in (
        (shared, lambda: numbers.__imul__(-3)),
        (plain, lambda: plain.bias.data.mul_(-2)),
        (inferred, lambda: inferred.bias.mul_(-2)),
    ):
        requests = [TextRequest(ids[0], 8, steering=(Steer(1, edit),))]
        both(model, requests)
        with torch.inference_mode():
            write()
        both(model, requests)


@pytest.mark.parametrize("planned", [True, False])
def test_edits_that_are_written_to_while_rows_are_decoded_count_at_once(device: str, planned: bool) -> None:
    model, ids = build("llama").to(device), ids_of()
    found = []
    for kind in ("static", "rolling"):
        edit = Edit.add(V.clone())
        steering = () if planned else (Steer(1, edit),)
        rows = rows_of([TextRequest(one, 12, steering=steering) for one in ids])
        decoder = Decoder(adapter_for(model), 0, form=kind, overlapped=False)  # type: ignore[arg-type]
        with torch.no_grad(), SteeringPlan([Intervention(1, edit)] if planned else []).apply(model):
            reading = decoder.read(rows)
            decoder.advance(reading)
            decoder.join(reading)
            for _ in range(3):
                decoder.step()
            edit.bias.mul_(-3)
            while decoder.rows:
                decoder.step()
        decoder.close()
        found.append([row.chosen for row in rows])
    assert found[0] == found[1]


@pytest.mark.long
def test_a_plan_on_a_compiled_model_is_applied_once(device: str) -> None:
    model, ids = FAMILIES["llama"]().to(device), ids_of()
    model.compile(backend="eager")
    with SteeringPlan([Intervention(1, random_edit(0)), Intervention(2, random_edit(1))]).apply(model):
        both(model, [TextRequest(one, 8) for one in ids])
    torch.compiler.reset()


def test_hooks_on_all_modules_are_heard(device: str) -> None:
    model, ids = build("llama").to(device), ids_of()
    requests = [TextRequest(ids[0], 6)]
    decoded(model, requests)
    seen: list[int] = []
    head = model.get_output_embeddings()
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda m, *_: seen.append(1) if m is head else None
    )
    try:
        decoded(model, requests)
    finally:
        hook.remove()
    assert len(seen) == 6


def test_settings_and_functions_of_a_model_are_part_of_its_state() -> None:
    model = FAMILIES["gemma2"]()
    mlp, config = model.model.layers[0].mlp, model.config
    states = [state_of(model)]
    config.final_logit_softcapping = 1.0
    states.append(state_of(model))
    mlp.act = torch.relu
    states.append(state_of(model))
    mlp.act = torch.tanh
    states.append(state_of(model))
    mlp.forward = lambda x: x
    states.append(state_of(model))
    mlp.forward = lambda x: -x
    states.append(state_of(model))
    assert state_of(model) == states[-1]
    assert all(a != b for i, a in enumerate(states) for b in states[:i])


def test_room_that_takes_much_memory_is_not_taken_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "total_bytes", lambda _: 2**20)
    model, ids = FAMILIES["llama"](), [list(range(3, 150))] * 9
    rows = rows_of([TextRequest(one, 50) for one in ids])
    decoder = Decoder(adapter_for(model), 0, form="static")
    with torch.no_grad():
        reading = decoder.read(rows)
        decoder.advance(reading)
        decoder.join(reading)
        decoder.step()
        (cache,) = decoder._batch.kept.values()  # type: ignore[union-attr]
        assert (cache.rows, cache.columns) == (9, 256)
        while decoder.rows:
            decoder.step()
    decoder.close()
    assert rows[0].chosen == decoded(model, [TextRequest(ids[0], 50)], "rolling")[0]


def test_prefixes_do_not_survive_what_is_written_to_plans_and_weights() -> None:
    model, prefixes, first = FAMILIES["llama"](), Prefixes(2**30), list(range(20, 60))
    edit = Edit.add(V.clone())

    def answer() -> Row:
        (row,) = rows_of([TextRequest(first, 5)])
        run(Decoder(adapter_for(model), 0, form="rolling", prefixes=prefixes), [row])
        return row

    with SteeringPlan([Intervention(1, edit)]).apply(model):
        answer()
        assert answer().cached_tokens
        edit.bias.mul_(-1)
        assert not answer().cached_tokens
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        assert not answer().cached_tokens
