"""The edits of every token of a step of vLLM, and who has which slot; vLLM itself is not needed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechanex.errors import ValidationError
from mechanex.vllm.asked import AskedEdit, as_scope, as_text, block_salt, edits_of, in_scope
from mechanex.vllm.plan import PlacedEdit, RequestRead, plan_step
from mechanex.vllm.slots import Slots

SCOPES = st.one_of(
    st.none(),
    st.sampled_from(["prompt", "generated"]),
    st.integers(-6, 12),
    st.builds(
        slice,
        st.none() | st.integers(-6, 12),
        st.none() | st.integers(-6, 12),
        st.none() | st.integers(1, 3),
    ),
)


def test_a_batch_of_prompts_and_answers() -> None:
    plan = plan_step(
        [
            RequestRead(0, 3, 3),
            RequestRead(0, 4, 6, [PlacedEdit(2, 1.5)]),
            RequestRead(5, 1, 4, [PlacedEdit(0, 1.0, "prompt"), PlacedEdit(1, -2.0, "generated")]),
            RequestRead(2, 4, 4, [PlacedEdit(3, 4.0, "prompt"), PlacedEdit(3, 0.5)]),
        ]
    )
    none = [-1, -1]
    assert plan.rows.tolist() == [none] * 3 + [[2, -1]] * 4 + [[-1, 1]] + [[3, 3]] * 2 + [[-1, 3]] * 2
    assert plan.rows.dtype == np.int32 and plan.strength.dtype == np.float32
    assert plan.strength[plan.rows >= 0].tolist() == [1.5] * 4 + [-2.0] + [4.0, 0.5] * 2 + [0.5] * 2
    assert plan.slots == {1, 2, 3}


def test_a_plan_of_nothing() -> None:
    assert plan_step([]).rows.shape == (0, 1)
    assert plan_step([RequestRead(0, 2, 2)]).rows.tolist() == [[-1], [-1]]


def test_more_edits_than_there_is_room_for_is_an_error() -> None:
    edits = [PlacedEdit(0, 1.0), PlacedEdit(1, 1.0)]
    assert plan_step([RequestRead(0, 1, 1, edits)], most=2).rows.tolist() == [[0, 1]]
    with pytest.raises(ValidationError, match="2 edits, and there is room for 1"):
        plan_step([RequestRead(0, 1, 1, edits)], most=1)


@given(scope=SCOPES, prompt=st.integers(1, 8), cuts=st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_pieces_are_edited_as_the_whole(scope: int | slice | None, prompt: int, cuts: list[int]) -> None:
    """Chunked prefill, decoding and recomputation after preemption read the same text in other pieces."""
    edit = [PlacedEdit(7, 2.0, scope)]
    whole = plan_step([RequestRead(0, sum(cuts), prompt, edit)])
    begins = np.cumsum([0, *cuts[:-1]]).tolist()
    pieces = [plan_step([RequestRead(at, n, prompt, edit)]) for at, n in zip(begins, cuts, strict=True)]
    assert np.concatenate([piece.rows for piece in pieces]).tolist() == whole.rows.tolist()
    expected = [in_scope(scope, at, prompt) for at in range(sum(cuts))]
    assert (whole.rows[:, 0] == 7).tolist() == expected


@given(scope=SCOPES, strength=st.floats(allow_nan=False, allow_infinity=False))
def test_a_request_carries_its_edits_unchanged(scope: int | slice | None, strength: float) -> None:
    edits = (AskedEdit("abc", strength, scope), AskedEdit("d", 1.0))
    assert edits_of(as_text(edits)) == edits


@pytest.mark.parametrize(
    "text", ["", "[]x", "[[1]]", '[["a", "b", null]]', '[["a", NaN, null]]', '[["a", 1, "some"]]']
)
def test_changed_edits_are_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        edits_of(text)


@pytest.mark.parametrize("tokens", ["some", 1.5, slice(0, 4, 0), [0, 1]])
def test_what_names_no_tokens_is_refused(tokens: object) -> None:
    with pytest.raises(ValidationError, match="token"):
        as_scope(tokens)


# Blocks of the prefix cache


def test_blocks_that_nothing_edits_are_shared() -> None:
    edits = [AskedEdit("a", 1.0, "generated")]
    assert block_salt(edits, 0, 4, 10) == block_salt(edits, 4, 8, 10) == []
    assert block_salt(edits, 8, 12, 10) and block_salt(edits, 12, 16, 10)


def test_blocks_tell_vectors_strengths_order_and_tokens_apart() -> None:
    a, b = AskedEdit("a", 1.0), AskedEdit("b", 1.0)
    asked = [
        [],
        [a],
        [b],
        [a, b],
        [b, a],
        [AskedEdit("a", 2.0)],
        [AskedEdit("a", 1.0, "prompt")],
        [AskedEdit("a", 1.0, "generated")],
        [AskedEdit("a", 1.0, 8)],
    ]
    salts = [tuple(block_salt(edits, 8, 12, 10)) for edits in asked]
    assert len(set(salts)) == len(salts)


def test_blocks_that_are_edited_alike_are_shared() -> None:
    everywhere = block_salt([AskedEdit("a", 1.0)], 0, 4, 10)
    assert everywhere == block_salt([AskedEdit("a", 1.0, "prompt")], 0, 4, 12)
    assert everywhere == block_salt([AskedEdit("a", 1.0, slice(0, 5))], 0, 4, 9)


# Slots


def test_requests_with_the_same_edits_share_a_slot() -> None:
    slots = Slots(2)
    assert slots.acquire("one", ["a"]) == {"a": 0}
    assert slots.acquire("two", ["a", "b"]) == {"b": 1}
    assert slots.acquire("one", ["a"]) == {}
    assert slots.fits(["a", "b"]) and not slots.fits(["c"])
    with pytest.raises(ValidationError, match="2 of the 2 slots are taken"):
        slots.acquire("three", ["c"])
    slots.release("one")
    assert not slots.fits(["c"]), "the second request still holds both"
    slots.release("two")
    slots.release("two")
    assert slots.acquire("three", ["c", "d"]).keys() == {"c", "d"}
    assert slots.holders == ("three",)


def test_a_slot_stays_filled_until_it_is_needed() -> None:
    slots = Slots(2)
    slots.acquire("one", ["a"])
    slots.release("one")
    assert slots.acquire("two", ["a"]) == {}, "what was there is there"
    slots.release("two")
    slots.acquire("three", ["b"])
    assert slots.acquire("four", ["a"]) == {}
    slots.release("three")
    assert slots.acquire("five", ["c"]) == {"c": 1}, "the idle one makes way"
    assert slots.slot("a") == 0


@given(
    st.lists(st.tuples(st.integers(0, 5), st.frozensets(st.sampled_from("abcdef"), max_size=3)), max_size=40)
)
def test_slots_are_never_lost_or_shared_by_different_edits(calls: list[tuple[int, frozenset[str]]]) -> None:
    slots = Slots(3)
    holding: dict[str, frozenset[str]] = {}
    filled: dict[int, str] = {}
    for who, keys in calls:
        name = str(who)
        if name in holding:
            slots.release(name)
            del holding[name]
            continue
        alive = set().union(*holding.values())
        assert slots.fits(keys) == (len(alive | keys) <= 3)
        if not slots.fits(keys):
            continue
        filled |= {slot: key for key, slot in slots.acquire(name, keys).items()}
        holding[name] = keys
        for key in set().union(*holding.values()):
            assert filled[slots.slot(key)] == key
