"""A pack holds every pair's tokens, each seeing what it would see alone, with prompts stored once."""

from __future__ import annotations

import pytest
import torch
from counting import counted_ops
from hypothesis import given, settings
from hypothesis import strategies as st

from mechanex.engine.continuing import continuations
from mechanex.engine.pack import build_packs
from mechanex.errors import ValidationError

ids = st.lists(st.integers(1, 50), min_size=1, max_size=9).map(tuple)
pairs_of_ids = st.lists(
    st.tuples(st.sampled_from([(3,), (4, 5, 6), (7, 8), (9,) * 12]) | ids, ids), min_size=1, max_size=12
)


def paths(pack):
    """(pair, token ids on the path up to each scored token), read back through the mask alone."""
    visible = pack.visible()
    for row, column, pair in zip(pack.row.tolist(), pack.column.tolist(), pack.pair.tolist(), strict=True):
        yield pair, pack.input_ids[row, visible[row, column]].tolist()


@settings(deadline=None)
@given(pairs_of_ids, st.sampled_from([1, 16, 64]), st.sampled_from([1, 40, 10_000]))
def test_every_completion_token_sees_its_own_prompt_and_itself(pairs, row_tokens, batch_tokens):
    found = {i: [] for i in range(len(pairs))}
    for pack in build_packs(pairs, row_tokens=row_tokens, batch_tokens=batch_tokens):
        for pair, path in paths(pack):
            found[pair].append(path)
    for i, (prompt, completion) in enumerate(pairs):
        assert found[i] == [[*prompt, *completion[: k + 1]] for k in range(len(completion))]


@settings(deadline=None)
@given(pairs_of_ids, st.sampled_from(["tree", "padded"]))
def test_predictors_and_targets_are_those_of_the_pair_alone(pairs, layout):
    for pack in build_packs(pairs, layout=layout):
        assert torch.equal(pack.input_ids[pack.row, pack.column], pack.target)
        for i in pack.pair.unique().tolist():
            mine = pack.pair == i
            prompt, completion = pairs[i]
            assert pack.target[mine].tolist() == list(completion)
            before = pack.input_ids[pack.row, pack.predictor][mine].tolist()
            assert before == [prompt[-1], *completion[:-1]]
            places = pack.position_ids[pack.row, pack.column][mine].tolist()
            assert places == list(range(len(prompt), len(prompt) + len(completion)))


@settings(deadline=None)
@given(pairs_of_ids)
def test_one_prompt_is_stored_once(pairs):
    (pack,) = build_packs(pairs, row_tokens=10_000, batch_tokens=10_000)
    prompts = {tuple(p) for p, _ in pairs}
    stored = sum(map(len, prompts)) + sum(len(c) for _, c in pairs)
    assert int((pack.segment >= 0).sum()) == stored
    assert int(pack.in_prompt.sum()) == sum(map(len, prompts))


def test_pairs_of_different_groups_share_no_prompt():
    pairs = [((5, 6), (7,)), ((5, 6), (8,)), ((5, 6), (9,))]
    (pack,) = build_packs(pairs, groups=["plus", "minus", "plus"])
    assert int(pack.in_prompt.sum()) == 4
    assert pack.source[pack.row, pack.column][pack.pair.argsort()].tolist() == [0, 1, 0]


def test_windowed_mask_counts_positions_on_the_path_not_columns():
    (pack,) = build_packs([((1, 2, 3, 4), (5,)), ((1, 2, 3, 4), (6, 7))])
    seen = pack.visible(window=3)
    last = int(pack.column[pack.target == 7])
    assert pack.input_ids[0, seen[0, last]].tolist() == [4, 6, 7]


def test_padding_sees_itself_only_and_nothing_sees_padding():
    (pack,) = build_packs([((1,) * 9, (2,)), ((3,), (4,))], layout="padded")
    seen = pack.visible()
    assert pack.segment[1].tolist()[2:] == [-1] * 8
    assert torch.equal(seen[1, 2:], torch.eye(10, dtype=torch.bool)[2:])
    assert not seen[1, :2, 2:].any()


def test_batches_keep_to_the_token_budget():
    pairs = [(tuple(range(1, n + 2)), (1, 2)) for n in range(30)]
    packs = build_packs(pairs, row_tokens=40, batch_tokens=120)
    assert all(p.input_ids.numel() <= 120 for p in packs)
    assert sum(p.input_ids.numel() for p in packs) < 1.25 * sum(len(p) + len(c) for p, c in pairs)


@pytest.mark.parametrize("pairs", [[((), (1,))], [((1,), ())]])
def test_an_empty_side_is_an_error(pairs):
    with pytest.raises(ValidationError, match="empty"):
        build_packs(pairs)


def test_groups_of_another_length_are_an_error():
    with pytest.raises(ValidationError, match="2 pairs but 1 groups"):
        build_packs([((1,), (2,)), ((1,), (3,))], groups=[0])


def test_masks_are_stored_as_attention_on_a_gpu_reads_them():
    """Rows begin at multiples of 8 numbers, whatever the length of the rows: others are copied at every layer."""
    for n in (3, 8, 13):
        (pack,) = build_packs([([5] * n, [6] * 4)])
        mask = pack.additive_mask(torch.float32)
        assert mask.shape[-2:] == (n + 4, n + 4)
        assert mask.stride(-1) == 1 and all(step % 8 == 0 for step in mask.stride()[:-1])
        assert torch.equal(mask[:, 0] == 0, pack.visible())


def test_a_pack_goes_to_a_device_in_one_transfer():
    (pack,) = build_packs([([5] * 9, [6] * 4), ([5] * 9, [7] * 3)])
    counts = counted_ops(lambda: pack.to(torch.device("meta")))
    assert counts["_to_copy"] == 1
    moved = pack.to(torch.device("meta"))
    assert moved.input_ids.is_meta and moved.target.shape == pack.target.shape
    assert pack.to(pack.input_ids.device) is pack
    going_on = continuations(3, [([5], [6])]).to(torch.device("meta"))
    assert going_on.hidden_from.is_meta and going_on.read == 3
