"""Bad input to vector optimization is named; what goes wrong on the way loses nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from families import D_MODEL, FAMILIES, build, n_hooks
from test_optimize_loop import DATA, TOKENIZER, optimize
from test_optimize_runs import PROMPTS, minibatches

from mechanex.engine.models import adapter_for
from mechanex.errors import ValidationError
from mechanex.utils.steering_opt import (
    TrainingDatapoint,
    optimize_vector_minibatch_hf,
)

BAD = {
    "no datapoints": ({"data": []}, "no datapoints"),
    "one datapoint": ({"data": DATA[0]}, r"write \[datapoint\]"),
    "not datapoints": ({"data": [DATA[0], "x"]}, "Datapoint 1 is a str"),
    "no completions": ({"data": [DATA[0], TrainingDatapoint("A")]}, "Datapoint 1: it has no completions"),
    "empty completion": ({"data": [DATA[0], TrainingDatapoint("A", [""])]}, "Datapoint 1: .*no tokens"),
    "a text as list": ({"data": [TrainingDatapoint("A", " b")]}, r"Datapoint 0: src_completions is a list"),
    "bad prompt": ({"data": [TrainingDatapoint(7, [" b"])]}, "Datapoint 0: "),
    "target losses": (
        {"data": [TrainingDatapoint("A", [" b"], src_completions_target_losses=[1, 2])]},
        "Datapoint 0: src_completions_target_losses holds one number",
    ),
    "NaN target": (
        {"data": [TrainingDatapoint("A", [" b"], src_completions_target_losses=[math.nan])]},
        "Datapoint 0: .*finite",
    ),
    "token": ({"data": [TrainingDatapoint("A", [" b"], token="x")]}, "Datapoint 0: token"),
    "token beyond": ({"data": [replace(DATA[0], token=40)]}, "Datapoint 0: token=40 selects no position"),
    "token after the prompt": (
        {"data": [replace(DATA[0], token=slice(20, None))], "only_hook_prompt": True},
        "Datapoint 0: .*of its prompt",
    ),
    "layer": ({"layer": 5}, "Layer 5 does not exist"),
    "layer below": ({"layer": [-5]}, "Layer -5"),
    "layers": ({"layer": []}, "no layer"),
    "layer twice": ({"layer": [1, -3]}, "named twice"),
    "layer text": ({"layer": "1"}, "A layer is an int"),
    "satisfice": ({"satisfice": True}, "satisfice needs .* src completion 0 of datapoint 0"),
    "satisfice in part": (
        {"data": [replace(DATA[2], dst_completions_target_losses=[1.0]), DATA[1]], "satisfice": True},
        "datapoint 1",
    ),
    "targets of some": (
        {"data": [replace(DATA[2], dst_completions_target_losses=[1.0]), DATA[1]]},
        "src completion 0 of datapoint 1 has none.*target_loss",
    ),
    "a schedule of NaN": (
        {"lr_schedule": lambda step: math.nan if step == 1 else 1.0},
        "lr_schedule .* step 1",
    ),
    "a schedule below 0": ({"lr_schedule": lambda step: -1.0}, "lr_schedule gave -1.0 for step 0"),
    "a schedule of nothing": ({"lr_schedule": lambda step: None}, "lr_schedule gave None"),
    "clamp and affine": ({"vector_clamp": 1, "affine_rank": 1}, "contradict"),
    "clamp of zero": ({"vector_clamp": 1, "starting_norm": 0}, "needs a direction"),
    "clamp of a zero start": ({"vector_clamp": 1, "starting_vec": torch.zeros(D_MODEL)}, "needs a direction"),
    "NaN start": ({"starting_vec": torch.full((D_MODEL,), math.nan)}, "NaN"),
    "wrong width": ({"starting_vec": torch.ones(D_MODEL + 1)}, rf"\[{D_MODEL + 1}\].*{D_MODEL} wide"),
    "a huge start": ({"starting_vec": torch.full((D_MODEL,), 1e38)}, "norm is infinite"),
    "start text": ({"starting_vec": "x"}, "starting_vec"),
    "lr": ({"lr": 0}, "lr is a finite number above 0"),
    "eps": ({"eps": -1}, "eps is a finite number of at least 0"),
    "coldness": ({"coldness": math.inf}, "coldness"),
    "max_iters": ({"max_iters": -1}, "max_iters is a whole number of 0"),
    "max_iters float": ({"max_iters": 1.5}, "max_iters"),
    "target_loss": ({"target_loss": math.nan}, "target_loss"),
    "target iters": ({"target_loss_target_iters": 0}, "target_loss_target_iters"),
    "rank": ({"affine_rank": 0}, "affine_rank is a whole number of 1"),
    "max_norm": ({"max_norm": 0}, "max_norm"),
    "custom without its phase": ({"custom_output_constr_loss_func": print}, "do_output_constr=True"),
    "pre without custom": (
        {"do_output_constr": True, "custom_output_constr_pre_loss_func": print},
        "pass both",
    ),
    "seed and generator": ({"generator": torch.Generator()}, "seed and generator"),
    "patience": ({"patience": 3}, "eval_datapoints"),
    "eval": ({"eval_datapoints": [TrainingDatapoint("A")]}, "eval_datapoints: Datapoint 0"),
    "schedule": ({"lr_schedule": "steps", "max_iters": 3}, "'linear', 'cosine'"),
    "schedule without end": ({"lr_schedule": "cosine"}, "max_iters"),
    "token id": ({"data": [TrainingDatapoint([5], [[9999]])]}, "9999 is outside the vocabulary"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    options, message = BAD[case]
    hooks = n_hooks(build("llama"))  # transformers may have left some
    with pytest.raises(ValueError, match=message):
        optimize(**({"max_iters": None if case.startswith("schedule") else 2} | options))
    assert n_hooks(build("llama")) == hooks


def test_unknown_options_are_type_errors():
    with pytest.raises(TypeError, match="no_such"):
        optimize(max_iters=1, no_such=1)


def test_minibatch_input_is_checked():
    for options, message in (
        ({"prompts": []}, "no prompts"),
        ({"prompts": "a text"}, "list of prompts"),
        ({"size": 0}, "minibatch_size"),
    ):
        with pytest.raises(ValidationError, match=message):
            minibatches(max_iters=1, **options)
    with pytest.raises(ValidationError, match="Datapoint 0: it has no completions"):
        optimize_vector_minibatch_hf(build("llama"), TOKENIZER, PROMPTS, 1)


def test_a_loss_that_becomes_nan_ends_with_the_best_vector(caplog):
    model = FAMILIES["llama"]()
    calls = []

    def poison(module, args, out):
        calls.append(1)
        return out * (math.nan if len(calls) > 12 else 1.0)

    model.model.norm.register_forward_hook(poison)
    adapter_for(model).findings.update(adapter_for(build("llama")).findings)
    optimize(max_iters=1)
    vector, info = optimize(model, max_iters=50, lr=0.05)
    assert info["stopped"] == "not finite" and "best vector so far" in caplog.text
    assert (
        math.isfinite(info["loss"])
        and bool(torch.isfinite(vector).all())
        and info["loss"] < info["starting_loss"]
    )


@pytest.mark.parametrize("lr", [1e30, 1e300])
def test_a_vector_that_outgrows_its_numbers_ends_with_the_best_one(lr, caplog):
    vector, info = optimize(max_iters=50, lr=lr)
    assert info["stopped"] == "not finite" and "norm is too large" in caplog.text
    assert math.isfinite(info["norm"]) and bool(torch.isfinite(vector).all())
