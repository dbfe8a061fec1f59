"""What a run allocates, and where its time goes, as torch's profiler sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

# Products of matrices, alone or fused with what stands next to them.
MATMULS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    "aten::mkldnn_linear",
    "mkl::_mkl_linear",
)


def matmul_share(run: Callable[[], Any]) -> float:
    """Share of the CPU time that is spent in matrix products, attention's included."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    events = profiler.key_averages()
    products = sum(event.self_cpu_time_total for event in events if event.key in MATMULS)
    return products / sum(event.self_cpu_time_total for event in events)


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most bytes of CPU tensors that are alive at once beyond those that were there."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    alive = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak
