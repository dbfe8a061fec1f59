"""Parts of other libraries that are used here and that their documentation doesn't name: they do what they did.

A failure here says what a new version of a library took away, and what of ours that breaks.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import uvicorn
from families import FAMILIES
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mechanex
from mechanex._private import gguf as gguf_parts
from mechanex._private import torch as torch_parts
from mechanex._private import transformers as transformers_parts
from mechanex._private import uvicorn as uvicorn_parts
from mechanex.engine.attaching import hooks_on

PACKAGE = Path(mechanex.__file__).parent


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_torch_tells_of_dispatch_modes() -> None:
    assert torch_parts.dispatch_modes() == 0
    with _Mode():
        assert torch_parts.dispatch_modes() == 1, (
            "torch no longer tells of dispatch modes: the ops would hand fake tensors, which have no memory, to the "
            "compiled kernels (mechanex/ops)"
        )


def test_torch_tells_of_transforms() -> None:
    why = "torch no longer tells of {}: the ops would skip it and lose its gradients (mechanex/ops)"
    seen: list[bool] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch_parts.transforms_are_active())
        return x.sum()

    look(torch.ones(2))
    torch.func.grad(look)(torch.ones(2))
    assert seen[0] is False
    assert seen[1], why.format("torch.func's transforms")
    with torch.autograd.forward_ad.dual_level():
        assert torch_parts.transforms_are_active(), why.format("forward-mode differentiation")


def test_torch_tells_of_tensors_that_stand_for_several() -> None:
    seen: list[bool] = []

    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            seen.append(torch_parts.is_batched(grad))
            return grad * 2

    x = torch.ones(2, requires_grad=True)
    out = Looks.apply(x)
    torch.autograd.grad(out, x, torch.ones(2), retain_graph=True)
    torch.autograd.grad(out, x, torch.eye(2), retain_graph=True, is_grads_batched=True)
    torch.func.vmap(lambda one: torch.autograd.grad(out, x, one, retain_graph=True))(torch.eye(2))
    assert seen == [False, True, True], (
        "torch no longer tells of batches of gradients: completion_logprob would write several into the memory of one "
        "(mechanex/ops/logprob.py)"
    )


def test_torch_counts_writes() -> None:
    tensor = torch.ones(2)
    before = torch_parts.writes(tensor)
    tensor.mul_(2)
    assert torch_parts.writes(tensor) > before, (
        "torch no longer counts writes to a tensor: steering would go on with values from before "
        "(mechanex/engine/intervention.py)"
    )
    with torch.inference_mode():
        assert torch_parts.writes(torch.ones(2)) == 0


def test_torch_takes_nested_arguments_apart() -> None:
    nested = ({"a": torch.ones(1)}, [1, (None,)])
    leaves, spec = torch_parts.tree_flatten(nested)
    assert torch_parts.tree_unflatten(leaves, spec) == nested, (
        "torch's pytrees changed: layers can't be replayed (mechanex/engine/optimize/replay.py)"
    )


def test_torch_lends_its_threads() -> None:
    assert torch_parts.parallel_for_address(), (
        "torch's CPU library no longer has torch_parallel_for: the compiled kernels would use one thread "
        "(mechanex/backends/native/modules.py)"
    )


@pytest.mark.gpu
def test_torch_gives_raw_streams() -> None:
    found = torch_parts.stream_of(0)
    assert found == torch.cuda.current_stream(0).cuda_stream


def test_torch_keeps_hooks_in_tables_by_their_handles_id() -> None:
    module, seen = nn.Linear(2, 2), []
    one = module.register_forward_pre_hook(lambda *_: seen.append(1), with_kwargs=True)
    two = module.register_forward_hook(lambda *_: seen.append(2), always_call=True)
    for handle in (one, two):
        torch_parts.remove_hook(module, handle.id)
    module(torch.ones(2))
    assert not seen, (
        "torch keeps hooks elsewhere: mechanex.reset would leave steering on (engine/attaching.py)"
    )


def test_compiled_code_looks_at_a_modules_class() -> None:
    from torch._dynamo.testing import CompileCounter

    from mechanex.engine.attaching import before

    counter = CompileCounter()
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    compiled = torch.compile(model, backend=counter)
    plain = compiled(torch.ones(2))
    handle = before(model[1], lambda module, args, kwargs: ((args[0] + 1,), kwargs), traced=True)
    assert not torch.equal(compiled(torch.ones(2)), plain), (
        "torch's compiled code no longer looks at the classes of modules: a compiled model would go "
        "on unsteered (mechanex/engine/attaching.py)"
    )
    handle.remove()
    assert torch.equal(compiled(torch.ones(2)), plain)


def test_transformers_cache_layers_are_as_the_rolling_cache_knows_them() -> None:
    why = "transformers' cache layers changed: the server can't roll its batch (the rolling cache)"
    for layer in (
        transformers_parts.DynamicLayer(),
        transformers_parts.DynamicSlidingWindowLayer(sliding_window=4),
    ):
        keys = torch.arange(12.0).view(1, 1, 3, 4)
        got = layer.update(keys, -keys)
        assert (
            torch.equal(got[0], keys) and torch.equal(layer.keys, keys) and torch.equal(layer.values, -keys)
        ), why
        assert layer.is_initialized and layer.get_seq_length() == 3 and layer.get_mask_sizes(1) == (4, 0), why
    assert issubclass(transformers_parts.Cache, object)


def test_transformers_lists_models_by_kind() -> None:
    assert transformers_parts.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["llama"] == "LlamaForCausalLM", (
        "transformers lists its causal models elsewhere: loading can't tell them from others (models/pretrained.py)"
    )
    assert "bert" in transformers_parts.MODEL_FOR_MASKED_LM_MAPPING_NAMES


def test_uvicorns_protocol_and_server_are_as_the_listener_knows_them() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        return None

    async def made() -> Any:
        config = uvicorn.Config(app, log_config=None)
        config.load()
        server = uvicorn.Server(config)
        server._captured_signals.append(2)
        uvicorn_parts.forget_signals(server)
        assert server._captured_signals == []
        assert server.started is False and server.should_exit is False
        return uvicorn_parts.H11Protocol(config, server.server_state, {})

    protocol = asyncio.run(made())
    named = (
        "connections",
        "transport",
        "loop",
        "cycle",
        "connection_made",
        "data_received",
        "connection_lost",
    )
    missing = [name for name in (*named, "on_response_complete") if not hasattr(protocol, name)]
    assert not missing, (
        f"uvicorn's protocol lacks {missing}: connections go unbounded (mechanex/server/http/head_deadline.py)"
    )


def test_ggufs_reader_reads_through_the_part_that_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_tensor("direction.1", np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert gguf_parts.BoundedReader(path, 1000, "control vector").tensors[0].name == "direction.1"
    why = "gguf reads past the part that bounds it: a bad file may take all memory (mechanex/engine/formats/gguf.py)"
    with pytest.raises(ValueError, match="too many fields"):
        gguf_parts.BoundedReader(path, 3, "control vector")
        pytest.fail(why)
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"ends early|cannot|size"):
        gguf_parts.BoundedReader(tmp_path / "cut.gguf", 1000, "control vector")
        pytest.fail(why)


REACHES = re.compile(
    r"torch\._[A-Za-z]|torch\.utils\._|forward_ad\._|\.is_inference\(\) else|transformers\.cache_utils|"
    r"transformers\.models\.|uvicorn\.protocols|_captured_signals|GGUFReader\)|register_forward_(pre_)?hook|"
    r"register_full_backward"
)
DOORS = {"engine/attaching.py": "register_forward"}


def test_nothing_else_reaches_for_such_parts() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{n}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if "_private" not in path.parts and not str(path).endswith("server/cache.py")
        for n, line in enumerate(path.read_text().splitlines(), 1)
        if REACHES.search(line)
        and DOORS.get(path.relative_to(PACKAGE).as_posix(), "no door") not in line
        and "``" not in line
    ]
    assert not found, "use mechanex._private, and engine/attaching.py for hooks:\n" + "\n".join(found)


def test_hooks_that_transformers_leaves_are_known() -> None:
    model = FAMILIES["llama"]()
    model(torch.tensor([[1, 2]]), output_hidden_states=True)
    assert hooks_on(model) == frozenset(), (
        "transformers' hooks for hidden states are of another module now: after one call that asks for them, a GPU's "
        "decoding steps would no longer be captured (mechanex/engine/decode/static.py)"
    )


def test_transformers_takes_another_attention_for_a_block() -> None:
    model = FAMILIES["llama"]()
    calls: list[int] = []

    def attend(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return transformers_parts.ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)

    transformers_parts.ALL_ATTENTION_FUNCTIONS.register("ours", attend)
    with transformers_parts.attending_by(model, "ours"):
        model(torch.tensor([[1, 2]]))
    model(torch.tensor([[1, 2]]))
    assert len(calls) == model.config.num_hidden_layers, (
        "transformers keeps the attention's name elsewhere now: in its older versions keys would be copied for every "
        "query again (mechanex/engine/decode/grouped.py)"
    )


def test_torch_tells_what_it_compiles() -> None:
    why = (
        "torch no longer tells that it compiles {}: applied plans would count twice in a GPU's decoding steps"
    )
    for how in ("a module", "in place", "a forward"):
        model = nn.Sequential(nn.Linear(2, 2))
        assert not torch_parts.is_compiled(model)
        if how == "a module":
            model = torch.compile(model, backend="eager")  # type: ignore[assignment]
        elif how == "in place":
            model[0].compile(backend="eager")
        else:
            model[0].forward = torch.compile(model[0].forward, backend="eager")
        assert torch_parts.is_compiled(model), why.format(how)


def test_torch_compiles_for_more_lengths_than_its_limit() -> None:
    why = "torch counts or bounds what it compiles otherwise now (mechanex/engine/optimize/compiled.py)"
    torch._dynamo.reset()
    run = torch.compile(nn.Linear(2, 2), backend="eager", dynamic=False)
    with torch_parts.unlimited_recompiles():
        for n in range(2, 14):
            before = torch_parts.compiled_graphs()
            run(torch.ones(n, 2))
            assert torch_parts.compiled_graphs() == before + 1, why
            run(torch.ones(n, 2))
            assert torch_parts.compiled_graphs() == before + 1, why
    torch._dynamo.reset()
