"""The steer op with several edits a row, strengths and gates, against the oracle on every backend that runs here."""

from __future__ import annotations

import optable
import pytest
import torch
from optable import DTYPES, MANY_CASES, MANY_GRADIENT_CASES, ManyCase, SteerCase, pairs
from test_steer_op import guarded
from tolerances import assert_within, many_truth
from torch import Tensor

from mechanex import backends
from mechanex.errors import ValidationError
from mechanex.ops.gate import KINDS, Gate
from mechanex.ops.steer import steer

HAVE = [b for b in backends.backends() if "steer_many" in b.ops]
AVAILABLE = [b.name for b in HAVE if b.lacks("cpu") is None]
FAST = [name for name in AVAILABLE if name != "reference"]
PLACES = [
    pytest.param(b.name, device, id=f"{b.name}-{device}", marks=[pytest.mark.gpu] if device == "cuda" else [])
    for b in HAVE
    for device in (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    if b.lacks(device) is None
]
MIXED = ManyCase(SteerCase(11, 40, n_edits=5, rank=2, rows="mixed"), 3, True, KINDS)


def call(args: optable.ManyArgs, backend: str | None = None) -> Tensor:
    """The public op on the arguments of its table."""
    hidden, rows, strength, bias, left, right, gate = args
    if rows is None and strength is not None:
        strength = strength[:, 0]
    return steer(hidden, rows, bias, left, right, strength=strength, gate=gate, backend=backend)


def assert_matches_oracle(case: ManyCase, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    args = case.make(dtype, device)
    before = [t.clone() if isinstance(t, Tensor) else t for t in args]
    with guarded():
        out = call(args, backend)
    assert out.dtype == dtype
    truth, scale = many_truth(args)
    assert_within(out, truth, scale, case.base.width)
    for tensor, kept in zip(args, before, strict=True):
        if isinstance(tensor, Tensor):
            assert torch.equal(tensor, kept), "the op wrote to an argument"


@pytest.mark.parametrize(("backend", "device"), PLACES)
@pytest.mark.parametrize(("case", "dtype"), pairs(MANY_CASES, DTYPES), ids=str)
def test_matches_the_oracle(case: ManyCase, dtype: torch.dtype, backend: str, device: str) -> None:
    assert_matches_oracle(case, dtype, backend, device)


def leaves_of(args: optable.ManyArgs) -> tuple[list[Tensor], list[Tensor | None]]:
    """The tensors that gradients exist for, as leaves, and all of them in the order of :func:`call_flat`."""
    *tensors, gate = args
    flat = [*tensors, None if gate is None else gate.weight, None if gate is None else gate.offset]
    every = [t.detach().requires_grad_() if t is not None and t.is_floating_point() else t for t in flat]
    return [t for t in every if t is not None and t.requires_grad], every


def rebuilt(every: list[Tensor | None], gate: Gate | None) -> optable.ManyArgs:
    *tensors, weight, offset = every
    return *tensors, None if gate is None else Gate(gate.kinds, weight, offset)


@pytest.mark.ci
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("case", MANY_GRADIENT_CASES, ids=str)
def test_gradients_of_both_orders_agree_with_finite_differences(case: ManyCase, backend: str) -> None:
    args = case.make(torch.float64)
    leaves, every = leaves_of(args)
    places = [i for i, t in enumerate(every) if t is not None and t.requires_grad]

    def op(*found: Tensor) -> Tensor:
        filled = list(every)
        for place, tensor in zip(places, found, strict=True):
            filled[place] = tensor
        return call(rebuilt(filled, args[-1]), backend)

    assert torch.autograd.gradcheck(op, leaves)
    assert torch.autograd.gradgradcheck(op, leaves)


@pytest.mark.parametrize(("backend", "device"), [p for p in PLACES if p.values[0] != "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_come_in_each_arguments_dtype_near_the_true_ones(
    dtype: torch.dtype, backend: str, device: str
) -> None:
    args = MIXED.make(dtype, device)

    def found(args: optable.ManyArgs, backend: str) -> tuple[Tensor, ...]:
        leaves, every = leaves_of(args)
        out = call(rebuilt(every, args[-1]), backend)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    *tensors, gate = args
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in tensors]
    truth = found((*wide, gate.to(torch.device(device), torch.float64)), "reference")
    for got, want in zip(found(args, backend), truth, strict=True):
        assert got.dtype == dtype
        far = (got.double() - want).abs().max()
        assert far <= 8 * torch.finfo(dtype).eps * want.abs().max(), far


def test_no_gradient_flows_through_a_step() -> None:
    args = ManyCase(SteerCase(6, 8, n_edits=2, rows="mixed"), 2, False, ("step",)).make(torch.float64)
    leaves, every = leaves_of(args)
    out = call(rebuilt(every, args[-1]))
    *_, weight, offset = torch.autograd.grad(out.sum(), leaves, allow_unused=True, materialize_grads=True)
    assert not weight.any() and not offset.any()


@pytest.mark.parametrize("backend", FAST)
def test_edits_in_order_are_calls_in_order(backend: str) -> None:
    hidden, rows, strength, bias, left, right, _ = MIXED.make(torch.float64)
    one_by_one = hidden
    for i in range(3):
        one_by_one = torch.stack(
            [
                steer(
                    x[None],
                    rows[t : t + 1, i].contiguous(),
                    bias * strength[t, i],
                    left * strength[t, i],
                    right,
                    backend=backend,
                )[0]
                for t, x in enumerate(one_by_one)
            ]
        )
    together = steer(hidden, rows, bias, left, right, strength=strength, backend=backend)
    torch.testing.assert_close(together, one_by_one)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_one_edit_a_row_may_come_as_a_column_bit_for_bit(backend: str) -> None:
    hidden, rows, *tables = SteerCase(9, 64, n_edits=3, rank=2, rows="mixed").make(torch.bfloat16)
    want = steer(hidden, rows, *tables, backend=backend)
    assert torch.equal(steer(hidden, rows[:, None], *tables, backend=backend), want)
    ones = torch.ones_like(rows, dtype=torch.float32)
    torch.testing.assert_close(steer(hidden, rows, *tables, strength=ones, backend=backend), want)


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_an_edit_come_back_bit_for_bit(backend: str, dtype: torch.dtype) -> None:
    args = MIXED.make(dtype)
    hidden, rows = args[:2]
    hidden[0, :4] = torch.tensor([-0.0, float("inf"), float("-inf"), float("nan")], dtype=dtype)
    rows[[0, 3, 7]] = -1
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    out = call(args, backend)
    assert torch.equal(out[[0, 3, 7]].view(integer), hidden[[0, 3, 7]].view(integer))
    assert not torch.equal(out[1], hidden[1])


@pytest.mark.parametrize("backend", AVAILABLE)
def test_no_edits_at_all_is_a_copy(backend: str) -> None:
    hidden, _, _, bias, *_ = MIXED.make(torch.float32)
    out = steer(hidden, torch.empty(11, 0, dtype=torch.int32), bias, backend=backend)
    assert torch.equal(out, hidden) and out.data_ptr() != hidden.data_ptr()


@pytest.mark.parametrize("backend", FAST)
def test_a_closed_gate_leaves_the_row_alone_and_an_open_one_does_not(backend: str) -> None:
    hidden = torch.randn(12, 16)
    direction = torch.zeros(1, 16)
    direction[0, 0] = 1.0
    gate = Gate.of("step", direction[0], -0.25)
    out = steer(hidden, None, 3 * direction, gate=gate, backend=backend)
    is_open = hidden[:, 0] > 0.25
    assert 0 < int(is_open.sum()) < 12
    assert torch.equal(out[~is_open], hidden[~is_open])
    torch.testing.assert_close(out[is_open], hidden[is_open] + 3 * direction)


@pytest.mark.parametrize("backend", FAST)
def test_a_relu_gate_caps_a_projection_from_one_side(backend: str) -> None:
    hidden = torch.randn(50, 16)
    axis = torch.nn.functional.normalize(torch.randn(16), dim=0)
    capped = steer(hidden, None, -axis[None], gate=Gate.of("relu", axis, -0.5), backend=backend)
    torch.testing.assert_close(capped @ axis, (hidden @ axis).clamp(max=0.5))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_gate_keeps_every_rows_norm(dtype: torch.dtype, backend: str) -> None:
    hidden = torch.randn(20, 128).to(dtype)
    strength = torch.linspace(-3, 3, 20)
    gate = Gate.of("norm", torch.zeros(128))
    bias = torch.randn(1, 128)
    out = steer(hidden, None, bias, strength=strength, gate=gate, backend=backend)
    close = {"rtol": 1e-5 if dtype == torch.float32 else 4e-3, "atol": 0.0}
    torch.testing.assert_close(out.double().norm(dim=1), hidden.double().norm(dim=1), **close)
    assert not torch.equal(out, hidden)
    # What an edit makes zero has no direction to scale.
    zeroed = steer(-bias, None, bias, gate=gate, backend=backend)
    assert torch.equal(zeroed, torch.zeros(1, 128))


@pytest.mark.parametrize("backend", AVAILABLE)
def test_an_unknown_kind_of_gate_is_nan_where_it_is_used(backend: str) -> None:
    args = MIXED.make(torch.float32)
    rows, kinds = args[1], args[-1].kinds
    kinds[2] = 9
    used = (rows == 2).any(1)
    out = call(args, backend)
    assert 0 < int(used.sum()) < 11
    assert out[used].isnan().all() and not out[~used].isnan().any()


@pytest.mark.parametrize("backend", FAST)
def test_a_row_comes_out_the_same_whatever_its_neighbours_are(backend: str) -> None:
    """Bit for bit: a request that is batched with others must not notice them."""
    hidden, rows, strength, *tables = MIXED.make(torch.float32)
    if backend == "eager":
        pytest.skip("matrix products of torch differ with the number of rows")
    together = call((hidden, rows, strength, *tables), backend)
    for t in range(11):
        few = (hidden[t : t + 1], rows[t : t + 1], strength[t : t + 1], *tables)
        assert torch.equal(call(few, backend)[0], together[t])


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("bad", [-2, 5, 2**31 - 1, -(2**31)])
def test_a_row_index_outside_the_table_is_refused(backend: str, bad: int) -> None:
    args = MIXED.make(torch.float32)
    args[1][4, 2] = bad
    with pytest.raises(ValidationError, match=r"5 edit\(s\)"):
        call(args, backend)


@pytest.mark.gpu
def test_a_row_index_outside_the_table_gives_nan_on_a_gpu() -> None:
    args = MIXED.make(torch.float32, "cuda")
    args[1][4, 2] = 7
    out = call(args)
    assert out[4].isnan().all() and not out[:4].isnan().any()


@pytest.mark.parametrize("backend", FAST)
def test_leading_dimensions_are_rows(backend: str) -> None:
    hidden, rows, strength, bias, left, right, gate = ManyCase(
        SteerCase(12, 31, n_edits=2, rank=1, rows="mixed"), 2, True, ("sigmoid",)
    ).make(torch.float32)
    flat = steer(hidden, rows, bias, left, right, strength=strength, gate=gate, backend=backend)
    folded = steer(
        hidden.view(3, 4, 31),
        rows.view(3, 4, 2),
        bias,
        left,
        right,
        strength=strength.view(3, 4, 2),
        gate=gate,
        backend=backend,
    )
    assert torch.equal(folded, flat.view(3, 4, 31))
    one = steer(hidden[0], rows[0], bias, left, right, strength=strength[0], gate=gate, backend=backend)
    torch.testing.assert_close(one, flat[0])


X, B = torch.zeros(5, 8), torch.zeros(2, 8)
R, S = torch.zeros(5, 3, dtype=torch.int32), torch.zeros(5, 3)
G = Gate(torch.zeros(2, dtype=torch.int32), torch.zeros(2, 8), torch.zeros(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": S[:, :2]}, r"strength must have shape \[5, 3\] \(that of rows\), got \[5, 2\]"),
        ({"strength": 2.0}, "one number an edit, got float"),
        ({"strength": R}, "floating-point tensor, .* got torch.int32"),
        ({"strength": R.to(torch.float8_e5m2)}, "floating-point tensor, .* got torch.float8_e5m2"),
        ({"strength": S.to("meta")}, "strength is on meta"),
        ({"rows": R[:4]}, r"rows must have shape \[5\], or \[5\] and m edits, got \[4, 3\]"),
        ({"rows": R[:, :, None]}, "rows must have shape"),
        ({"gate": "step"}, "gate must be a Gate .* got str"),
        ({"gate": Gate.of("step", X[0])}, r"gate.weight must have bias' shape \[2, 8\], got \[1, 8\]"),
        ({"rows": None, "bias": B[:1], "strength": S}, r"shape \[5\] \(hidden's rows\)"),
    ],
)
def test_bad_arguments_say_what_was_wrong(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        steer(**{"hidden": X, "rows": R, "bias": B, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gate.of("stepp", X[0]), "none, step, sigmoid, relu, norm; got 'stepp'"),
        (lambda: Gate.of("step", X), r"one vector of shape \[d\]; got \[5, 8\]"),
        (lambda: Gate.of("step", X[0], X[0]), r"one number; got shape \[8\]"),
        (lambda: Gate(G.kinds.long(), G.weight, G.offset), "int32"),
        (lambda: Gate(G.kinds, G.weight[:1], G.offset), r"gate.weight must be floating point \[2, d\]"),
        (lambda: Gate(G.kinds, G.weight, G.offset[:1]), r"gate.offset must be floating point \[2\]"),
        (lambda: Gate(G.kinds, G.weight.to(torch.float8_e5m2), G.offset), "gate.weight .* torch.float8_e5m2"),
    ],
)
def test_a_gate_says_what_is_wrong_with_it(make: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.ci
@pytest.mark.parametrize("case", MANY_GRADIENT_CASES[1:], ids=str)
def test_the_library_op_passes_opcheck(case: ManyCase) -> None:
    args = case.make(torch.float32)
    _, every = leaves_of(args)
    *tensors, weight, offset = every
    kinds = None if args[-1] is None else args[-1].kinds
    torch.library.opcheck(torch.ops.mechanex.steer_many.default, (*tensors, kinds, weight, offset, None))


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    args = MIXED.make(torch.float32)
    compiled = torch.compile(lambda *a: call(a).square(), fullgraph=True, backend="aot_eager")
    for run in (compiled, lambda *a: call(a).square()):
        leaves, every = leaves_of(args)
        out = run(*rebuilt(every, args[-1]))
        found = [out, *torch.autograd.grad(out.sum(), leaves)]
        if run is compiled:
            first = found
    for one, other in zip(first, found, strict=True):
        torch.testing.assert_close(one, other)


def test_fake_tensors_and_transforms_see_the_op() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    args = MIXED.make(torch.bfloat16)
    with FakeTensorMode() as mode:
        *tensors, gate = args
        fake = [None if t is None else mode.from_tensor(t) for t in tensors]
        out = call((*fake, Gate(*(mode.from_tensor(t) for t in (gate.kinds, gate.weight, gate.offset)))))
    assert out.shape == (11, 40) and out.dtype == torch.bfloat16
    hidden, *rest = MIXED.make(torch.float64)
    _, tangent = torch.func.jvp(lambda h: call((h, *rest)), (hidden,), (torch.ones_like(hidden),))
    step = 1e-6
    slope = (call((hidden + step, *rest)) - call((hidden - step, *rest))) / (2 * step)
    torch.testing.assert_close(tangent, slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_matches_the_oracle(dtype: torch.dtype, instruction_set: str) -> None:
    for case in MANY_CASES:
        assert_matches_oracle(case, dtype, "native")
