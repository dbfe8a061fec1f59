"""SmolLM2-135M-Instruct: that it is what it says, and that our text on it is transformers' own."""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from mechanex.engine.generate import generate, generate_batch
from mechanex.engine.models.packaged import PACKAGED, packaged_path, prepare
from mechanex.engine.models.resolve import load
from mechanex.errors import NotFoundError, ValidationError

NAME = "smollm2-135m"
QUESTIONS = ("Why is the sky blue?", "Name three rivers in Europe.", "Tell me a joke about cats.")


@pytest.fixture(scope="session")
def loaded() -> Any:
    home = os.environ["MECHANEX_HOME"]
    os.environ["MECHANEX_HOME"] = os.environ["MECHANEX_REAL_HOME"]
    try:
        return load(NAME, backend="transformers", dtype="float32")
    finally:
        os.environ["MECHANEX_HOME"] = home


def chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


@pytest.mark.real
def test_a_chats_text_is_the_one_of_transformers(loaded: Any) -> None:
    for question in QUESTIONS:
        ids = loaded.tokenizer.apply_chat_template(
            chat(question), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        with torch.no_grad():
            theirs = loaded.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
            )
        ours = generate(
            loaded.model, loaded.tokenizer, chat(question), sampling_method="greedy", max_tokens=24
        )
        continuation = loaded.tokenizer.decode(theirs[0, ids.shape[1] :], skip_special_tokens=True)
        assert ours.endswith(continuation)
        assert len(continuation) > 20


@pytest.mark.real
def test_a_batch_gives_each_chat_the_text_that_it_has_alone(loaded: Any) -> None:
    options = {"sampling_method": "greedy", "max_tokens": 16}
    together = generate_batch(loaded.model, loaded.tokenizer, [chat(q) for q in QUESTIONS], **options)
    alone = [generate(loaded.model, loaded.tokenizer, chat(q), **options) for q in QUESTIONS]
    assert together == alone


@pytest.mark.real
def test_damaged_weights_are_refused(mechanex_home: Path) -> None:
    kept = Path(os.environ["MECHANEX_REAL_HOME"]) / "models" / NAME
    copy = mechanex_home / "models" / NAME
    shutil.copytree(kept, copy)
    assert packaged_path(NAME) == copy
    with open(copy / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(ValidationError, match="damaged"):
        load(NAME)


def test_without_the_package_index_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(NotFoundError, match=r"real_model\.py --wheel"):
        load(NAME)


def test_another_wheel_is_refused(tmp_path: Path, mechanex_home: Path) -> None:
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(PACKAGED[NAME].member, b"GGUF of something else")
    with pytest.raises(ValidationError, match="is not the file"):
        prepare(NAME, wheel)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("README", sys.version)
    with pytest.raises(ValidationError, match="is not the wheel"):
        prepare(NAME, wheel)
    assert not list((mechanex_home / "models").iterdir())
