"""Models whose inner workings are known: one that copies from a planted position, and one that is linear."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

COPY_LAYER, COPY_HEAD = 1, 2
N_VALUES, ASK = 8, 15
"""Tokens 0 to 7 are what is copied; token 15 asks for the one that stands before it somewhere."""


def copying_model(n_layers: int = 2) -> transformers.LlamaForCausalLM:
    """Layers of four heads that share two keys and values; one head copies the value token to the last position.

    Columns of the stream: 0 to 15 say which token this is, 16 that it is a value, 17 that it asks, 24 to 31 what was
    copied.
    """
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    attention = model.model.layers[COPY_LAYER].self_attn
    query, key = attention.q_proj.weight, attention.k_proj.weight
    own, shared = (
        slice(8 * COPY_HEAD, 8 * COPY_HEAD + 8),
        slice(8 * (COPY_HEAD // 2), 8 * (COPY_HEAD // 2) + 8),
    )
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[:, :16] = torch.eye(16)
        model.model.embed_tokens.weight[:N_VALUES, 16] = 1
        model.model.embed_tokens.weight[ASK, 17] = 1
        # The pair of columns that turns slowest, so that it hardly matters how far away the value stands.
        query[own], key[shared] = 0, 0
        query[own.start + 3, 17] = key[shared.start + 3, 16] = 4
        attention.v_proj.weight[shared] = 0
        attention.v_proj.weight[shared, :N_VALUES] = torch.eye(N_VALUES)
        attention.o_proj.weight[:, own] = 0
        attention.o_proj.weight[24:, own] = torch.eye(N_VALUES)
        model.lm_head.weight.zero_()
        model.lm_head.weight[:N_VALUES, 24:] = 4 * torch.eye(N_VALUES)
    return model.eval()  # type: ignore[no-untyped-call,no-any-return]


class _Mean(nn.Module):
    """Attention that looks at all earlier tokens alike."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        counts = torch.arange(1, hidden.shape[1] + 1, dtype=hidden.dtype)[:, None]
        mixed: Tensor = self.out(hidden.cumsum(1) / counts)
        return mixed


class _LinearLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mixes, self.thinks = _Mean(width), nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.mixes(hidden)
        found: Tensor = hidden + self.thinks(hidden)
        return found


class LinearModel(nn.Module):
    """A causal model without a single non-linearity, whose modules have names that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            vocab_size=20, hidden_size=12, num_hidden_layers=3, num_attention_heads=3
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.words = nn.Embedding(20, 12)
            self.layers = nn.ModuleList(_LinearLayer(12) for _ in range(3))
            self.unembed = nn.Linear(12, 20)

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def get_output_embeddings(self) -> nn.Module:
        return self.unembed

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        hidden = self.words(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return SimpleNamespace(logits=self.unembed(hidden))
