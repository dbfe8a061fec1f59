"""Scoring 3 prompts of 70 words × 16 completions on a random Llama, 12 layers, 512 wide, 16k vocabulary.

One call per completion, as a plain script writes it; a right-padded batch; and the engine. Forward alone, and forward
with the gradient for a vector that is added at the middle layer (weights frozen in all of them). On a GPU, the op alone
against torch, and against Liger and cut-cross-entropy where they can be imported.

pytest benchmarks/test_logprob.py --benchmark-only
"""

from __future__ import annotations

import contextlib
import copy
import functools

import pytest
import torch
from interleaved import medians
from llama import llama_46m
from measure import matmul_share, peak_bytes
from plain import one_by_one, padded
from torch.nn import functional

from mechanex.engine.score import completion_logprobs
from mechanex.ops.logprob import completion_logprob

ROUNDS = 3
LAYER = 6
TOKENS_PER_WORD = 1.3


@pytest.fixture(scope="module")
def examples():
    """Token ids: 3 prompts of 70 words, and for each 16 completions of 2 to 7 words."""
    generator = torch.Generator().manual_seed(1)

    def draw(words: int) -> list[int]:
        return torch.randint(3, 16_000, (round(words * TOKENS_PER_WORD),), generator=generator).tolist()

    sizes = torch.randint(2, 8, (3, 16), generator=generator).tolist()
    return [draw(70) for _ in range(3)], [[draw(n) for n in row] for row in sizes]


def adding(model, vector):
    """Adds ``vector`` to what enters layer ``LAYER``, as a plain script does."""
    if vector is None:
        return model.model.layers[LAYER].register_forward_pre_hook(lambda *_: None)
    return model.model.layers[LAYER].register_forward_pre_hook(lambda _, args: (args[0] + vector, *args[1:]))


def steered(run, model, vector):
    """``run`` on the model with the vector added."""

    def call(*args):
        with adding(model, vector):
            return run(model, *args, vector)

    return call


def ours(model, prompts, completions, vector=None):
    edits = None if vector is None else {LAYER: vector}
    found = completion_logprobs(model, prompts, completions, edits=edits, differentiable=vector is not None)
    slope = None if vector is None else torch.autograd.grad(found.sums.sum(), vector)[0]
    return found.sums.detach(), slope


@pytest.mark.parametrize("learning", [False, True], ids=["forward", "forward and backward"])
def test_long_prompts_with_many_completions(examples, report, benchmark, learning):
    model = copy.deepcopy(llama_46m()).requires_grad_(False)
    vector = 0.1 * torch.randn(512, generator=torch.Generator().manual_seed(2)) if learning else None
    if vector is not None:
        vector.requires_grad_()
    ways = {
        "one by one": functools.partial(steered(one_by_one, model, vector), *examples),
        "padded": functools.partial(steered(padded, model, vector), *examples),
        "ours": functools.partial(ours, model, *examples, vector),
    }
    truth, slope = ways["one by one"]()
    for name, run in ways.items():
        sums, gradient = run()
        worst = float(((sums - truth) / truth).abs().max())
        assert worst < 1e-4, f"{name}: sums differ by {worst:.1e}"
        if slope is not None:
            difference = float((gradient - slope).norm() / slope.norm())
            assert difference < 1e-3, f"{name}: gradients differ by {difference:.1e}"

    notes = {name: f"at most {peak_bytes(run) / 2**20:.0f} MiB more" for name, run in ways.items()}
    share = matmul_share(ways["ours"])
    notes["ours"] += f"; {share:.0%} of the time in matrix products"
    found = medians(ways, ROUNDS)
    what = "forward and backward" if learning else "forward"
    report.add(f"3 × 16 completions, 12 × 512 Llama, {what}", found, "one by one", notes=notes)
    assert share >= 0.7
    benchmark.pedantic(ways["ours"], rounds=3)


def other_libraries(hidden, weight, target):
    """The same loss, and its gradient for ``hidden``, in libraries made for training; those that can be imported."""
    ways = {}
    with contextlib.suppress(ImportError):
        from cut_cross_entropy import linear_cross_entropy

        ways["cut-cross-entropy"] = lambda: linear_cross_entropy(hidden, weight, target, reduction="sum")
    with contextlib.suppress(ImportError):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        ways["Liger"] = lambda: fused(weight, hidden, target)
    return ways


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("n_rows", [128, 2048])
def test_the_op_on_a_gpu(report, benchmark, n_rows):
    """[n, 4096] bfloat16 hidden states, 128k vocabulary: the summed loss and the gradient for the hidden states."""
    hidden = torch.randn(n_rows, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(128_000, 4096, device="cuda", dtype=torch.bfloat16) / 64
    target = torch.randint(0, 128_000, (n_rows,), device="cuda")
    losses = {
        "torch, whole logits": lambda: functional.cross_entropy(
            (hidden @ weight.T).float(), target, reduction="sum"
        ),
        "ours": lambda: -completion_logprob(hidden, weight, target).sum(),
        **other_libraries(hidden, weight, target),
    }

    def timed(loss):
        def run():
            torch.autograd.grad(loss(), hidden)
            torch.cuda.synchronize()

        return run

    ways, notes = {name: timed(loss) for name, loss in losses.items()}, {}
    for name, run in ways.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        notes[name] = f"at most {(torch.cuda.max_memory_allocated() - before) / 2**20:.0f} MiB more"
    found = medians(ways, 11)
    title = f"log-probabilities and gradient, [{n_rows}, 4096] bfloat16, 128k vocabulary"
    report.add(title, found, "torch, whole logits", notes=notes)
    benchmark.pedantic(ways["ours"], rounds=3)
