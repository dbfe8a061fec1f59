"""The ops of sparse autoencoders against the oracle, on every backend that runs here, with encoders of every kind."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from optable import DTYPES, ENCODERS, SAE_CASES, TOP_CASES, SaeCase
from test_steer_op import guarded
from tolerances import assert_within
from torch import Tensor

from mechanex import backends
from mechanex.backends import native, reference
from mechanex.backends.native import modules
from mechanex.errors import ValidationError
from mechanex.ops.encoder import FeatureEncoder
from mechanex.ops.sae import quantized, sae_features, sae_top_features

HAVE = [b for b in backends.backends() if "sae_features" in b.ops]
PLACES = [
    pytest.param(b.name, device, id=f"{b.name}-{device}", marks=[pytest.mark.gpu] if device == "cuda" else [])
    for b in HAVE
    for device in (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    if b.lacks(device) is None and not (b.name == "native" and device == "cuda")
]
AVAILABLE = [b.name for b in HAVE if b.lacks("cpu") is None]
KINDS = [(torch.float32, encoder) for encoder in ENCODERS]
KINDS += [(dtype, dtype) for dtype in DTYPES[1:]] + [
    (torch.bfloat16, torch.int8),
    (torch.float64, torch.bfloat16),
]


def in_turn(cases: Sequence[SaeCase]) -> list[tuple[SaeCase, tuple[torch.dtype, torch.dtype]]]:
    """Each case with three of the kinds, every kind with cases of all sorts."""
    return [(case, KINDS[(3 * i + j) % len(KINDS)]) for i, case in enumerate(cases) for j in range(3)]


def served(backend: str, case: SaeCase, kinds: tuple[torch.dtype, torch.dtype], device: str) -> bool:
    return backends.get(backend).ops["sae_features"].refuses(*case.encoder(*kinds, device)) is None


def wide(args: tuple[object, ...]) -> list[object]:
    return [t.double() if isinstance(t, Tensor) and t.dtype is not torch.int8 else t for t in args]


def truth_of(args: tuple[object, ...]) -> tuple[Tensor, Tensor]:
    """The pre-activations in float64, and the magnitudes of what their sums add up."""
    hidden, encoder, bias, scale = args[0].double(), args[1].double(), args[2].double(), args[-1]  # type: ignore[attr-defined]
    factor = 1.0 if not isinstance(scale, Tensor) else scale.double()
    return (hidden @ encoder.T) * factor + bias, (hidden.abs() @ encoder.abs().T) * factor + bias.abs()


@pytest.mark.parametrize(("backend", "device"), PLACES)
@pytest.mark.parametrize(("case", "kinds"), in_turn(SAE_CASES), ids=str)
def test_features_match_the_oracle(
    case: SaeCase, kinds: tuple[torch.dtype, torch.dtype], backend: str, device: str
) -> None:
    args = case.make(*kinds, device)
    if not served(backend, case, kinds, device):
        with pytest.raises(
            ValidationError, match=r"can't compute this sae_features: .*; choose auto or eager"
        ):
            sae_features(*args[:6], scale=args[6], backend=backend)
        return
    with guarded():
        out = sae_features(*args[:6], scale=args[6], backend=backend)
    assert out.dtype == (torch.float64 if torch.float64 in kinds else torch.float32)
    hidden, encoder = case.encoder(*kinds, device)
    truth = reference.sae_features(hidden.double(), FeatureEncoder(*wide(tuple(encoder))))  # type: ignore[arg-type]
    z, size = truth_of(args)
    threshold, gain, offset = args[3:6]
    if gain is not None and offset is not None:
        size = size * gain.double().abs() + offset.double().abs()
    # Where a sum is at the threshold to rounding, either is right.
    level = 0.0 if threshold is None else threshold.double()
    edge = (z - level).abs() < 1e-5 * (1 + truth_of(args)[1])
    assert_within(torch.where(edge, truth.to(out), out), truth, size, case.width)


@pytest.mark.parametrize(("backend", "device"), PLACES)
@pytest.mark.parametrize(("case", "kinds"), in_turn(TOP_CASES), ids=str)
def test_the_largest_match_the_oracle(
    case: SaeCase, kinds: tuple[torch.dtype, torch.dtype], backend: str, device: str
) -> None:
    args = case.make_top(*kinds, device)
    hidden, encoder, bias, k, norms, scale, signed = args
    if not served(backend, case, kinds, device):
        return
    with guarded():
        values, places = sae_top_features(
            hidden, encoder, bias, k, norms, scale=scale, signed=signed, backend=backend
        )
    assert values.dtype == (torch.float64 if torch.float64 in kinds else torch.float32)
    assert places.dtype == torch.int64 and values.shape == places.shape == (case.n_rows, k)
    z, size = truth_of((hidden, encoder, bias, scale))
    if norms is not None:
        z, size = z * norms.double(), size * norms.double()
    wanted = (z.abs() if signed else z).topk(k, dim=1).values
    found = z.gather(1, places)
    said = found if signed else found.relu()
    near = size.gather(1, places)
    assert_within(values, said, near, case.width)
    # Of two that are equal to rounding either may be kept, so the scores are compared, not the places.
    assert_within((found.abs() if signed else found).to(values.dtype), wanted, near, case.width)
    assert all(len(set(row)) == k for row in places.tolist())


@pytest.mark.parametrize("backend", AVAILABLE)
def test_rows_of_any_shape(backend: str) -> None:
    hidden, encoder, bias, *_ = SaeCase(6, 16, 20).make(torch.float32, torch.float32)
    whole = sae_features(hidden, encoder, bias, backend=backend)
    assert torch.equal(
        sae_features(hidden.view(2, 3, 16), encoder, bias, backend=backend), whole.view(2, 3, 20)
    )
    values, places = sae_top_features(hidden.view(2, 3, 16), encoder, bias, 4, backend=backend)
    assert values.shape == places.shape == (2, 3, 4)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_nan_is_seen(backend: str) -> None:
    hidden, encoder, bias, *_ = SaeCase(3, 8, 12).make(torch.float32, torch.float32)
    hidden[1, 2] = float("nan")
    out = sae_features(hidden, encoder, bias, backend=backend)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()
    values, _ = sae_top_features(hidden, encoder, bias, 3, backend=backend)
    assert values[1].isnan().all() and values[[0, 2]].isfinite().all()
    bias[5] = float("nan")
    values, places = sae_top_features(hidden, encoder, bias, 3, backend=backend)
    assert places[0, 0] == 5 and values[0, 0].isnan() and values[0, 1:].isfinite().all()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("backend", AVAILABLE)
def test_k_features_are_found_however_little_they_say(backend: str, signed: bool) -> None:
    hidden, encoder, bias, *_ = SaeCase(2, 8, 12).make(torch.float32, torch.float32)
    bias[:] = -torch.inf
    bias[7] = 0.0
    values, places = sae_top_features(hidden, encoder, bias, 5, signed=signed, backend=backend)
    assert all(len(set(row)) == 5 and 7 in row + [7] * signed for row in places.tolist())
    assert bool((values.abs() == torch.inf).all() if signed else (values[:, 1:] == 0).all())
    values, places = sae_top_features(hidden * torch.nan, encoder, bias, 12, signed=signed, backend=backend)
    assert bool(values.isnan().all()) and all(len(set(row)) == 12 for row in places.tolist())


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_the_first_of_equal_features_comes_first(backend: str) -> None:
    if backend not in AVAILABLE:
        pytest.skip("not built")
    encoder = torch.ones(5000, 64)
    encoder[:, 0] = torch.arange(5000) % 3
    _, places = sae_top_features(torch.ones(2, 64), encoder, torch.zeros(5000), 7, backend=backend)
    assert places.tolist() == [[2, 5, 8, 11, 14, 17, 20]] * 2


@pytest.mark.parametrize("encoder", ENCODERS, ids=str)
def test_a_row_and_a_feature_are_what_they_are_alone(encoder: torch.dtype) -> None:
    if "native" not in AVAILABLE:
        pytest.skip("not built")
    args = SaeCase(9, 77, 50, "gated").make(torch.float32, encoder)
    whole = sae_features(*args[:6], scale=args[6], backend="native")
    for t in range(9):
        row = sae_features(args[0][t : t + 1], *args[1:6], scale=args[6], backend="native")
        assert torch.equal(row[0], whole[t])
    some = [None if t is None else t[7:12] for t in args[1:]]
    part = sae_features(args[0], *some[:5], scale=some[5], backend="native")
    assert torch.equal(part, whole[:, 7:12])


def test_int8_rows_have_scales_of_their_own() -> None:
    encoder = torch.randn(30, 64) * torch.logspace(-3, 3, 30)[:, None]
    encoder[4] = 0
    rows, scale = quantized(encoder)
    assert rows.dtype == torch.int8
    near = rows.float() * scale[:, None]
    assert bool(((near - encoder).abs() <= scale[:, None] * 0.5001).all())


@pytest.mark.parametrize("op", ["sae_features", "sae_top_features"])
def test_opcheck(op: str) -> None:
    case = SaeCase(3, 8, 12, "gated", k=4, norms=True)
    args = (
        case.make(torch.bfloat16, torch.int8)
        if op == "sae_features"
        else case.make_top(torch.bfloat16, torch.int8)
    )
    torch.library.opcheck(getattr(torch.ops.mechanex, op), (*args, "eager"))


def test_compiled_code_calls_the_op() -> None:
    args = SaeCase(3, 8, 12, "jumprelu").make(torch.float32, torch.bfloat16)

    def run(hidden: Tensor) -> Tensor:
        return sae_features(hidden, *args[1:4]) * 2

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert torch.equal(compiled(args[0]), run(args[0]))
    assert torch.func.vmap(run)(args[0][None]).shape == (1, 3, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": torch.ones(4, 7)}, r"encoder must be \[F, 8\]"),
        ({"encoder": torch.ones(4, 8, dtype=torch.int32)}, r"floating numbers or int8, got torch.int32"),
        ({"encoder": torch.ones(4, 8, dtype=torch.int8)}, "an int8 encoder comes with a scale"),
        ({"scale": torch.ones(4)}, "an int8 encoder comes with a scale"),
        ({"bias": torch.ones(5)}, r"bias must be floating point \[4\], one number a feature"),
        (
            {"bias": torch.ones(4).to(torch.float8_e5m2)},
            r"bias must be floating point \[4\], .* torch.float8_e5m2",
        ),
        ({"threshold": torch.ones(4, dtype=torch.int64)}, r"threshold must be floating point \[4\]"),
        ({"gain": torch.ones(4)}, "gain and offset go together"),
        ({"hidden": torch.ones(2, 8, dtype=torch.int64)}, "hidden must be float32, bfloat16"),
        ({"hidden": torch.ones(2, 8, requires_grad=True)}, "hidden needs a gradient, and this op has none"),
        ({"bias": None}, "bias must be a tensor, got NoneType"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    args = {"hidden": torch.ones(2, 8), "encoder": torch.ones(4, 8), "bias": torch.ones(4)} | change
    with pytest.raises(ValidationError, match=message):
        sae_features(**args)  # type: ignore[arg-type]


@pytest.mark.parametrize("k", [0, 5, True, 1.0])
def test_k_is_checked(k: object) -> None:
    with pytest.raises(ValidationError, match=r"k is from 1 to the encoder's 4 features; got"):
        sae_top_features(torch.ones(2, 8), torch.ones(4, 8), torch.ones(4), k)  # type: ignore[arg-type]


def test_auto_leaves_matrix_products_to_torch() -> None:
    def chosen(rows: int, dtype: torch.dtype) -> object:
        args = SaeCase(rows, 8, 12).encoder(torch.float32, dtype)
        return backends.kernel("sae_features", "auto", *args)

    if "native" not in AVAILABLE:
        pytest.skip("not built")
    for dtype, most in native.TORCH_ROWS.items():
        if dtype is not torch.float64:
            assert chosen(most - 1, dtype) is native.sae_features
            assert chosen(most, dtype) is not native.sae_features


@pytest.mark.parametrize("level", native.levels() if "native" in AVAILABLE else [])
def test_every_instruction_set(level: str) -> None:
    before = modules.cpu().level()
    modules.cpu().select_level(level)
    try:
        for case, kinds in in_turn(SAE_CASES):
            test_features_match_the_oracle(case, kinds, "native", "cpu")
        for case, kinds in in_turn(TOP_CASES):
            test_the_largest_match_the_oracle(case, kinds, "native", "cpu")
        test_nan_is_seen("native")
        test_the_first_of_equal_features_comes_first("native")
        for encoder in ENCODERS:
            test_a_row_and_a_feature_are_what_they_are_alone(encoder)
    finally:
        modules.cpu().select_level(before)
