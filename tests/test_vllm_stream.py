"""Layers as vLLM has them, whose residual stream is edited token by token; vLLM itself is not needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mechanex.engine import terms
from mechanex.engine.intervention import Edit, EditTable
from mechanex.engine.vectors import SteeringVector
from mechanex.errors import NotFoundError, ValidationError
from mechanex.vllm.asked import FIELD, AskedEdit, edits_of
from mechanex.vllm.capacity import Capacity
from mechanex.vllm.engine_vectors import EngineVectors, SteerBy
from mechanex.vllm.forms import LayerCall, takes_two
from mechanex.vllm.held import HeldUnits, OwnedUnits
from mechanex.vllm.plan import PlacedEdit, RequestRead, plan_step
from mechanex.vllm.stream import SteeredStream, decoder_layers
from mechanex.vllm.supported import check_version
from mechanex.vllm.units import key_of, packed, unpacked

WIDTH, LAYERS, TOKENS = 8, 3, 5
GENERATOR = torch.Generator().manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=GENERATOR)


ADD, TWO, CLAMP = Edit.add(random()), Edit.add(random()), Edit.clamp(random(), 2.0)
LOW = Edit.affine(random(), random(2), random(2))
GATED = Edit.add(random()).gated("sigmoid", random(), 0.3)


class OneTensor(nn.Module):
    """A layer that takes and gives the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, positions: Tensor, hidden: Tensor) -> Tensor:
        return hidden + self.linear(hidden)


class TwoTensors(OneTensor):
    """A layer that takes the stream as a sum, and gives it so."""

    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        whole = hidden if residual is None else hidden + residual
        return self.linear(whole), whole


class Model(nn.Module):
    def __init__(self, kind: type[OneTensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(kind() for _ in range(LAYERS))
        self.is_sum = kind is TwoTensors

    def forward(self, hidden: Tensor) -> Tensor:
        positions, residual = torch.arange(hidden.shape[0]), None
        for layer in self.layers:
            if self.is_sum:
                hidden, residual = layer(positions, hidden, residual)
            else:
                hidden = layer(positions, hidden)
        return hidden if residual is None else hidden + residual


def stream_of(model: Model, capacity: Capacity) -> SteeredStream:
    layers = list(decoder_layers(model, LAYERS))
    stream = SteeredStream(layers, WIDTH, capacity, 16, torch.device("cpu"), torch.float32)
    stream.wrap(layers, lambda layer: isinstance(layer, TwoTensors))
    return stream


@torch.no_grad()
def expected(model: Model, hidden: Tensor, steers: dict[int, list[tuple[int, Edit]]]) -> Tensor:
    """The pass of an unwrapped model, with edits of single tokens in order at each layer."""
    for i, layer in enumerate([*model.layers, None]):
        for token, edit in steers.get(i, []):
            hidden = hidden.clone()
            hidden[token] = EditTable([edit]).apply(hidden[token : token + 1])[0]
        if isinstance(layer, OneTensor):
            hidden = hidden + layer.linear(hidden)
    return hidden


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("kind", [OneTensor, TwoTensors])
@torch.no_grad()
def test_every_token_has_its_own_edits(kind: type[OneTensor], compiled: bool) -> None:
    model = Model(kind)
    stream = stream_of(model, Capacity(6, 2, 2, True))
    for slot, edits in enumerate(({1: ADD}, {0: TWO, 3: TWO}, {2: CLAMP}, {1: LOW}, {3: GATED})):
        stream.fill(slot, edits)
    run: Any = torch.compile(model, backend="eager", fullgraph=True, dynamic=True) if compiled else model
    hidden = random(TOKENS)
    for edits, steers in (
        ([[(0, 2.0)], [(1, -1.0)], [], [(0, 1.0), (1, 1.0)]], [{1: ADD}, {0: TWO, 3: TWO}]),
        (
            [[(2, 1.0)], [(3, 0.5)], [], [(0, 1.0), (4, 2.0)]],
            [{1: ADD}, {0: TWO, 3: TWO}, {2: CLAMP}, {1: LOW}, {3: GATED}],
        ),
    ):
        placed = [[PlacedEdit(slot, strength) for slot, strength in one] for one in edits]
        stream.stage(plan_step([RequestRead(0, 1, 1, one) for one in placed] + [RequestRead(0, 1, 1)]))
        by_layer: dict[int, list[tuple[int, Edit]]] = {}
        for token, one in enumerate(edits):
            for slot, strength in one:
                for layer, edit in steers[slot].items():
                    by_layer.setdefault(layer, []).append((token, edit.scaled(strength)))
        torch.testing.assert_close(run(hidden), expected(Model(kind), hidden, by_layer))
    stream.clear()
    assert torch.equal(run(hidden), expected(Model(kind), hidden, {}))


@torch.no_grad()
def test_what_is_not_edited_stays_bit_for_bit() -> None:
    for kind in (OneTensor, TwoTensors):
        model, hidden = Model(kind), random(TOKENS)
        plain = model(hidden)
        stream = stream_of(model, Capacity(2, 1, 1))
        for edits in ({1: ADD}, {1: CLAMP}):
            stream.fill(0, edits)
            stream.stage(plan_step([RequestRead(0, 2, 2, [PlacedEdit(0, 1.0)]), RequestRead(0, 3, 3)]))
            found = model(hidden)
            assert torch.equal(found[2:], plain[2:]) and not torch.equal(found[:2], plain[:2])


def test_a_slot_forgets_what_was_in_it() -> None:
    model = Model(OneTensor)
    stream = stream_of(model, Capacity(1, 1))
    stream.fill(0, {1: ADD, 2: CLAMP})
    stream.fill(0, {3: TWO})
    stream.stage(plan_step([RequestRead(0, 2, 2, [PlacedEdit(0, 1.0)])]))
    hidden = random(2)
    with torch.no_grad():
        steers = {3: [(0, TWO), (1, TWO)]}
        torch.testing.assert_close(model(hidden), expected(Model(OneTensor), hidden, steers))


def test_a_model_whose_layers_are_not_found_is_refused() -> None:
    model = Model(OneTensor)
    with pytest.raises(ValidationError, match="0 lists of 5 modules"):
        decoder_layers(model, 5)
    model.others = nn.ModuleList(nn.Identity() for _ in range(LAYERS))
    with pytest.raises(ValidationError, match="layers, others"):
        decoder_layers(model, LAYERS)


# How layers take the stream


class Named(nn.Module):
    """A layer of somebody else's: other names, a mask beside, and a second tensor that it may not read."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.reads = reads

    def forward(self, x: Tensor, mask: Tensor, *, skip: Tensor | None = None) -> tuple[Tensor, Tensor]:
        whole = x.clone() if skip is None or not self.reads else x + skip
        x.fill_(float("nan"))  # as fused kernels write into what they are given
        return 2 * whole, whole


def test_layers_are_asked_how_they_take_the_stream() -> None:
    def call(skip: Tensor | None) -> LayerCall:
        return LayerCall((random(2), torch.ones(2, WIDTH, dtype=torch.bool)), {"skip": skip})

    calls = [call(None), call(random(2)), call(random(2))]
    for reads in (True, False):
        layers = [Named(reads) for _ in calls]
        for given, layer in zip(calls, layers, strict=True):
            layer(*given.args, **given.kwargs)
        assert takes_two(layers, calls, WIDTH) == [reads] * 3
        assert takes_two(layers[:1], calls[:1], WIDTH) == [reads], "one layer, which is handed nothing yet"
    plain = LayerCall((torch.arange(2), random(2)), {})
    assert takes_two([OneTensor()], [plain], WIDTH) == [False]
    with pytest.raises(ValidationError, match="OneTensor is handed 3 tensors"):
        takes_two([OneTensor()], [LayerCall((random(2), random(2), random(2)), {})], WIDTH)


# What travels


@pytest.mark.parametrize("edit", [ADD, CLAMP, LOW, GATED])
def test_edits_travel_as_bytes_named_by_their_content(edit: Edit) -> None:
    data = packed({0: edit, 3: ADD})
    found = unpacked(data)
    assert list(found) == [0, 3] and packed(found) == data
    hidden = random(4)
    assert torch.equal(found[0].apply(hidden), edit.apply(hidden))
    assert key_of(data) != key_of(packed({1: edit, 3: ADD})) != key_of(packed({1: edit}))


def vectors(**sizes: Any) -> EngineVectors:
    return EngineVectors(WIDTH, LAYERS, Capacity(**sizes), "llama")


def test_a_request_names_what_the_workers_hold() -> None:
    known = vectors()
    name = known.add({0: ADD.bias, -1: TWO.bias}, "calm")
    assert name == "calm" and known.ids == ("calm",)
    first = known.asked(SteerBy("calm", 2.0, tokens="prompt"))
    assert first.fields and len(first.missing) == 1
    (key,) = first.missing
    assert edits_of(first.fields[FIELD]) == (AskedEdit(key, 2.0, "prompt"),)
    assert list(unpacked(first.missing[key])) == [0, 2]
    known.held.sent(key, 1)
    again = known.asked([SteerBy("calm", -1.0), SteerBy("calm", layers=[0])])
    assert len(again.missing) == 1 and key not in again.missing
    assert not known.asked(SteerBy("calm", 0.0)).fields and not known.asked(None).fields
    known.add({0: TWO.bias}, "calm")
    other = known.asked(SteerBy("calm"))
    assert other.missing.keys() - {key} == other.missing.keys(), "another content is another name"
    known.remove("calm")
    with pytest.raises(NotFoundError, match="calm"):
        known.asked(SteerBy("calm"))
    with pytest.raises(NotFoundError, match="calm"):
        known.remove("calm")


def test_vectors_that_do_different_things_have_different_ids() -> None:
    known, vector = vectors(), SteeringVector({0: ADD.bias})
    several = [known.add(one) for one in (vector, vector.on_tokens("generated"), vector.clamping())]
    assert len(set(several)) == 3 and known.add(vector) == several[0]
    scopes = [edits_of(known.asked(SteerBy(one)).fields[FIELD])[0].tokens for one in several[:2]]
    assert scopes == [None, terms.TOKENS["generated"]]


def test_a_clamp_at_many_strengths_is_sent_once() -> None:
    """It takes out the component, and adds the vector as often as the strength says."""
    known = vectors()
    known.add(SteeringVector({0: ADD.bias, 2: TWO.bias}).clamping(), "level")
    first = known.asked(SteerBy("level", 2.0))
    for key, data in first.missing.items():
        known.held.sent(key, len(data))
    assert len(first.missing) == 2
    for strength in (0.5, -3.0, 7.0):
        asked = known.asked(SteerBy("level", strength))
        assert asked.fields and not asked.missing
        taken, added = edits_of(asked.fields[FIELD])
        assert (taken.strength, added.strength) == (1.0, strength)
        hidden = random(4)
        for edit in (taken, added):
            unit = unpacked(first.missing[edit.key])[2]
            hidden = hidden + edit.strength * (unit.apply(hidden) - hidden)
        direction = TWO.bias / TWO.bias.norm()
        torch.testing.assert_close(hidden @ direction, torch.full((4,), strength * float(TWO.bias.norm())))


def test_a_request_may_steer_tokens_that_the_vector_does_not_name() -> None:
    known = vectors()
    known.add(SteeringVector({0: ADD.bias}).on_tokens("generated"), "late")
    scopes = {}
    for tokens in (None, "all", "prompt", slice(0, None)):
        fields = known.asked(SteerBy("late", tokens=tokens)).fields
        scopes[str(tokens)] = edits_of(fields[FIELD])[0].tokens
    assert scopes == {
        "None": slice(-1, None),
        "all": None,
        "prompt": "prompt",
        "slice(0, None, None)": slice(0, None),
    }


def test_what_workers_hold_is_bounded() -> None:
    """Rotations by many angles: the latest are held, and those that requests need."""
    held, workers = HeldUnits(25), OwnedUnits(bytes.decode)
    other = HeldUnits(1000)
    workers.add("0", b"0", other.owner)
    with held.lease(["3"]):
        for i in range(10):
            workers.add(str(i), b"0123456789", held.owner)
            held.sent(str(i), 10)
            workers.forget(held.surplus(), held.owner)
        assert [str(i) in held for i in range(10)] == [i in (3, 9) for i in range(10)]
        assert len(workers) == 3 and workers.get("0") == "0", "another sender has it held"
        assert workers.get("3") == "0123456789" and workers.get("4") is None
    with held.lease(["9"]):
        held.sent("10", 10)
        assert held.surplus() == ["3"]
    assert held.surplus() == []


@pytest.mark.parametrize(
    ("vector", "text"),
    [
        ({0: torch.ones(WIDTH + 1)}, "9 wide at layer 0"),
        ({4: torch.ones(WIDTH)}, "layers are 0 to 3"),
        ({0: torch.ones(WIDTH), -3: torch.ones(WIDTH)}, "named twice"),
        ({0: LOW}, "start with steering_rank=2"),
        ({0: GATED}, "steering_gates=True"),
        ({0: Edit.dense(ADD.bias, torch.eye(WIDTH))}, "dense matrix"),
        ({0: torch.full((WIDTH,), float("nan"))}, "NaN"),
        (SteeringVector({0: ADD.bias}, model_family="gpt2"), "of the family 'gpt2'"),
        ({}, "a vector is"),
        ("calm", "a vector is"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(vector: Any, text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        vectors().add(vector)


@pytest.mark.parametrize(
    "sizes", [{"slots": 0}, {"slots": 2}, {"rank": -1}, {"per_token": 1.5}, {"gates": 1}]
)
def test_capacities_that_make_no_sense_are_refused(sizes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="steering_"):
        Capacity(**sizes)


def test_the_capacity_travels_in_vllms_configuration() -> None:
    capacity = Capacity(8, 2, 3, True)
    assert Capacity.of({"other": 1, **capacity.config()}) == capacity
    for config in ({}, None, {"mechanex": {"version": "0.0.0"}}):
        with pytest.raises(ValidationError, match="additional_config"):
            Capacity.of(config)


def test_versions_that_were_not_tested_are_refused() -> None:
    check_version("0.30.1")
    with pytest.raises(ValidationError, match=r"tested with vLLM 0\.30, and this is 0\.33\.0"):
        check_version("0.33.0")
