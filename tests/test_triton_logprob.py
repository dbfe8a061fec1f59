"""The Triton kernels of completion_logprob: what they must do beyond the op's own tests, and that they compile.

A test of ``test_triton.py`` runs this file again under the interpreter; the tests of `PLACES` need that or a GPU.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from optable import DTYPES, LOGPROB_CASES, LogprobArgs, LogprobCase, pairs, with_head
from test_logprob_op import assert_close, assert_matches_oracle, both, wide
from test_triton import LONG, on_each_device, outside_the_interpreter, python
from tolerances import logprob_bounds
from torch import Tensor

from mechanex.backends import eager, reference, triton
from mechanex.errors import ValidationError
from mechanex.ops.head import Head
from mechanex.ops.logprob import completion_logprob

pytest.importorskip("triton")

HALF = (torch.bfloat16, torch.float16)
FUSED = (torch.float32, *HALF)
NAMES = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
SMALL = [case for case in LOGPROB_CASES if case.n_rows * case.n_vocab <= 4000 and case.n_rows < 40]


@pytest.fixture
def kernels() -> SimpleNamespace:
    """What the files in `kernels/` offer."""
    module = triton._kernel("logprob")

    def logprob(*args: object, **tile: object) -> tuple[Tensor, Tensor]:
        return module.logprob(*with_head(args), **tile)

    return SimpleNamespace(module=module, logprob=logprob, Tile=module.Tile)


def assert_forward(got: tuple[Tensor, Tensor], args: LogprobArgs) -> None:
    truth, lse = reference.completion_logprob(*with_head(wide(args)))
    allowed, _ = logprob_bounds(args, truth)
    assert_close(got[0], truth, allowed)
    assert_close(got[1], lse, allowed)


@on_each_device
@pytest.mark.parametrize(("case", "dtype"), pairs(SMALL, DTYPES), ids=str)
def test_values_and_gradients_match_the_oracle(case: LogprobCase, dtype: torch.dtype, device: str) -> None:
    assert_matches_oracle(case, dtype, "triton", device)


@on_each_device
@pytest.mark.parametrize("programs", [1, 9, pytest.param(1024, marks=LONG)])
@pytest.mark.parametrize(
    ("case", "dtype"),
    pairs(
        [
            LogprobCase(37, 47, 123, True, 0.5, 5.0, 2.0),
            LogprobCase(16, 16, 16),
            LogprobCase(17, 33, 161, True, coldness=-1.5, layout="strided"),
            LogprobCase(1, 1, 40, softcap=30.0),
            LogprobCase(3, 20, 1),
        ],
        FUSED,
    ),
    ids=str,
)
def test_blocks_of_every_kind_and_any_stretch_of_the_vocabulary(
    kernels: SimpleNamespace,
    case: LogprobCase,
    programs: int,
    dtype: torch.dtype,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Last blocks not full in rows, columns and width; all blocks in one stretch, several in each, one in each."""
    monkeypatch.setattr(kernels.module, "_PROGRAMS", programs)
    args = case.make(dtype, device)
    assert_forward(kernels.logprob(*args, tile=kernels.Tile(16, 16, 16, 4, 2)), args)


@on_each_device
def test_long_stretches_of_the_vocabulary_in_one_loop(kernels: SimpleNamespace, device: str) -> None:
    args = LogprobCase(37, 47, 123, True, 0.5, 5.0, 2.0).make(torch.bfloat16, device)
    tiles = (kernels.Tile(16, 16, 16, 4, 2, persistent=True), kernels.Tile(16, 16, 16, 4, 2))
    long, short = (kernels.logprob(*args, tile=tile) for tile in tiles)
    assert_forward(long, args)
    assert_forward(short, args)


@on_each_device
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("width", [40, 47])
def test_operands_that_are_described_where_their_layout_allows_it(
    kernels: SimpleNamespace, width: int, persistent: bool, device: str
) -> None:
    if device == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs compute capability 9.0")
    args = LogprobCase(37, width, 123, True, 0.5, 5.0, 2.0).make(torch.bfloat16, device)
    tile = kernels.Tile(16, 16, 16, 4, 2, persistent, described=True)
    assert_forward(kernels.logprob(*args, tile=tile), args)


def test_a_persistent_tile_gives_every_multiprocessor_one_program(
    kernels: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile = kernels.Tile(128, 128, 64, 8, 3, persistent=True)
    tensor = SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132)
    )
    assert [kernels.module._programs_for(tile, tensor, n) for n in (1, 2, 8, 32, 200)] == [
        132,
        132,
        128,
        128,
        200,
    ]


@on_each_device
def test_every_row_of_many_groups_is_computed_once(kernels: SimpleNamespace, device: str) -> None:
    n_rows = 16 * (2 * kernels.module._GROUP + 3) + 5
    args = LogprobCase(n_rows, 3, 20, True).make(torch.float32, device)
    assert_forward(kernels.logprob(*args, tile=kernels.Tile(16, 16, 16, 4, 1)), args)


@on_each_device
@pytest.mark.parametrize("dtype", FUSED, ids=str)
def test_every_tile_of_the_table(kernels: SimpleNamespace, dtype: torch.dtype, device: str) -> None:
    for n_rows in (3, 17, 33, 65):
        args = LogprobCase(n_rows, 70, 150, True, softcap=10.0).make(dtype, device)
        assert_forward(kernels.logprob(*args), args)


@on_each_device
@pytest.mark.parametrize("dtype", FUSED, ids=str)
def test_targets_outside_the_vocabulary_are_nan_and_touch_no_other_row(
    kernels: SimpleNamespace, dtype: torch.dtype, device: str
) -> None:
    hidden, weight, target, *rest = LogprobCase(7, 16, 40, True, softcap=9.0).make(dtype, device)
    want = kernels.logprob(hidden, weight, target, *rest)
    target = target.clone()
    target[1:5] = torch.tensor([-1, 40, 2**40 + 3, -(2**62)], device=device)
    inside = torch.tensor([True, False, False, False, False, True, True], device=device)
    for got, good in zip(kernels.logprob(hidden, weight, target, *rest), want, strict=True):
        assert got[~inside].isnan().all()
        assert torch.equal(got[inside], good[inside])


@on_each_device
@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("dtype", FUSED, ids=str)
def test_digits_survive_where_a_token_is_certain_or_impossible(
    dtype: torch.dtype, with_gradient: bool, device: str
) -> None:
    for lead in (17.0, 40.0, 80.0, -80.0, -200.0):
        weight = torch.zeros(33, 16, dtype=dtype, device=device)
        weight[20, 3] = lead
        hidden = torch.zeros(2, 16, dtype=dtype, device=device)
        hidden[:, 3] = 1
        target = torch.tensor([20, 5], device=device)
        odds = lead - torch.tensor(32.0, dtype=torch.float64).log()
        others = torch.nn.functional.logsigmoid(-odds) - torch.tensor(32.0, dtype=torch.float64).log()
        want = torch.stack([torch.nn.functional.logsigmoid(odds), others])
        hidden.requires_grad_(with_gradient)
        out = completion_logprob(hidden, weight, target, backend="triton")
        torch.testing.assert_close(out.detach().cpu().double(), want, rtol=2e-6, atol=0)


@on_each_device
@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_ruled_out_by_their_bias(dtype: torch.dtype, with_gradient: bool, device: str) -> None:
    """Whole blocks of minus infinity before and after the others; a target among them is impossible."""
    hidden, weight, _, _, *rest = LogprobCase(3, 16, 500).make(dtype, device)
    bias = torch.full((500,), -torch.inf, dtype=dtype, device=device)
    bias[200:205] = 0
    hidden.requires_grad_(with_gradient)
    target = torch.tensor([202, 3, 499], device=device)
    out = completion_logprob(hidden, weight, target, bias, *rest, backend="triton").detach()
    kept = torch.arange(200, 205, device=device)
    few = wide((hidden.detach()[:1], weight[kept], target[:1] - 200, None, *rest))
    close = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(
        out[:1].double(), reference.completion_logprob(*with_head(few))[0], rtol=close, atol=close
    )
    assert out[1:].tolist() == [-torch.inf] * 2


@on_each_device
@pytest.mark.parametrize("ruled_out", [False, True])
@pytest.mark.parametrize("columns", [300, 5000])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_chunk_is_folded_as_plain_torch_folds_it(
    columns: int, in_place: bool, ruled_out: bool, device: str
) -> None:
    """Read once and twice, and by several programs; a chunk of tokens with no share after one of tiny exponentials."""
    generator = torch.Generator().manual_seed(0)
    products = torch.randn(3, columns, generator=generator).to(device)
    bias = torch.full((columns,), -torch.inf if ruled_out else 0.5, device=device)
    head = Head(torch.empty(columns, 0, device=device), bias, 0.7, None if ruled_out else 9.0, 1.3)
    target = torch.tensor([2, columns - 1, -5], device=device)
    kept = []
    for reduce in (eager.LOGPROB.reduce, triton.LOGPROB.reduce):
        memory = products.clone()
        state = [torch.full((3,), -200.0, device=device), torch.ones(3, device=device)]
        sums, shares = torch.ones(3, 40, device=device), torch.empty(3, columns, device=device).bfloat16()
        if in_place and reduce is triton.LOGPROB.reduce:
            shares = memory.view(torch.bfloat16)[:, :columns]
        reduce(head, memory, 0, target, *state, sums, shares)
        kept.append((*state, sums, shares))
    for ours, theirs in zip(kept[1], kept[0], strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-2 if ours.dtype is torch.bfloat16 else 1e-5, atol=0.0
        )


@on_each_device
@pytest.mark.parametrize("dtype", FUSED, ids=str)
def test_what_is_not_finite_is_nan_and_alone(
    kernels: SimpleNamespace, dtype: torch.dtype, device: str
) -> None:
    hidden, weight, target, *rest = LogprobCase(4, 16, 40).make(dtype, device)
    # Rows 1 to 3: NaN itself, an infinite logit of another token, one of the target.
    hidden[1, 3] = torch.nan
    hidden[2:, 5], weight[:, 5] = torch.inf, 0
    weight[7, 5] = weight[9, 5] = 1
    target[2], target[3] = 8, 9
    out, _ = kernels.logprob(hidden, weight, target, *rest)
    assert out.isnan().tolist() == [False, True, True, True]


@on_each_device
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, *(pytest.param(d, marks=LONG) for d in (torch.float16, torch.float64))],
    ids=str,
)
def test_results_fill_all_of_their_memory_and_are_the_same_bits_twice(
    dtype: torch.dtype, device: str
) -> None:
    # Deterministic mode fills new memory with NaN and refuses torch operations that are not reproducible.
    args = LogprobCase(20, 47, 300, True, softcap=5.0).make(dtype, device)
    cotangent = torch.randn(20).to(device)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty_like(cotangent).isnan().all()
        first, second = (
            [completion_logprob(*args, backend="triton"), *both(args, cotangent, "triton")] for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(first, second, strict=True):
        assert not one.isnan().any()
        assert torch.equal(one, other)


@on_each_device
def test_a_lazily_negated_view_is_refused(device: str) -> None:
    hidden, weight, target, *_ = LogprobCase(2, 8, 9).make(torch.float32, device)
    for args in ((torch._neg_view(hidden), weight), (hidden, torch._neg_view(weight))):
        with pytest.raises(ValidationError, match="lazily negated view"):
            completion_logprob(*args, target, backend="triton")


@on_each_device
def test_one_kernel_multiplies_and_reduces_where_that_pays(device: str) -> None:
    few, many = triton._FLOAT_ROWS, triton._FLOAT_ROWS + 1
    for n_rows, dtype, fused in (
        *((many, dtype, True) for dtype in HALF),
        (few, torch.float32, True),
        (many, torch.float32, False),
        (few, torch.float64, False),
    ):
        assert triton.fuses(torch.zeros(n_rows, 4, dtype=dtype, device=device)) is fused


@on_each_device
def test_stages_give_way_to_a_small_shared_memory(
    kernels: SimpleNamespace, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile = kernels.Tile(64, 128, 64, 4, 4)
    tensor = SimpleNamespace(device=torch.device("cuda", 0), element_size=lambda: 2)
    for limit, stages in ((227, 4), (99, 4), (95, 3), (64, 2), (48, 2), (8, 1)):
        properties = SimpleNamespace(shared_memory_per_block_optin=limit * 1024)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        assert kernels.module._stages_for(tile, tensor) == stages


# As in test_triton_setup.py; 99 KiB is the least shared memory that a GPU from capability 8.0 on lends to a block.
COMPILE = """
import sys, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", int(sys.argv[1]), 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0

driver.set_active(Driver())
compiled, shared, run = {}, [0], JITFunction.run

def compile_only(self, *args, grid, warmup, **options):
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    compiled.setdefault(self.__name__, []).append("cubin" in kernel.asm)
    shared.append(kernel.metadata.shared)

JITFunction.run = compile_only
from mechanex.backends import triton
from optable import LogprobCase, with_head
from mechanex.ops.head import Head
logprob, Tile = triton._kernel("logprob").logprob, triton._kernel("logprob").Tile
reduce = triton._kernel("logprob_reduce").reduce
finish, Found = triton._kernel("logprob_finish").finish, triton._kernel("logprob_finish").Found
CASES = (
    LogprobCase(20, 47, 123, True, softcap=5.0), LogprobCase(200, 256, 512, True, layout="transposed"),
    LogprobCase(1, 1, 1, True), LogprobCase(1, 64, 256), LogprobCase(64, 64, 64, softcap=5.0),
)
for name in sys.argv[3:]:
    dtype = getattr(torch, name)
    for case in CASES[: int(sys.argv[2])]:
        hidden, weight, target, bias, *numbers = case.make(dtype)
        if dtype is not torch.float64:
            for more in ({}, {"tile": Tile(16, 32, 32, 4, 2, persistent=True)}):
                logprob(*with_head((hidden, weight, target, bias, *numbers)), **more)
            if sys.argv[1] == "90":
                for stays in (False, True):
                    wide = LogprobCase(20, 64, 96, True).make(dtype)
                    logprob(*with_head(wide), tile=Tile(16, 32, 32, 4, 2, stays, described=True))
        kept = [torch.zeros(case.n_rows, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(2)]
        wide, n = kept[0].dtype, case.n_rows
        columns = 1 if case.n_vocab == 1 else 300
        sums, slope = torch.zeros(n, case.width, dtype=wide), torch.zeros(n, case.width, dtype=dtype)
        half = dtype in (torch.bfloat16, torch.float16)
        # Read once and twice, shared among programs, and narrowed in place; without a gradient too.
        for columns, in_place, gradient in ((columns, True, False), (columns, True, True), (5000, half, True)):
            products = torch.zeros(n, columns, dtype=wide)
            head = Head(weight, bias if bias is None else bias[:1].expand(columns), *numbers)
            shares = None
            if gradient:
                shares = products.view(dtype)[:, :columns] if in_place else torch.zeros_like(products, dtype=dtype)
            reduce(head, products, 0, target, *kept, sums if gradient else None, shares)
        found = Found(*(torch.zeros(n, dtype=wide) for _ in range(2)), slope, torch.zeros(n, dtype=wide))
        head = Head(weight, bias, *numbers)
        finish(head, hidden, target, *kept, sums, found)
        finish(head, hidden, target, *kept, None, Found(*found[:2]))
print(sorted(compiled), all(all(found) for found in compiled.values()), max(shared) <= 99 * 1024)
"""

# A GPU's capability, how many cases, and dtypes.
TARGETS = [
    ("90", "1", "bfloat16", "float32", "float64"),
    *(pytest.param((capability, "5", *NAMES), marks=pytest.mark.long) for capability in ("80", "90")),
]


@pytest.mark.ci
@pytest.mark.slow
@outside_the_interpreter
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_kernel_compiles_for_a_gpu_that_is_not_there(target: tuple[str, ...], tmp_path: Path) -> None:
    done = python("-c", COMPILE, *target, TRITON_CACHE_DIR=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    names = "_finish_kernel", "_join_kernel", "_logprob_kernel", "_part_kernel", "_reduce_kernel"
    assert done.stdout.strip() == f"{list(names)} True True", done.stderr[-3000:]
