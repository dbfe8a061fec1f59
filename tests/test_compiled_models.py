"""Models that torch compiles: steered while steering is attached, plain after it, and nobody else's code is dropped."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from mechanex.engine.attaching import after, before
from mechanex.engine.hooks import Intervention, SteeringPlan
from mechanex.engine.intervention import Edit
from mechanex.engine.models import adapter_for
from mechanex.utils.hooks import hf_hooks_contextmanager, make_activs_hook_hf, make_steering_hook_hf

pytestmark = [pytest.mark.ci, pytest.mark.slow]

D_MODEL = 8
IDS = torch.arange(2, 14).view(2, 6)
LAYER = 1


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@dataclass
class Output:
    logits: Tensor


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(D_MODEL, D_MODEL)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return hidden_states + torch.tanh(self.up(hidden_states)).cumsum(1)


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, D_MODEL)
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=attention_mask)
        return hidden


class Tiny(nn.Module):
    """A causal model that is compiled in an instant."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=20, hidden_size=D_MODEL, num_hidden_layers=3)
        self.model = Trunk()
        self.lm_head = nn.Linear(D_MODEL, 20)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False
    ) -> Output:
        return Output(self.lm_head(self.model(input_ids, attention_mask)))


def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny().eval()


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return found


def vector(seed: int = 0) -> Tensor:
    return torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))


def wrapped(model: nn.Module, counter: CompileCounter) -> nn.Module:
    return torch.compile(model, backend=counter)


def in_place(model: nn.Module, counter: CompileCounter) -> nn.Module:
    model.compile(backend=counter)
    return model


def by_layer(model: nn.Module, counter: CompileCounter) -> nn.Module:
    for block in adapter_for(model).layers:
        block.compile(backend=counter)
    return model


def forward_only(model: nn.Module, counter: CompileCounter) -> nn.Module:
    model.forward = torch.compile(model.forward, backend=counter)
    return model


WAYS = [wrapped, in_place, by_layer, forward_only]
EDITS: dict[str, Callable[[int], list[Intervention]]] = {
    "add": lambda seed: [Intervention(LAYER, Edit.add(vector(seed)))],
    "clamp": lambda seed: [Intervention(LAYER, Edit.clamp(vector(seed), 1.0 + seed))],
    "two": lambda seed: [
        Intervention(LAYER, Edit.add(vector(seed))),
        Intervention(LAYER, Edit.ablate(vector(seed + 9))),
        Intervention(2, Edit.add(vector(seed + 5))),
    ],
    "dense": lambda seed: [Intervention(LAYER, Edit.dense(vector(seed), 0.1 * torch.eye(D_MODEL)))],
    "tokens": lambda seed: [Intervention(LAYER, Edit.add(vector(seed)), tokens=slice(-2, None))],
    "rows": lambda seed: [Intervention(LAYER, Edit.add(vector(seed)), rows=[seed % 2])],
}


CASES = [(way, "add") for way in WAYS] + [(wrapped, name) for name in EDITS if name != "add"]


@pytest.mark.parametrize(("way", "edits"), CASES)
def test_a_model_that_was_compiled_before_is_steered_and_then_plain_again(way, edits):
    reference, counter = tiny(), CompileCounter()
    model = way(copy.deepcopy(reference), counter)
    plain = logits(reference)
    torch.testing.assert_close(logits(model), plain)
    for seed in range(3):
        plan = SteeringPlan(EDITS[edits](seed))
        with plan.apply(reference):
            expected = logits(reference)
        with plan.apply(model):
            torch.testing.assert_close(logits(model), expected)
        torch.testing.assert_close(logits(model), plain)
        if seed == 0:
            compiled = counter.frame_count
    assert counter.frame_count == compiled, "other values compiled anew"


def test_nobody_elses_code_is_compiled_anew():
    other_counter, counter = CompileCounter(), CompileCounter()
    other = wrapped(copy.deepcopy(tiny()), other_counter)
    model = wrapped(copy.deepcopy(tiny()), counter)
    plain = logits(other)
    compiled = other_counter.frame_count
    assert torch.equal(logits(model), plain)
    for seed in range(2):
        with SteeringPlan(EDITS["two"](seed)).apply(model):
            assert not torch.allclose(logits(model), plain, atol=1e-3)
            assert torch.equal(logits(other), plain)
    assert torch.equal(logits(other), plain)
    assert other_counter.frame_count == compiled


def test_values_written_into_an_edit_are_used_at_once_without_compiling():
    reference, counter = tiny(), CompileCounter()
    model = wrapped(copy.deepcopy(reference), counter)
    edit = Edit.add(vector().clone())
    plan = SteeringPlan([Intervention(LAYER, edit)])
    with plan.apply(model), plan.apply(reference):
        torch.testing.assert_close(logits(model), logits(reference))
        compiled = counter.frame_count
        edit.bias.mul_(-2)
        torch.testing.assert_close(logits(model), logits(reference))
    assert counter.frame_count == compiled


def test_a_plan_for_every_token_breaks_no_graph():
    reference = tiny()
    model = torch.compile(copy.deepcopy(reference), backend="eager", fullgraph=True)
    plan = SteeringPlan(EDITS["two"](0))
    plain = logits(model)
    with plan.apply(reference):
        expected = logits(reference)
    with plan.apply(model):
        torch.testing.assert_close(logits(model), expected)
    torch.testing.assert_close(logits(model), plain)


def test_hooks_of_one_kind_after_hooks_of_another_are_noticed():
    reference, counter = tiny(), CompileCounter()
    model = wrapped(copy.deepcopy(reference), counter)
    block, seen = adapter_for(model).layers[LAYER], []
    logits(model)
    first = before(block, lambda *_: seen.append("before"))
    logits(model)
    second = after(block, lambda *_: seen.append("after"))
    logits(model)
    first.remove()
    logits(model)
    second.remove()
    logits(model)
    assert seen == ["before", "before", "after", "after"]


def test_hook_functions_steer_and_see_a_compiled_model():
    reference = tiny()
    model = wrapped(copy.deepcopy(reference), CompileCounter())
    plain, results = logits(model), []
    for token in (None, -1, 2):
        for one in (reference, model):
            seen: list[Tensor] = []
            hooks = [
                (LAYER, make_steering_hook_hf(vector(), token=token)),
                (LAYER + 1, make_activs_hook_hf(seen)),
                (LAYER + 1, lambda module, args: (args[0] * 2, *args[1:])),
            ]
            with hf_hooks_contextmanager(one, hooks):
                results.append((logits(one), *seen))
        assert len(results[-1]) == 2
        for got, wanted in zip(results[-1], results[-2], strict=True):
            torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(logits(model), plain)


def test_a_compiled_model_generates_as_the_plain_one_under_steering_by_position():
    reference = FAMILIES["llama"](num_hidden_layers=2)
    model = copy.deepcopy(reference)
    model.forward = torch.compile(model.forward, backend="eager")
    options = {
        "attention_mask": torch.ones_like(IDS),
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "do_sample": False,
    }
    edit = Edit.add(3 * torch.randn(48, generator=torch.Generator().manual_seed(0)))
    plan = SteeringPlan([Intervention(LAYER, edit, tokens=slice(-1, None))])
    plain = model.generate(IDS, **options)
    with plan.apply(reference):
        expected = reference.generate(IDS, **options)
    with plan.apply(model):
        assert torch.equal(model.generate(IDS, **options), expected)
    assert not torch.equal(plain, expected)
    assert torch.equal(model.generate(IDS, **options), plain)


def closed_over(block: nn.Module) -> Callable[[], None]:
    inner = block.forward
    block.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    return lambda: vars(block).pop("forward")


def put_in_place(block: nn.Module) -> Callable[[], None]:
    kept = type(block).forward
    block.forward = lambda hidden, attention_mask=None: kept(block, hidden, attention_mask)
    return lambda: vars(block).pop("forward")


def hooked_by_accelerate(block: nn.Module) -> Callable[[], None]:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(block, hooks.ModelHook())
    return lambda: hooks.remove_hook_from_module(block)


def compiled_by_itself(block: nn.Module) -> Callable[[], None]:
    block.forward = torch.compile(block.forward, backend="eager")
    return lambda: vars(block).pop("forward")


@pytest.mark.parametrize("unwrap_under_steering", [False, True])
@pytest.mark.parametrize("wrap", [closed_over, put_in_place, hooked_by_accelerate, compiled_by_itself])
def test_steering_is_noticed_whoever_wraps_a_forward_meanwhile(wrap, unwrap_under_steering):
    reference = tiny()
    model = wrapped(copy.deepcopy(reference), CompileCounter())
    block, plain, plans = adapter_for(model).layers[LAYER], logits(reference), []
    for seed in range(2):
        plan = SteeringPlan(EDITS["add"](seed))
        with plan.apply(reference):
            plans.append((plan, logits(reference)))
    with plans[0][0].apply(model):
        logits(model)
        unwrap = wrap(block)
        torch.testing.assert_close(logits(model), plans[0][1])
    for seed, (plan, expected) in enumerate(plans):
        torch.testing.assert_close(logits(model), plain)
        with plan.apply(model):
            torch.testing.assert_close(logits(model), expected)
            if unwrap_under_steering and seed == 0:
                unwrap()
                torch.testing.assert_close(logits(model), expected)
    if not unwrap_under_steering:
        unwrap()
    torch.testing.assert_close(logits(model), plain)
    with plans[0][0].apply(model):
        torch.testing.assert_close(logits(model), plans[0][1])
