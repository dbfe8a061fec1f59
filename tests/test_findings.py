"""What was found out about a model holds only while what it depends on stays as it was."""

from __future__ import annotations

import weakref

import pytest
import torch
from families import FAMILIES, build
from torch import nn

from mechanex.engine.attaching import before
from mechanex.engine.capabilities import unembedding
from mechanex.engine.capabilities.packing import packing_form
from mechanex.engine.hooks import Intervention, SteeringPlan
from mechanex.engine.intervention import Edit
from mechanex.engine.models import adapter_for
from mechanex.engine.models.adapter import Handles
from mechanex.engine.score import completion_logprobs

TEXTS = [[5, 6, 7, 8], [9, 10, 11]], [[12, 13], [14, 15, 16]]


class LowRank(nn.Module):
    """A head with a low-rank change beside it, nothing at first; it shows its weight as adapters do."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.base = head
        self.down, self.up = nn.Linear(48, 4, bias=False), nn.Linear(4, 384, bias=False)
        self.off = False
        nn.init.zeros_(self.up.weight)
        self.requires_grad_(False)

    @property
    def weight(self):
        return self.base.weight

    def forward(self, hidden):
        return self.base(hidden) + (0 if self.off else self.up(self.down(hidden)))


def with_low_rank():
    model = FAMILIES["llama"]()
    model.lm_head = LowRank(model.lm_head)
    return model


def scores_of(model):
    return torch.cat(completion_logprobs(model, *TEXTS).tokens)


def truth_of(model):
    values = []
    for prompt, completion in zip(*TEXTS, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        values.append(logits.log_softmax(-1)[torch.arange(len(completion)), completion])
    return torch.cat(values)


def in_place(up):
    with torch.no_grad():
        up.weight.add_(torch.randn(384, 4))


def by_data(up):
    up.weight.data.add_(torch.randn(384, 4))


def by_state(up):
    up.load_state_dict({"weight": torch.randn(384, 4)})


def by_training(up):
    up.weight.requires_grad_(True)
    optimizer = torch.optim.SGD(up.parameters(), lr=10.0)
    (up.weight * torch.randn(384, 4)).sum().backward()
    optimizer.step()
    up.weight.requires_grad_(False)


@pytest.mark.parametrize("change", [in_place, by_data, by_state, by_training])
def test_a_head_whose_adapter_was_nothing_and_is_trained_later_is_read_anew(change):
    model = with_low_rank()
    before = scores_of(model)
    assert adapter_for(model).findings["unembedding"] is True
    change(model.lm_head.up)
    after = scores_of(model)
    torch.testing.assert_close(after, truth_of(model), rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 0.1
    assert adapter_for(model).findings["unembedding"] is False
    model.lm_head.off = True
    torch.testing.assert_close(scores_of(model), before, rtol=1e-4, atol=1e-4)
    assert adapter_for(model).findings["unembedding"] is True


def test_a_hook_on_the_head_is_heard():
    model = FAMILIES["llama"]()
    before = scores_of(model)
    handle = model.lm_head.register_forward_hook(lambda _, args, out: out * 2)
    torch.testing.assert_close(scores_of(model), truth_of(model), rtol=1e-4, atol=1e-4)
    handle.remove()
    torch.testing.assert_close(scores_of(model), before)


def test_a_bias_that_the_model_adds_behind_its_head_is_heard():
    model = FAMILIES["llama"]()
    model.register_buffer("final_bias", torch.zeros(384))
    model.register_forward_hook(lambda m, args, out: setattr(out, "logits", out.logits + m.final_bias))
    scores_of(model)
    model.final_bias += torch.randn(384)
    torch.testing.assert_close(scores_of(model), truth_of(model), rtol=1e-4, atol=1e-4)


def test_weights_that_are_read_anew_anyway_ask_for_no_new_check(monkeypatch):
    model = FAMILIES["llama"]()
    scores_of(model)
    monkeypatch.setattr(unembedding, "scored_hidden", None)  # what the check runs
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
        model.model.layers[0].mlp.up_proj.weight.mul_(0.5)
    torch.testing.assert_close(scores_of(model), truth_of(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.set_attn_implementation("eager"),
        lambda model: model.bfloat16(),
        lambda model: setattr(model.model.layers[1], "forward", model.model.layers[1].forward),
        lambda model: setattr(model.config, "sliding_window", 5),
    ],
    ids=["attention", "dtype", "forward", "window"],
)
def test_the_packed_form_is_tried_again_where_what_it_depends_on_changed(change):
    model = FAMILIES["mistral"]()
    adapter = adapter_for(model)
    packing_form(adapter, 9)
    assert "form" in adapter.findings and list(adapter.findings) == ["form"]
    change(model)
    assert "form" not in adapter.findings and not len(adapter.findings)
    with pytest.raises(KeyError):
        adapter.findings["form"]


def test_hooks_of_our_own_take_no_finding_away():
    model = build("llama")
    adapter = adapter_for(model)
    form = packing_form(adapter, 20)
    known = dict(adapter.findings)
    with SteeringPlan([Intervention(1, Edit.add(torch.ones(adapter.d_model)))]).apply(model):
        assert dict(adapter.findings) == known and known["form"] == form
    assert dict(adapter.findings) == known


def test_findings_stay_on_the_model_and_do_not_keep_the_adapter():
    model = FAMILIES["llama"]()
    adapter = adapter_for(model)
    adapter.findings["form"] = "plain"
    gone = weakref.ref(adapter)
    del adapter
    assert gone() is None and adapter_for(model).findings["form"] == "plain"


def test_our_own_hooks_change_no_finding():
    model = FAMILIES["llama"]()
    scores_of(model)
    adapter = adapter_for(model)
    found = dict(adapter.findings)
    assert {"form", "unembedding"} <= found.keys()
    plan = SteeringPlan([Intervention(layer, Edit.add(torch.ones(48)), tokens=-1) for layer in range(4)])
    with plan.apply(model), Handles() as handles:
        handles.add(before(adapter.head, lambda *_: None))
        assert dict(adapter.findings) == found
    assert dict(adapter.findings) == found
