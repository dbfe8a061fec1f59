"""What completion_logprob takes beside its arguments and results on a device: bounded whatever the number of rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from optable import LogprobCase, with_head
from test_logprob_op import FAST, as_on_a_gpu, assert_matches_oracle, both, most_bytes
from torch._subclasses.fake_tensor import FakeTensorMode

from mechanex.backends import chunked, eager, triton
from mechanex.backends.native.logprob import walk_with
from mechanex.ops import logprob as op
from mechanex.ops.head import Head
from mechanex.ops.logprob import completion_logprob

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("sums", [0, 4])
@pytest.mark.parametrize("logit", [4, 6, 24])
@pytest.mark.parametrize("width", [1, 768, 4096, 16384])
def test_blocks_stay_within_the_bytes_and_cover_everything(width: int, logit: int, sums: int) -> None:
    for n_rows in (*range(1, 70), 255, 256, 257, 511, 513, 1000, 1024, 1025, 2048, 4096, 100_000):
        for n_vocab in (1, 63, 50257, 128256):
            row, most = sums * width, (16 << 20) - (1 << 19)
            found = chunked.blocks_for(n_rows, n_vocab, row=row, logit=logit, most=most)
            assert found.rows * row + found.rows * found.columns * logit <= most
            assert 1 <= found.rows <= n_rows and found.columns % 64 == 0
            # No block more than that needs: each reads all the weights.
            assert -(-n_rows // found.rows) <= -(-n_rows // (448 if width <= 4096 else 1))


def test_the_blocks_of_the_usual_call() -> None:
    """4,096 wide: half of the bytes for sums, whole tiles of products for the rest."""
    most = chunked.MOST_BYTES - chunked.ROOM
    few, many = (chunked.blocks_for(n, 128256, row=4 * 4096, logit=4, most=most) for n in (256, 4096))
    assert many == (512, 3840)
    assert few.rows == 256 and few.columns % 128 == 0 and 11_000 < few.columns < 12_000


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    """A bound that small cases reach, in bytes."""
    monkeypatch.setattr(chunked, "MOST_BYTES", 1 << 20)
    monkeypatch.setattr(chunked, "ROOM", 1 << 16)
    monkeypatch.setattr(chunked, "_PIECE", 3 << 16)
    monkeypatch.setattr(op, "SPENT_BYTES", 1 << 18)
    return 1 << 20


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        LogprobCase(1, 256, 3001),
        LogprobCase(40, 256, 3001, True, softcap=5.0),
        LogprobCase(140, 1024, 130, True, softcap=5.0),
    ],
    ids=str,
)
def test_a_call_takes_no_more_than_it_may(
    case: LogprobCase, dtype: torch.dtype, backend: str, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_a_gpu(monkeypatch, *HALF)
    args = case.make(dtype)
    leaf = args[0].detach().requires_grad_()
    numbers = 4 * case.n_rows
    assert most_bytes(lambda: completion_logprob(*args, backend=backend)) <= small + numbers
    # What is kept for the gradient becomes the gradient.
    assert (
        most_bytes(lambda: completion_logprob(leaf, *args[1:], backend=backend))
        <= small + numbers + leaf.nbytes
    )
    out = completion_logprob(leaf, *args[1:], backend=backend)
    kept = getattr(out.grad_fn, "slope", None)
    assert (kept is not None) is (leaf.nbytes > op.SPENT_BYTES)
    (gradient,) = torch.autograd.grad(out.sum(), leaf)
    assert kept is None or gradient.data_ptr() == kept.data_ptr()
    assert_matches_oracle(case, dtype, backend, multiplies_halves=True)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("n_rows", [20, 260])
def test_shares_that_lie_in_the_products_and_beside_them(
    n_rows: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_a_gpu(monkeypatch, *HALF)
    monkeypatch.setattr(chunked, "MOST_BYTES", (n_rows << 10) + chunked.ROOM)
    monkeypatch.setattr(chunked, "_PIECE", 0)
    assert_matches_oracle(LogprobCase(n_rows, 16, 300, True), torch.bfloat16, backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_a_kept_graph_gives_its_gradient_again(
    dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first gradient has taken the slope's memory."""
    args = LogprobCase(5, 31, 200, True, softcap=5.0).make(dtype)
    _, want = both(args, torch.arange(5.0), backend)
    for spent in (0, 1 << 20):
        monkeypatch.setattr(op, "SPENT_BYTES", spent)
        leaf = args[0].detach().requires_grad_()
        out = completion_logprob(leaf, *args[1:], backend=backend)
        for keeps in (True, True, False):
            (again,) = torch.autograd.grad(out, leaf, torch.arange(5.0), retain_graph=keeps)
            assert torch.equal(again, want)


@pytest.mark.parametrize("backend", FAST)
def test_several_gradients_at_once(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = LogprobCase(5, 31, 200, True, softcap=5.0).make(torch.float32)
    many = torch.arange(15.0).view(3, 5)
    want = torch.stack([both(args, one, backend)[1] for one in many])
    for spent in (0, 1 << 20):
        monkeypatch.setattr(op, "SPENT_BYTES", spent)
        leaf = args[0].detach().requires_grad_()
        out = completion_logprob(leaf, *args[1:], backend=backend)
        for _ in range(2):
            (found,) = torch.autograd.grad(out, leaf, many, retain_graph=True, is_grads_batched=True)
            torch.testing.assert_close(found, want)


def test_a_walk_that_does_not_serve_a_call_leaves_its_blocks_as_they_are(
    small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_a_gpu(monkeypatch, *HALF)
    hidden, head, target = with_head(LogprobCase(600, 512, 130).make(torch.bfloat16))
    by = dataclasses.replace(eager.LOGPROB, walk=lambda *_: None)
    results = hidden.nbytes + 3 * 4 * 600
    assert most_bytes(lambda: by.with_slope(hidden, head, target)) <= small + results


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("widens", [False, True])
@pytest.mark.parametrize("n_rows", [2, 10, 4096])
def test_copies_of_the_bias_and_products_that_are_added_are_counted(
    n_rows: int, widens: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before torch 2.8 there are no wide products of half types: what is added to the sums has memory of its own."""
    monkeypatch.setattr(chunked, "widens", lambda device, dtype: widens)
    width, n_vocab = 4096, 1 << 20
    with FakeTensorMode():
        shapes = (n_rows, width), (n_vocab, width), (n_vocab,)
        hidden, weight, shift = (torch.empty(*shape, dtype=torch.bfloat16, device="cuda") for shape in shapes)
        head = Head(weight, shift if bias else None)
        blocks = chunked._Work(triton.LOGPROB, hidden, head, True, None).blocks
    row = 4 * width if widens else 6 * width
    logit = (4 if blocks.rows >= 256 else 6) if widens else 2
    taken = blocks.rows * (row + logit * blocks.columns) + (4 * blocks.columns if bias else 0)
    assert taken <= chunked.MOST_BYTES - chunked.ROOM


def test_one_walk_has_no_more_parts_than_there_is_room_for() -> None:
    class Module:
        def walk_groups(self, *_: object) -> int:
            return 16

        def walk(self, *args: object) -> None:
            groups.append(args[-3])

    groups: list[object] = []
    for n_rows, width in ((16, 4096), (64, 4096), (64, 8192)):
        hidden, weight, target, *numbers = LogprobCase(n_rows, width, 8).make(torch.bfloat16)
        head = Head(weight, *numbers)
        walk_with(Module(), head, hidden, target, (0, 0))
    assert groups == [16, 14, 6]
