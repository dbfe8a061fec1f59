"""Random models of a realistic shape for benchmarks."""

from __future__ import annotations

import functools

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@functools.cache
def llama_46m() -> LlamaForCausalLM:
    """A random float32 Llama: 12 layers, 512 wide, 38 M parameters in its layers and 8 M in the unembedding."""
    return _random(512, 1376, 8)


@functools.cache
def llama_110m() -> LlamaForCausalLM:
    """A random float32 Llama of 110 M parameters: 12 layers, 768 wide, 16k vocabulary."""
    return _random(768, 2048, 12)


def _random(d_model: int, d_mlp: int, n_heads: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16_000,
        hidden_size=d_model,
        intermediate_size=d_mlp,
        num_hidden_layers=12,
        num_attention_heads=n_heads,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config).eval()
