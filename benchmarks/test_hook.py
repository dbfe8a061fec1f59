"""What the documented hook costs on one token, against a hook written by hand.

pytest benchmarks/test_hook.py
"""

from __future__ import annotations

import torch
from interleaved import medians
from torch import nn

from mechanex.utils.steering_opt import make_steering_hook_hf

CALLS = 2000


def test_hook_on_one_token(report, benchmark):
    """[1, 1, 2048] float32 through a module that does nothing but call its hook."""
    x, v = torch.randn(1, 1, 2048), torch.randn(2048)

    def by_hand(module, args, kwargs):
        return (args[0] + v, *args[1:]), kwargs

    def calls(hook):
        layer = nn.Identity()
        layer.register_forward_pre_hook(hook, with_kwargs=True)

        def run():
            with torch.no_grad():
                for _ in range(CALLS):
                    layer(x)

        return run

    ways = {"by hand": calls(by_hand), "documented": calls(make_steering_hook_hf(v))}
    found = medians(ways, rounds=31)
    each = {name: seconds / CALLS for name, seconds in found.items()}
    report.add("hook on [1, 1, 2048] float32, a call", each, "by hand")
    benchmark.pedantic(ways["documented"], rounds=1)
