"""Token positions, prompts' ends and rows come from what the decoder is given, whoever calls it and however."""

from __future__ import annotations

import copy
import inspect
from functools import cache

import pytest
import torch
import transformers
from families import D_MODEL, FAMILIES, PAD, build

from mechanex.engine.caches import returned_caches
from mechanex.engine.hooks import Intervention, SteeringPlan, positions
from mechanex.engine.intervention import Edit
from mechanex.engine.models import adapter_for
from mechanex.engine.models.resolve import load
from mechanex.engine.positions import current_positions
from mechanex.errors import ValidationError

IDS = torch.tensor([[1, 9, 30, 71, 12, 8, 45]])
PADDED = torch.tensor([[PAD, PAD, PAD, 9, 30, 71, 12], [1, 101, 7, 7, 250, 33, 18]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
ABSOLUTE = [[-1, -1, -1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]]


def watched(model, run, *, lengths: bool = False, prompt_tokens: int | None = None):
    """The positions of every call that ``run`` makes, and with ``lengths`` the prompts' lengths in each."""
    seen = []

    def look(hidden):
        found = current_positions()
        row = found.index.tolist()
        seen.append((row, found.prompt_lengths.flatten().tolist()) if lengths else row)

    with positions(model, prompt_tokens=prompt_tokens), torch.no_grad():
        handle = adapter_for(model).on_residual(1, look)
        try:
            run()
        finally:
            handle.remove()
    return seen


def generate(model, ids=PADDED, mask=MASK, **options):
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    return model.generate(ids, attention_mask=mask, **(settings | options))


STEPS = [ABSOLUTE, [[4], [7]], [[5], [8]]]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_padded_batch_has_its_positions_in_every_call_of_generate(name):
    model = build(name)
    seen = watched(model, lambda: generate(model), lengths=True)
    assert [lengths for _, lengths in seen] == [[4, 7]] * 3
    if model.config.model_type == "mpt":  # runs without a cache
        seen = [([row[-1:] for row in index] if n else index, 0) for n, (index, _) in enumerate(seen)]
    assert [index for index, _ in seen] == STEPS


@pytest.mark.parametrize("name", FAMILIES)
def test_a_padded_batch_needs_no_position_ids(name):
    model = build(name)
    assert watched(model, lambda: model(input_ids=PADDED, attention_mask=MASK)) == [ABSOLUTE]


@pytest.mark.parametrize(
    ("name", "attention"), [("llama", "eager"), ("llama", "flex_attention"), ("gemma2", "eager")]
)
def test_the_kind_of_attention_changes_no_position(name, attention):
    model = FAMILIES[name]()
    model.set_attn_implementation(attention)
    # transformers compiles flex attention, which takes half a minute and makes no other masks.
    with torch.compiler.set_stance("force_eager"):
        assert watched(model, lambda: model(input_ids=PADDED, attention_mask=MASK)) == [ABSOLUTE]
        assert watched(model, lambda: model(input_ids=PADDED[1:])) == [ABSOLUTE[1:]]


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
def test_short_prompts(name, length):
    model = build(name)
    ids = IDS[:, :length]
    seen = watched(model, lambda: generate(model, ids, torch.ones_like(ids)), lengths=True)
    assert seen == [([list(range(length))], [length]), ([[length]], [length]), ([[length + 1]], [length])]


@cache
def wrapper(kind: str):
    """A multimodal model whose masks are made before its decoder."""
    text = {
        "vocab_size": 384,
        "hidden_size": D_MODEL,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "pad_token_id": PAD,
        "eos_token_id": 2,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    if kind == "gemma3":
        config = transformers.Gemma3Config(text_config=text, vision_config=vision, image_token_index=380)
        model = transformers.Gemma3ForConditionalGeneration(config)
    elif kind == "gemma4":
        text = text | {
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 384,
            "global_head_dim": 12,
        }
        config = transformers.Gemma4Config(text_config=text, image_token_id=380)
        model = transformers.Gemma4ForConditionalGeneration(config)
    else:
        vision = vision | {"projection_dim": D_MODEL}
        config = transformers.PaliGemmaConfig(
            text_config=text | {"model_type": "gemma"},
            vision_config=vision | {"model_type": "siglip_vision_model"},
            image_token_index=380,
        )
        model = transformers.PaliGemmaForConditionalGeneration(config)
    model.generation_config.pad_token_id = PAD
    return model.eval()


@pytest.mark.parametrize("kind", ["gemma3", "gemma4", "paligemma"])
def test_wrappers_that_build_masks_before_the_decoder(kind):
    if kind == "gemma4" and not hasattr(transformers, "Gemma4Config"):
        pytest.skip("this transformers has no Gemma 4")
    model = wrapper(kind)
    assert watched(model, lambda: model(input_ids=PADDED, attention_mask=MASK)) == [ABSOLUTE]
    assert watched(model, lambda: generate(model)) == STEPS


# ---- The end of the prompt


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 3, "use_cache": False},
        {"num_return_sequences": 2, "do_sample": True},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_the_prompt_ends_where_generate_says(options):
    model = build("llama")
    seen = watched(model, lambda: generate(model, **options), lengths=True)
    each = options.get("num_beams", options.get("num_return_sequences", 1))
    assert {tuple(lengths) for _, lengths in seen} == {(4,) * each + (7,) * each}


@pytest.mark.parametrize("how", ["lookup", "assistant"])
def test_assisted_decoding_keeps_positions_and_the_prompts_end(how):
    model = build("llama")
    ids = torch.tensor([[1, 9, 30, 71, 9, 30, 71, 9]])
    options = (
        {"prompt_lookup_num_tokens": 2} if how == "lookup" else {"assistant_model": copy.deepcopy(model)}
    )
    edits = [Intervention(1, Edit.add(torch.ones(D_MODEL)), tokens=slice(-2, 11))]
    with SteeringPlan(edits).apply(model):
        settings = {"ids": ids, "mask": torch.ones_like(ids), "max_new_tokens": 8, "min_new_tokens": None}
        assert torch.equal(generate(model, **settings, **options), generate(model, **settings))


def test_a_prompt_read_in_pieces_is_refused_or_stated():
    model = build("llama")
    (name,) = returned_caches(model(input_ids=IDS, use_cache=True))

    def chunked(size):
        held = {
            name: transformers.DynamicCache(config=model.config)
        }  # the oldest versions make none themselves
        return generate(model, IDS, torch.ones_like(IDS), prefill_chunk_size=size, **held)

    for size in (3, 6):
        with pytest.raises(ValidationError, match=r"of the prompt's 7 tokens.*prompt_tokens"):
            watched(model, lambda s=size: chunked(s), lengths=True)
    pieces = watched(model, lambda: chunked(3))
    assert pieces == [[[0, 1, 2]], [[3, 4, 5]], [[6]], [[7]], [[8]]]

    def by_hand():
        held = {}
        for piece in (IDS[:, :4], IDS[:, 4:6], IDS[:, 6:]):
            held = returned_caches(model(input_ids=piece, use_cache=True, **held))

    with pytest.raises(ValidationError, match=r"2 more tokens came after the first call.*prompt_tokens"):
        watched(model, by_hand, lengths=True)
    stated = watched(model, by_hand, lengths=True, prompt_tokens=7)
    assert stated == [([[0, 1, 2, 3]], [7]), ([[4, 5]], [7]), ([[6]], [7])]


def test_a_pass_that_extends_the_last_one_is_a_prompt_of_its_own():
    model = build("llama")
    seen = watched(model, lambda: [model(input_ids=IDS[:, :n]) for n in (5, 6, 7)], lengths=True)
    assert [lengths for _, lengths in seen] == [[5], [6], [7]]


def test_guidance_runs_other_prompts_and_is_refused_for_negative_positions():
    model = build("llama")
    with pytest.raises(ValidationError, match="guidance"):
        watched(model, lambda: generate(model, IDS, torch.ones_like(IDS), guidance_scale=2.0), lengths=True)


# ---- Rows are prompts


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 2, "use_cache": False}, {"num_beams": 3, "num_return_sequences": 3}],
    ids=str,
)
def test_rows_are_prompts_whatever_their_number_of_beams(options):
    model = build("llama")
    edit = Edit.add(8 * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0)))
    with SteeringPlan([Intervention(1, edit, rows=[1])]).apply(model):
        together = generate(model, **options)
    each = len(together) // 2
    for n, steered in ((0, []), (1, [Intervention(1, edit)])):
        with SteeringPlan(steered).apply(model):
            alone = generate(model, PADDED[n : n + 1], MASK[n : n + 1], **options)
        assert torch.equal(together[n * each : (n + 1) * each, -3:], alone[:, -3:])


def test_rows_are_prompts_for_several_sequences():
    model = build("llama")
    seen = []

    def note(hidden):
        seen.append(current_positions().prompts.tolist())

    with positions(model):
        handle = adapter_for(model).on_residual(0, note)
        generate(model, num_return_sequences=2, do_sample=True)
        model(input_ids=PADDED)
        handle.remove()
    assert seen == [[0, 0, 1, 1]] * 3 + [[0, 1]]
    far = SteeringPlan([Intervention(1, Edit.add(torch.ones(D_MODEL)), rows=[2])])
    with far.apply(model), pytest.raises(ValidationError, match=r"Row 2 .* 2 rows"):
        generate(model, num_beams=2)


# ---- Facts that don't suffice


def test_a_cache_filled_before_steering_began():
    model = build("llama")
    held = returned_caches(model(input_ids=IDS, use_cache=True))
    assert watched(model, lambda: model(input_ids=IDS[:, :2], **held)) == [[[7, 8]]]
    held = returned_caches(model(input_ids=PADDED, attention_mask=MASK, use_cache=True))
    mask = torch.cat([MASK, torch.ones_like(MASK[:, :1])], 1)
    assert watched(model, lambda: model(input_ids=PADDED[:, -1:], attention_mask=mask, **held)) == [
        [[4], [7]]
    ]
    mamba = build("mamba")
    held = returned_caches(mamba(input_ids=IDS, use_cache=True))
    if "cache_position" in inspect.signature(mamba.forward).parameters:
        held["cache_position"] = torch.tensor([7])  # the oldest versions ask for it
    with pytest.raises(ValidationError, match=r"\[1, 1\] tokens.*doesn't tell how many tokens it holds"):
        watched(mamba, lambda: mamba(input_ids=IDS[:, :1], **held))


def test_rows_that_hold_several_sequences_are_refused():
    model = build("llama")
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    with pytest.raises(ValidationError, match="several sequences"):
        watched(model, lambda: model(input_ids=IDS, position_ids=packed))
    # Engines that batch continuously keep ids and positions in one buffer.
    buffer = torch.cat([IDS, packed])
    with pytest.raises(ValidationError, match="several sequences"):
        watched(model, lambda: model(input_ids=buffer[:1], position_ids=buffer[1:]))


def test_a_cache_under_any_name_is_found_and_one_that_is_hidden_is_noticed():
    model = FAMILIES["llama"]()

    class Other(torch.nn.Module):
        """A stack that calls its cache something else, or keeps it to itself."""

        def __init__(self, inner):
            super().__init__()
            self.layers, self.inner, self.kept = inner.layers, [inner], None

        def forward(self, tokens, memory=None, hide=False):
            memory = self.kept if hide else memory
            out = self.inner[0](input_ids=tokens, use_cache=True, **({} if memory is None else memory))
            self.kept = returned_caches(out)
            return self.kept

        @property
        def config(self):
            return self.inner[0].config

        def get_input_embeddings(self):
            return self.inner[0].get_input_embeddings()

    stack = Other(model.model)
    seen = watched(stack, lambda: stack(IDS[:, :1], stack(IDS)))
    assert seen == [[[0, 1, 2, 3, 4, 5, 6]], [[7]]]


def test_a_generate_that_is_watched_is_put_back_and_copies_alone():
    model = FAMILIES["llama"]()
    with positions(model):
        twin = copy.deepcopy(model)
        assert twin.generate.__self__ is twin
    assert "generate" not in model.__dict__
    assert torch.equal(generate(twin), generate(model))


# ---- A cache whose rows a loop of one's own changes


@pytest.mark.parametrize("order", [[1, 0], [1], [0, 0, 1, 1]], ids=str)
def test_the_prompts_end_follows_the_rows_of_a_cache(order):
    model, rows = build("llama"), torch.tensor(order)

    def run():
        held = returned_caches(model(input_ids=PADDED, attention_mask=MASK, use_cache=True))
        next(iter(held.values())).reorder_cache(rows)
        mask = torch.cat([MASK, torch.ones_like(MASK[:, :1])], 1)[rows]
        model(input_ids=PADDED[rows, -1:], attention_mask=mask, use_cache=True, **held)

    ends = [[4, 7][row] for row in order]
    assert watched(model, run, lengths=True)[1] == ([[end] for end in ends], ends)


def test_values_written_to_a_mask_or_an_edit_count_from_the_next_call():
    model = build("llama")

    def logits(plan, change=None):
        with plan.apply(model):
            first = model(input_ids=IDS).logits
            if change is not None:
                change()
                return model(input_ids=IDS).logits
            return first

    mask = torch.zeros(IDS.shape, dtype=torch.bool)
    masked = SteeringPlan([Intervention(1, Edit.add(torch.ones(D_MODEL)), mask=mask)])
    with torch.no_grad():
        assert torch.equal(logits(masked, lambda: mask.fill_(True)), logits(masked))
    with torch.inference_mode():
        vector = torch.ones(D_MODEL)
        steered = SteeringPlan([Intervention(1, Edit.add(vector))])
        assert torch.equal(logits(steered, lambda: vector.mul_(-3)), logits(steered))


# ---- Position ids that are given


def refused(run_of, *, model, match="position ids are"):
    with pytest.raises(ValidationError, match=match):
        watched(model, run_of)


LEFT = torch.tensor([[1, 1, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]])


@pytest.mark.parametrize("name", ["mx-tiny", "llama", "gemma3", "gpt2", "gpt_neo"])
def test_position_ids_count_as_masks_and_the_cache_say_or_are_refused(name):
    model = load(name, backend="transformers").model if name == "mx-tiny" else build(name)

    def run(ids=PADDED, **more):
        return lambda: model(input_ids=ids, **more)

    for right in (LEFT, LEFT + 1, torch.arange(7).expand(2, 7), torch.arange(7)[None]):
        assert watched(model, run(attention_mask=MASK, position_ids=right)) == [ABSOLUTE]
    assert watched(model, run(position_ids=LEFT[1:])) == [[list(range(7))] * 2]
    # Padding that no mask tells of, and tokens that come before in no cache.
    for wrong in (LEFT, LEFT * (LEFT > 1), torch.arange(5, 12)[None], LEFT * 2, LEFT.flip(1)):
        refused(run(position_ids=wrong), model=model)
    refused(run(attention_mask=MASK, position_ids=LEFT + 2), model=model)
    empty = dict.fromkeys(returned_caches(model(input_ids=IDS, use_cache=True)))

    def filled():
        return {name: transformers.DynamicCache(config=model.config) for name in empty}

    refused(run(position_ids=torch.arange(5, 12)[None], **filled()), model=model)
    refused(run(ids=IDS[:, :1], position_ids=torch.tensor([[5]]), **filled()), model=model)


@pytest.mark.parametrize("name", ["llama", "gpt_neo"])
def test_position_ids_of_a_step_follow_the_cache_or_are_refused(name):
    model = build(name)

    def held():
        return returned_caches(model(input_ids=PADDED, attention_mask=MASK, use_cache=True))

    def step(at, held=held, mask=None):
        return lambda: model(
            input_ids=PADDED[:, -1:], attention_mask=mask, position_ids=torch.tensor(at), **held()
        )

    mask = torch.cat([MASK, torch.ones_like(MASK[:, :1])], 1)
    before = held()
    assert watched(model, step([[4], [7]], mask=mask))[-1] == [[4], [7]]
    assert watched(model, step([[4], [7]]))[-1] == [[4], [7]]  # the prompt's pass was seen
    refused(step([[4], [9]], mask=mask), model=model)
    # A cache from before, of whose padding nothing tells but the ids.
    refused(step([[4], [7]], held=lambda: before), model=model, match="7 tokens before")
