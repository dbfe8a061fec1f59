"""Folders with models that never end an answer, so that a server and a batch write the same number of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama import llama_110m
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mechanex.engine.models.resolve import load

__all__ = ["MODELS"]


def tiny(folder: Path) -> Path:
    """mx-tiny."""
    loaded = load("mx-tiny", backend="transformers", device="cpu")
    return _saved(loaded.model, loaded.tokenizer, folder)


def big(folder: Path) -> Path:
    """The random Llama of 110 M parameters, whose tokens are words."""
    vocabulary = {f"w{i}": i for i in range(llama_110m().config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _saved(llama_110m(), PreTrainedTokenizerFast(tokenizer_object=tokenizer), folder)


def _saved(model: Any, tokenizer: Any, folder: Path) -> Path:
    ends = model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token = ends
    return folder


MODELS = {"mx-tiny": tiny, "llama 110 M": big}
