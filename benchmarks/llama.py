"""Random models of a realistic shape for benchmarks."""

from __future__ import annotations

import functools

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@functools.cache
def llama_110m() -> LlamaForCausalLM:
    """A random float32 Llama of 110 M parameters: 12 layers, 768 wide, 16k vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config).eval()
