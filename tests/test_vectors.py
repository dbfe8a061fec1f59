"""Steering vectors: their algebra, what they refuse, and how they steer a model."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from families import D_MODEL, N_LAYERS, build, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mechanex import NotFoundError, SteeringVector, ValidationError
from mechanex.engine.vector_store import VectorStore


def vector(*layers: int, width: int = 8, **fields: Any) -> SteeringVector:
    return SteeringVector({layer: torch.randn(width) for layer in layers}, **fields)


def logits(text: str = "The morning was cold and") -> Tensor:
    ids = tiny_tokenizer()(text, return_tensors="pt").input_ids
    with torch.no_grad():
        out: Tensor = build("llama")(ids).logits
    return out


numbers = st.floats(-100, 100, allow_subnormal=False)


@given(st.lists(st.integers(0, 5), unique=True), st.lists(st.integers(0, 5), unique=True), numbers, numbers)
def test_algebra_is_that_of_tensors_over_the_union_of_layers(
    left: list[int], right: list[int], x: float, y: float
) -> None:
    a, b = vector(0, *left, width=3), vector(0, *right, width=3)
    combined = x * a - b * y
    assert set(combined) == {0, *left, *right}
    for layer, tensor in combined.items():
        zero = torch.zeros(3)
        torch.testing.assert_close(tensor, x * a.get(layer, zero) - y * b.get(layer, zero))


def test_scalars_of_every_kind_multiply_and_divide() -> None:
    a = vector(3)
    for two in (2, 2.0, np.float64(2), np.float32(2), np.int64(2), torch.tensor(2.0)):
        assert (a * two).allclose(a + a)
        assert (a / two * 2).allclose(a)
    assert (np.float64(2) * a).allclose(a + a)
    assert sum([a, a, a]).allclose(3 * a)
    assert -a == -1 * a
    assert not (a - a).norm()


@pytest.mark.parametrize("other", ["x", None, [1.0], torch.ones(8), True])
def test_algebra_with_anything_else_is_a_type_error(other: object) -> None:
    for operation in (lambda: vector(1) + other, lambda: vector(1) * other, lambda: vector(1) - other):
        with pytest.raises(TypeError):
            operation()


def test_algebra_refuses_other_widths_and_non_finite_factors() -> None:
    with pytest.raises(ValidationError, match="8 and 9"):
        vector(1) + vector(1, width=9)
    for factor in (float("nan"), float("inf")):
        with pytest.raises(ValidationError, match="finite"):
            factor * vector(1)
    with pytest.raises(ValidationError, match="zero"):
        vector(1) / 0
    with pytest.raises(ValidationError, match="infinite"):
        SteeringVector({0: torch.full((3,), 3e38)}) * 10


def test_norms_and_angles() -> None:
    a = SteeringVector({1: torch.tensor([3.0, 4.0]), 2: torch.tensor([0.0, 2.0])})
    assert a.norms() == {1: 5.0, 2: 2.0}
    assert a.norm() == pytest.approx(29**0.5)
    assert a.normalized().norms() == pytest.approx({1: 1.0, 2: 1.0})
    b = SteeringVector({1: torch.tensor([-3.0, -4.0]), 7: torch.ones(2)})
    assert a.cosine_similarity(b) == {1: pytest.approx(-1.0)}
    with pytest.raises(ValidationError, match="in common"):
        a.cosine_similarity(SteeringVector({5: torch.ones(2)}))
    with pytest.raises(ValidationError, match="zero"):
        a.cosine_similarity(0 * a)
    with pytest.raises(ValidationError, match="zero"):
        (0 * a).normalized()


def test_a_vector_does_not_change_with_the_tensors_it_was_made_of_or_gave() -> None:
    given_tensor = torch.ones(4, requires_grad=True)
    a = SteeringVector({0: given_tensor})
    with torch.no_grad():
        given_tensor.zero_()
    a[0].zero_()
    dict(a)[0].zero_()
    assert torch.equal(a[0], torch.ones(4)) and not a[0].requires_grad
    with pytest.raises(TypeError):
        a[0] = torch.ones(4)  # type: ignore[index]


def test_equality_is_of_layers_and_numbers() -> None:
    a = vector(1, 2)
    assert a == SteeringVector(dict(a), method="caa")
    assert a != a.restricted([1]) and a != 2 * a and a != "a" and a.allclose(a * (1 + 1e-7))
    assert not a.allclose(vector(1, 2, width=9))


def test_dtypes_are_at_least_float32() -> None:
    assert SteeringVector({0: torch.ones(3, dtype=torch.bfloat16)}).dtype == torch.float32
    assert SteeringVector({0: torch.ones(3), 1: torch.ones(3).double()}).dtype == torch.float64
    assert vector(0).to(torch.float64).dtype == torch.float64
    with pytest.raises(ValidationError, match="float16"):
        vector(0).to(torch.float16)


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ({}, "at least one layer"),
        (None, "at least one layer"),
        ([torch.ones(3)], "at least one layer"),
        ({-1: torch.ones(3)}, "from 0 up"),
        ({"1": torch.ones(3)}, "from 0 up"),
        ({True: torch.ones(3)}, "from 0 up"),
        ({1.0: torch.ones(3)}, "from 0 up"),
        ({0: "1.0, 2.0"}, "a tensor, a NumPy array or a list"),
        ({0: torch.ones(2, 2)}, r"\[2, 2\]"),
        ({0: torch.ones(0)}, r"\[0\]"),
        ({0: torch.ones(3, dtype=torch.int64)}, "int64"),
        ({0: torch.ones(3), 1: torch.ones(4)}, "one width"),
        ({0: torch.tensor([1.0, float("nan")])}, "NaN"),
        ({0: torch.tensor([1.0, -float("inf")])}, "infinite"),
    ],
)
def test_unsound_layers_are_refused(layers: Any, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        SteeringVector(layers)


def test_unsound_metadata_is_refused() -> None:
    with pytest.raises(ValidationError, match="resid_pre"):
        vector(0, site="attn_out")
    with pytest.raises(ValidationError, match="'width'"):
        vector(0, metadata={"width": "7"})
    with pytest.raises(ValidationError, match="text to text"):
        vector(0, metadata={"a": 7})


def test_what_two_vectors_agree_on_survives_their_sum() -> None:
    a = vector(0, model="m", method="caa", metadata={"x": "1", "y": "2"})
    b = vector(1, model="m", method="other", metadata={"x": "1", "y": "3"})
    assert ((a + b).model, (a + b).method, (a + b).metadata) == ("m", None, {"x": "1"})
    assert (a + vector(0)).model == "m"


# Steering


def test_apply_steers_until_the_block_ends_or_the_handle_is_removed() -> None:
    plain = logits()
    a = vector(2, width=D_MODEL)
    with a.apply(build("llama"), strength=3):
        steered = logits()
    assert not torch.allclose(plain, steered, atol=1e-3)
    assert torch.equal(plain, logits())
    handle = a.apply(build("llama"), strength=3)
    assert torch.equal(logits(), steered)
    handle.remove()
    assert torch.equal(plain, logits())


def test_strength_multiplies_and_layers_add_up() -> None:
    a, b = vector(1, width=D_MODEL), vector(3, width=D_MODEL)
    with a.apply(build("llama"), strength=-2), b.apply(build("llama")):
        apart = logits()
    with (-2 * a + b).apply(build("llama")):
        torch.testing.assert_close(logits(), apart, rtol=1e-4, atol=1e-4)


def test_tokens_and_rows_choose_what_is_steered() -> None:
    ids = torch.randint(3, 300, (2, 6))
    model = build("llama")
    with torch.no_grad():
        plain = model(ids).logits
        with vector(1, width=D_MODEL).apply(model, 5, tokens=slice(3, None), rows=[1]):
            steered = model(ids).logits
    changed = (plain - steered).abs().amax(-1) > 1e-4
    assert changed.tolist() == [[False] * 6, [False] * 3 + [True] * 3]


def test_zero_vectors_and_zero_strength_change_no_bit(caplog: pytest.LogCaptureFixture) -> None:
    plain = logits()
    with SteeringVector({1: torch.zeros(D_MODEL)}).apply(build("llama"), strength=100):
        assert torch.equal(plain, logits())
    assert not caplog.records
    with caplog.at_level(logging.WARNING), vector(1, width=D_MODEL).apply(build("llama"), strength=0):
        assert torch.equal(plain, logits())
    assert "strength 0" in caplog.text


def test_a_vector_of_another_model_is_refused_and_leaves_no_hook() -> None:
    plain = logits()
    with pytest.raises(ValidationError, match=f"8 wide.*{D_MODEL}.*made for other"):
        vector(1, model="other").apply(build("llama"))
    with pytest.raises(ValidationError, match=f"Layer {N_LAYERS + 1} "):
        vector(1, N_LAYERS + 1, width=D_MODEL).apply(build("llama"))
    for strength in (float("nan"), float("inf"), "1", None):
        with pytest.raises(ValidationError, match="finite"):
            vector(1, width=D_MODEL).apply(build("llama"), strength=strength)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="infinite"):
        SteeringVector({1: torch.full((D_MODEL,), 1e38)}).apply(build("llama"), strength=10)
    with pytest.raises(ValidationError, match="model"):
        vector(1).apply("gpt2")  # type: ignore[arg-type]
    assert torch.equal(plain, logits())


# The store


def test_stored_vectors_are_found_again_by_another_store() -> None:
    a = vector(1, 4, model="m", method="caa", seed=3)
    vector_id = VectorStore().put(a)
    found = VectorStore().get(vector_id)
    assert found == a and (found.model, found.method, found.seed) == ("m", "caa", 3)


def test_ids_are_new_each_time() -> None:
    store, a = VectorStore(), vector(1)
    assert store.put(a) != store.put(a)


def test_unknown_ids_are_not_found_and_no_id_reaches_outside_the_folder(mechanex_home: Any) -> None:
    store = VectorStore()
    with pytest.raises(NotFoundError, match="nothing-here"):
        store.get("nothing-here")
    vector(1).save(mechanex_home / "outside.safetensors")
    for bad in ("../outside", "/etc/passwd", "a/b", "", ".", "a" * 65, "é", "a\0b", "x\n", None, 7):
        with pytest.raises(ValidationError, match="vector id"):
            store.get(bad)  # type: ignore[arg-type]
        assert bad not in store


def test_a_damaged_stored_file_is_named() -> None:
    vector_id = VectorStore().put(vector(1))
    path = VectorStore().path(vector_id)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValidationError, match=vector_id):
        VectorStore().get(vector_id)


def test_a_folder_that_cannot_be_written_costs_a_warning_not_the_vector(
    mechanex_home: Any, caplog: pytest.LogCaptureFixture
) -> None:
    mechanex_home.write_text("a file where the folder should be")
    store, a = VectorStore(), vector(1)
    vector_id = store.put(a)
    assert "MECHANEX_HOME" in caplog.text
    assert store.get(vector_id) == a


def test_a_vector_is_compared_with_lists_too() -> None:
    found = SteeringVector({3: [3.0, 4.0]}).cosine_similarity({3: [4.0, 3.0], 4: [1.0, 0.0]})
    assert found == pytest.approx({3: 0.96})
