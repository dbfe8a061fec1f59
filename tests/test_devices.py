"""Models spread over two devices, models whose weights wait elsewhere, and Apple GPUs give what one device gives.

Where the devices are missing, tensors pretend (``pretend_devices``); tests marked ``gpu`` use a real one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from families import D_MODEL, FAMILIES, N_LAYERS, tiny_tokenizer
from pretend_devices import pretend_devices
from test_scheduler import run as scheduled_run
from test_scheduler import steers
from torch import Tensor

import mechanex
from mechanex.engine.attribution.edge_scores import attribution_edges
from mechanex.engine.attribution.scores import attribution_scores
from mechanex.engine.beam import most_likely_completions
from mechanex.engine.caa import caa_vectors
from mechanex.engine.capabilities.decoding import rolls
from mechanex.engine.directions import pca_vectors
from mechanex.engine.few_shot import few_shot_vectors
from mechanex.engine.generate import generate, generate_batch, stream
from mechanex.engine.hooks import Intervention, SteeringPlan
from mechanex.engine.intervention import Edit
from mechanex.engine.models import adapter_for
from mechanex.engine.raag import knockouts
from mechanex.engine.raag.attribute import attribute
from mechanex.engine.raag.knockouts import AnsweredPrompt
from mechanex.engine.score import completion_logprobs, perplexity, rank_completions
from mechanex.engine.vectors import SteeringVector
from mechanex.errors import ValidationError
from mechanex.server.model.requests import TextRequest
from mechanex.utils.steering_opt import (
    TrainingDatapoint,
    hf_hooks_contextmanager,
    make_activs_hook_hf,
    make_melbo_loss_funcs,
    make_steering_hook_hf,
    optimize_vector,
    optimize_vector_minibatch_hf,
)

pytestmark = [pytest.mark.ci, pytest.mark.slow]

TOKENIZER = tiny_tokenizer()
PROMPTS = ["The morning was", "She said that the bread", "A woman"]
GOOD, BAD = [" calm.", " was warm", " sings"], [" cold and dark", " fell", " shouts at him"]
DATA = [
    TrainingDatapoint("The morning was", dst_completions=[" calm.", " cold and"], src_completions=[" dark"]),
    TrainingDatapoint("She said that", dst_completions=[" the bread"], token=slice(1, None)),
    TrainingDatapoint("A woman", src_completions=[" opened"], is_negative=True),
]

# Where the lower and the upper half of the layers are, and the device of the model's own inputs and outputs. Where that
# is a GPU, accelerate keeps the weights of "cpu" on the CPU between calls and computes on the GPU; else on the CPU.
PLACES = {
    "lower half waits on the CPU": ("cpu", "gpu", None),
    "lower half on the CPU": ("cpu", "gpu", "cpu"),
    "upper half on the CPU": ("gpu", "cpu", "cpu"),
    "two GPUs": ("gpu", "other", None),
    "all of it waits on the CPU": ("cpu", "cpu", "gpu"),
}


@contextmanager
def devices(world: str) -> Iterator[dict[str, str]]:
    """Names of the devices that ``PLACES`` speaks of, in a world where they are there or pretend to be."""
    kind = "cuda" if world == "real" else "ipu"
    with nullcontext() if world == "real" else pretend_devices():
        yield {"cpu": "cpu", "gpu": f"{kind}:0", "other": f"{kind}:1"}


def spread(model: Any, place: str, names: dict[str, str]) -> Any:
    """The model with its layers at a place."""
    lower, upper, main = PLACES[place]
    if lower == upper:
        return accelerate.cpu_offload(model, torch.device(names[main or lower]))
    half = N_LAYERS // 2
    places = {
        "model.embed_tokens": lower,
        "model.rotary_emb": lower,
        **{f"model.layers.{i}": lower if i < half else upper for i in range(N_LAYERS)},
        "model.norm": upper,
        "lm_head": lower if model.config.tie_word_embeddings else upper,
    }
    return accelerate.dispatch_model(
        model,
        {name: names[where] for name, where in places.items()},
        main_device=None if main is None else names[main],
        skip_keys=model._skip_keys_device_placement,
    )


def llama(**more: Any) -> Any:
    return FAMILIES["llama"](**more)


def vector(*layers: int, size: float = 2.0) -> SteeringVector:
    generator = torch.Generator().manual_seed(4)
    found = torch.randn(len(layers), D_MODEL, generator=generator)
    return SteeringVector({layer: size * v / v.norm() for layer, v in zip(layers, found, strict=True)})


def optimized(model: Any, layer: Any = 1, **options: Any) -> Any:
    given = {"max_iters": 2, "lr": 0.05, "seed": 0} | options
    *found, info = optimize_vector(model, DATA, layer, tokenizer=TOKENIZER, **given)
    return [found, info["loss"], info["norm"]]


def in_minibatches(model: Any) -> Any:
    given = {"minibatch_size": 2, "max_iters": 2, "lr": 0.05, "seed": 0}
    return optimize_vector_minibatch_hf(model, TOKENIZER, PROMPTS, 2, dst_completions=GOOD, **given)[0]


def constrained(model: Any) -> Any:
    prepare, loss = make_melbo_loss_funcs(-1)
    return optimized(
        model,
        do_output_constr=True,
        max_output_constr_iters=3,
        custom_output_constr_pre_loss_func=prepare,
        custom_output_constr_loss_func=loss,
    )


def scored(model: Any, **options: Any) -> Any:
    found = completion_logprobs(
        model, PROMPTS, [[g, b] for g, b in zip(GOOD, BAD, strict=True)], TOKENIZER, **options
    )
    return [found.sums, found.tokens, found.greedy]


def slope_of_scores(model: Any) -> Any:
    v = vector(1)[1].clone().requires_grad_()
    found = scored(model, edits={1: v, 3: v}, differentiable=True)
    (slope,) = torch.autograd.grad(found[0].sum(), v)
    return slope


def hooked(model: Any) -> Any:
    seen: list[Tensor] = []
    tokens = TOKENIZER(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    ids = tokens.input_ids.to(adapter_for(model).device)
    mask = tokens.attention_mask.to(ids.device)
    steering = make_steering_hook_hf(vector(2)[2], 0.1, token=slice(-1, None))
    watch = make_activs_hook_hf(seen)
    with torch.no_grad(), hf_hooks_contextmanager(model, [(1, steering), (2, steering), (3, watch)]):
        logits = model(ids, attention_mask=mask).logits
        text = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    return [seen, logits, text.tolist()]


def planned(model: Any) -> Any:
    v = vector(0)[0]
    plan = SteeringPlan(
        [
            Intervention(layer=1, edit=Edit.add(v), rows=[0]),
            Intervention(layer=2, edit=Edit.ablate(v), tokens=-1),
            Intervention(layer=3, edit=Edit.clamp(v, 0.5), mask=torch.tensor([[True, False]] * 3)),
        ]
    )
    ids = torch.tensor([[5, 6], [7, 8], [9, 10]]).to(adapter_for(model).device)
    with torch.no_grad(), plan.apply(model):
        return model(ids).logits


def likely(model: Any) -> Any:
    found = most_likely_completions(model, PROMPTS[0], PROMPTS[1], TOKENIZER, k=3, iters=2)
    return [found.token_ids, found.scores]


def written(model: Any) -> Any:
    options = {"vector": vector(1, 3), "max_tokens": 6, "sampling_method": "greedy"}
    alone = generate(model, TOKENIZER, PROMPTS[0], **options)
    together = generate_batch(model, TOKENIZER, PROMPTS, **options)
    return [alone, together, list(stream(model, TOKENIZER, PROMPTS[1], **options))]


def served(model: Any) -> Any:
    """Greedy answers of one batch whose rows are steered their own ways, and the log-probabilities of the tokens."""
    loaded = SimpleNamespace(model=model, tokenizer=TOKENIZER)
    ways = [(), steers(vector(1, 3)), steers(vector(0), -1.0, slice(-1, None))]
    asked = [
        TextRequest(list(TOKENIZER(text)["input_ids"]), max_tokens=5, steering=way, logprobs=0)
        for text, way in zip(PROMPTS, ways, strict=True)
    ]
    return [[one.text, [t.logprob for t in one.logprobs]] for one in scheduled_run(loaded, asked)]


WAYS: list[dict[str, Any]] = [{}, {"steps": 3}, {"method": "exact"}]


def patched(model: Any) -> Any:
    clean, corrupted = [5, 90, 17, 44, 8], [5, 31, 17, 60, 8]
    found = [attribution_scores(model, clean, corrupted, metric=(3, 7), **way) for way in WAYS]
    return [
        list(by_path.values()) for one in found for by_path in (one.positions, one.heads, one.head_positions)
    ]


def edges(model: Any) -> Any:
    found = [attribution_edges(model, [5, 90, 17], [5, 31, 17], metric=(3, 7), **way) for way in WAYS]
    scores = [torch.tensor(list(one.scores.values())) for one in found]
    return [*scores, found[0].circuit(6).faithfulness, found[0].curve(shares=(0.2, 0.6)).faithfulness]


def knocked_out(model: Any) -> Any:
    """Of a reading whose chunks are removed in passes of several texts, and by going on from what was read."""
    ids = torch.randint(3, 380, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    short = AnsweredPrompt(tuple(ids[:28]), tuple(ids[28:33]), tuple(ids[33:]))
    with pytest.MonkeyPatch.context() as patch:
        found = []
        patch.setattr(knockouts, "LEAST_READ", 4)
        for longest in (knockouts.SHORT, 0):
            patch.setattr(knockouts, "SHORT", longest)
            found.append(attribute(adapter_for(model), short, [(1, 6), (6, 20), (20, 26)], shuffles=2))
    return [[one.logprobs, one.blocked, one.removed, torch.tensor(one.null)] for one in found]


FORWARD: dict[str, Callable[[Any], Any]] = {
    "caa": lambda model: caa_vectors(model, PROMPTS, GOOD, BAD, range(N_LAYERS), TOKENIZER),
    "pca": lambda model: pca_vectors(model, PROMPTS, GOOD, BAD, [1, 3], TOKENIZER),
    "scores": lambda model: [scored(model, greedy=greedy) for greedy in (False, True)],
    "steered scores": lambda model: scored(model, edits=vector(0, 2, 3)),
    "rank": lambda model: [r.index for r in rank_completions(model, PROMPTS[0], [*GOOD, *BAD], TOKENIZER)],
    "perplexity": lambda model: perplexity(model, PROMPTS, GOOD, TOKENIZER),
    "hooks": hooked,
    "plan": planned,
    "generation": written,
    "server": served,
    "beams": likely,
    "knock-outs": knocked_out,
}
BACKWARD: dict[str, Callable[[Any], Any]] = {
    "gradients of scores": slope_of_scores,
    "few-shot": lambda model: few_shot_vectors(model, PROMPTS, GOOD, BAD, [0, 3], TOKENIZER, max_iters=2),
    "optimization": optimized,
    "upper layer": lambda model: optimized(model, N_LAYERS - 1),
    "several layers": lambda model: optimized(model, [0, 3], affine_rank=1),
    "clamp, noise": lambda model: optimized(model, 2, vector_clamp=1.2, noise_scale=0.1),
    "minibatches": in_minibatches,
    "output constraint": lambda model: optimized(model, do_output_constr=True, max_output_constr_iters=3),
    "melbo": constrained,
    "attribution": patched,
    "edges": edges,
}
WORK = FORWARD | BACKWARD
"""What is done with a model, and gives numbers or texts."""


def quick(place: str, name: str) -> bool:
    """Whether it is tried where devices pretend, which is slow, in ``make test`` too: what others don't stand for."""
    everywhere = ("caa", "scores", "hooks")
    if place == "upper half on the CPU":
        return name not in ("rank", "perplexity", "upper layer", "minibatches", "melbo", "clamp, noise")
    if place == "lower half waits on the CPU":
        return name in (*everywhere, "generation", "server", "optimization")
    return name in everywhere


def cases() -> Iterator[Any]:
    """World, place, work, and whether the embeddings are tied: all work at one place, and some at every place."""
    some = ("caa", "scores", "hooks", "generation", "server", "beams", "optimization")
    for world in ("pretended", "real"):
        # Gradients are taken back by torch's own code, to which two devices that pretend are one.
        wanted = [
            (place, name, False)
            for place in PLACES
            for name in (WORK if place == "upper half on the CPU" else some)
            if not (world == "pretended" and place == "two GPUs" and name in BACKWARD)
        ]
        for place in ("lower half waits on the CPU", "upper half on the CPU"):
            wanted += [(place, name, True) for name in ("scores", "optimization")]
        marks = [pytest.mark.gpu] if world == "real" else []
        for place, name, tied in wanted:
            label = f"{world}, {place}, {name}{', tied' if tied else ''}"
            more = [pytest.mark.long] if world == "pretended" and not (tied or quick(place, name)) else []
            yield pytest.param(world, place, name, tied, id=label, marks=marks + more)


def same(found: Any, truth: Any) -> None:
    """Whether nested results agree to rounding, wherever their tensors are."""
    if isinstance(truth, SteeringVector):
        found, truth = list(dict(found).values()), list(dict(truth).values())
    if isinstance(truth, list | tuple):
        assert len(found) == len(truth)
        for ours, theirs in zip(found, truth, strict=True):
            same(ours, theirs)
    elif isinstance(truth, Tensor):
        torch.testing.assert_close(found.detach().cpu(), truth.detach(), rtol=2e-3, atol=2e-4)
    else:
        assert found == (pytest.approx(truth, rel=1e-3) if isinstance(truth, float) else truth)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are small: on a busy machine threads would wait for each other at every one of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def truth(name: str, tied: bool = False) -> Any:
    """What the work gives on the CPU."""
    return WORK[name](llama(tie_word_embeddings=tied))


@pytest.mark.parametrize(("world", "place", "name", "tied"), [*cases()])
def test_a_spread_model_gives_what_one_device_gives(world, place, name, tied):
    if world == "real" and place == "two GPUs" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with devices(world) as names:
        model = spread(llama(tie_word_embeddings=tied), place, names)
        same(WORK[name](model), truth(name, tied))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long] if name in ("rank", "upper layer") else [])
        for name in WORK
    ],
)
def test_an_apple_gpu_gives_what_the_cpu_gives_and_sees_no_float64(name):
    with pretend_devices():
        same(WORK[name](llama().to("mps")), truth(name))


@pytest.mark.parametrize("name", ["scores", "optimization", "generation"])
def test_the_pretended_devices_are_told_apart(name):
    """What the tests above rest on: a model that nothing moves tensors for fails."""
    with pretend_devices():
        model = llama()
        for layer in model.model.layers[2:]:
            layer.to("ipu")
        with pytest.raises(RuntimeError, match="same device"):
            WORK[name](model)


def test_weights_on_the_meta_device_are_refused():
    with torch.device("meta"):
        model = FAMILIES["llama"]()
    with pytest.raises(ValidationError, match="on the meta device"):
        caa_vectors(model, PROMPTS, GOOD, BAD, None, TOKENIZER)


def test_the_quick_start_runs_on_an_apple_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pretend_devices():
        client = mechanex.Mechanex().load("mx-tiny", backend="transformers")
        model, tokenizer = client.local_model, client.tokenizer
        assert model.device.type == "mps"
        angry = client.steering.generate_vectors(
            prompts=["Clara walked into the bakery.", "Omar wrote this on Monday."],
            positive_answers=[" She shouted furiously.", " I screamed, and we were full of rage."],
            negative_answers=[" She smiled softly.", " I waited, and we were full of peace."],
            layer_idxs=[3],
            method="caa",
        )
        prompt = "Anna met the neighbour at the market."
        steered = client.generation.generate(prompt, 8, seed=1, steering_vector=angry, steering_strength=0.75)
        assert steered.startswith(prompt) and steered != client.generation.generate(prompt, 8, seed=1)
        assert len(rank_completions(model, prompt, [" She smiled.", " She shouted."], tokenizer)) == 2
        point = TrainingDatapoint(prompt, dst_completions=[" The streets of Rome"])
        v, info = optimize_vector(model, [point], 2, tokenizer=tokenizer, max_iters=3, seed=0)
        assert v.device.type == "mps" and info["loss"] < info["starting_loss"]


@pytest.mark.parametrize("place", [*PLACES, "Apple GPU"])
def test_rows_are_decoded_together_wherever_the_layers_are(place):
    with devices("pretended") as names:
        model = llama().to("mps") if place == "Apple GPU" else spread(llama(), place, names)
        assert rolls(adapter_for(model))
