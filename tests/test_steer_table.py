"""Tables of edits: several a row, with strengths and gates, stacked or written into fixed room."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mechanex.engine.intervention import Edit, EditTable
from mechanex.engine.steer_table import SteerTable
from mechanex.errors import ValidationError

WIDTH = 24


def edits() -> list[Edit]:
    """One of each: add, ablate, an affine one, a gated clamp, one that keeps norms."""
    v, w, a = torch.randn(WIDTH), torch.randn(WIDTH), torch.randn(2, 3, WIDTH)
    return [
        Edit.add(v),
        Edit.ablate(w),
        Edit.affine(v, a[0] / WIDTH, a[1]),
        Edit.clamp(w, 2.0).gated("step", v, 0.1),
        Edit.add(3 * w).gated("norm"),
    ]


def one_by_one(hidden: Tensor, table: list[Edit], rows: Tensor, strength: Tensor | None) -> Tensor:
    """Each row alone, each edit alone."""
    out = hidden.clone()
    for t in range(len(out)):
        for i, k in enumerate(rows[t].tolist()):
            if k >= 0:
                scale = 1.0 if strength is None else float(strength[t, i])
                out[t] = table[k].scaled(scale).apply(out[t])
    return out


def call(rows_of: int, n_edits: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(17, WIDTH)
    rows = torch.randint(-1, n_edits, (17, rows_of), dtype=torch.int32)
    return hidden, rows, torch.randn(17, rows_of)


@pytest.mark.parametrize("strengths", [False, True])
@pytest.mark.parametrize("m", [1, 2, 3])
def test_rows_take_their_edits_in_order(m: int, strengths: bool) -> None:
    table = edits()
    hidden, rows, strength = call(m, len(table))
    given = strength if strengths else None
    want = one_by_one(hidden, table, rows, given)
    torch.testing.assert_close(EditTable(table).apply(hidden, rows, given), want)
    folded = EditTable(table).apply(
        hidden[:16].view(4, 4, WIDTH),
        rows[:16].view(4, 4, m),
        None if given is None else given[:16].view(4, 4, m),
    )
    torch.testing.assert_close(folded, want[:16].view(4, 4, WIDTH))


def test_dense_matrices_take_strengths_order_and_gates_too() -> None:
    dense = Edit.dense(torch.randn(WIDTH), torch.randn(WIDTH, WIDTH) / WIDTH)
    table = [*edits(), dense, dense.gated("sigmoid", torch.randn(WIDTH), -0.5), dense.gated("norm")]
    hidden, rows, strength = call(2, len(table))
    rows[0], rows[1] = torch.tensor([5, 6]), torch.tensor([7, -1])
    got = EditTable(table).apply(hidden, rows, strength)
    factored = [
        e if e.matrix is None else Edit(e.bias, e.matrix.T.contiguous(), torch.eye(WIDTH), gate=e.gate)
        for e in table
    ]
    torch.testing.assert_close(got, one_by_one(hidden, factored, rows, strength))


def test_an_edit_with_a_gate_is_not_composed() -> None:
    gated = Edit.add(torch.ones(WIDTH)).gated("relu", torch.ones(WIDTH), -1.0)
    for first, second in ((gated, Edit.add(torch.ones(WIDTH))), (Edit.add(torch.ones(WIDTH)), gated)):
        with pytest.raises(ValidationError, match="give the row both, in order"):
            first.then(second)
    # Its strength may still be fixed.
    x = torch.randn(5, WIDTH)
    torch.testing.assert_close(gated.scaled(2.0).apply(x) - x, 2 * (gated.apply(x) - x))


@pytest.mark.parametrize("everywhere", [False, True])
def test_chains_run_in_order_whether_or_not_they_can_be_composed(everywhere: bool) -> None:
    table = edits()
    chains = [[0, 1, 2], [0, 3, 1], [4], [3, 4, 0, 2]]
    composed = EditTable.of_chains([[table[k] for k in chain] for chain in chains])
    assert len(composed.edits) == 1 + 3 + 1 + 3
    hidden = torch.randn(9, WIDTH)
    rows = torch.tensor([0, 1, 2, 3, -1, 3, 2, 1, 0], dtype=torch.int32)
    if everywhere:
        composed, rows = EditTable.of_chains([[table[k] for k in chains[3]]]), torch.full((9,), 3)
    want = torch.stack(
        [run(hidden[t], [table[k] for k in chains[c]] if c >= 0 else []) for t, c in enumerate(rows)]
    )
    torch.testing.assert_close(composed.apply(hidden, None if everywhere else rows), want)
    with pytest.raises(ValidationError, match="takes no strengths"):
        composed.apply(hidden, rows, torch.ones(9))


def run(row: Tensor, chain: list[Edit]) -> Tensor:
    for edit in chain:
        row = edit.apply(row)
    return row


def test_gates_that_need_a_weight_ask_for_it() -> None:
    with pytest.raises(ValidationError, match=r"A step gate needs a weight of shape \[24\]"):
        Edit.add(torch.ones(WIDTH)).gated("step")
    with pytest.raises(ValidationError, match=r"weight of shape \[1, 24\]; got \[1, 23\]"):
        Edit.add(torch.ones(WIDTH)).gated("step", torch.ones(23))


def test_gradients_reach_a_gate_through_a_table() -> None:
    weight = torch.randn(WIDTH, requires_grad=True)
    edit = Edit.add(torch.ones(WIDTH)).gated("sigmoid", weight, torch.zeros((), requires_grad=True))
    assert edit.requires_grad
    EditTable([edit]).apply(torch.randn(5, WIDTH)).sum().backward()
    assert weight.grad is not None and weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_table_of_fixed_room_does_what_its_edits_do(dtype: torch.dtype) -> None:
    table = edits()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    room = SteerTable(8, WIDTH, 4, gates=True, dtype=wide)
    for k, edit in enumerate(table):
        room.write(7 - k, edit)
    hidden, rows, strength = call(3, len(table))
    hidden = hidden.to(dtype)
    slots = torch.where(rows >= 0, 7 - rows, rows)
    got = room.apply(hidden, slots, strength)
    assert got.dtype == dtype
    torch.testing.assert_close(got, EditTable(table).apply(hidden, rows, strength))


def test_edits_written_later_reach_calls_over_the_same_memory() -> None:
    room = SteerTable(2, WIDTH, 3, gates=True)
    where = [t.data_ptr() for t in (room._bias, room._left, room._right, room._gate.weight)]
    hidden = torch.randn(4, WIDTH)
    rows = torch.tensor([[0], [1], [-1], [0]], dtype=torch.int32)
    assert torch.equal(room.apply(hidden, rows), hidden)
    for edit in edits():
        room.write(0, edit)
        want = hidden.clone()
        want[[0, 3]] = edit.apply(hidden[[0, 3]])
        torch.testing.assert_close(room.apply(hidden, rows), want)
    room.clear(0)
    assert torch.equal(room.apply(hidden, rows), hidden)
    assert where == [t.data_ptr() for t in (room._bias, room._left, room._right, room._gate.weight)]
    assert room.n_bytes == 4 * (2 * WIDTH * (1 + 6 + 1) + 2 + 2)


def test_what_does_not_fit_is_refused() -> None:
    room = SteerTable(2, WIDTH, 1)
    low = Edit.affine(torch.zeros(WIDTH), *torch.randn(2, 2, WIDTH))
    with pytest.raises(ValidationError, match="rank 2, the table has room for 1"):
        room.write(0, low)
    with pytest.raises(ValidationError, match="pass gates=True"):
        room.write(0, Edit.add(torch.ones(WIDTH)).gated("norm"))
    with pytest.raises(ValidationError, match="slots 0 to 1; got 2"):
        room.write(2, Edit.add(torch.ones(WIDTH)))
    with pytest.raises(ValidationError, match="25 wide, the table 24"):
        room.write(0, Edit.add(torch.ones(25)))
    with pytest.raises(ValidationError, match="dense matrix"):
        room.write(0, Edit.dense(torch.ones(WIDTH), torch.eye(WIDTH)))
    with pytest.raises(ValidationError, match="one slot or more"):
        SteerTable(0, WIDTH)


@pytest.mark.gpu
def test_a_captured_step_sees_what_is_written_afterwards() -> None:
    room = SteerTable(4, WIDTH, 3, gates=True, device="cuda")
    hidden, rows, strength = (t.cuda() for t in call(2, 4))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        room.apply(hidden, rows, strength)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = room.apply(hidden, rows, strength)
    for k, edit in enumerate(edits()[1:]):
        room.write(k, edit)
    strength.copy_(torch.randn_like(strength))
    graph.replay()
    torch.testing.assert_close(out, room.apply(hidden, rows, strength))
    assert not torch.equal(out, hidden)
