"""Families of models that vLLM serves: steered there as in transformers. The table of docs/vllm.md is what is run here.

``MECHANEX_WRITE_TABLE=1 make test-vllm`` writes it anew.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from models import LAYERS, batch, by_transformers, by_vllm, hf_model, save_random, vectors

PAGE = Path(__file__).parents[2] / "docs" / "vllm.md"
# They multiply embeddings, which are their unembedding too, by √d_model.
GEMMA = {"head_dim": 64, "hidden_activation": "gelu_pytorch_tanh", "embedding_size": 0.06}
WINDOW = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64}
GPT2 = {"n_embd": 128, "n_layer": LAYERS, "n_head": 2, "n_positions": 1024, "n_inner": 256}
FAMILIES: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": LAYERS, "n_head": 2},
    "cohere": {},
    "cohere2": WINDOW,
    "exaone4": WINDOW,
    "falcon": {"multi_query": True, "parallel_attn": True, "alibi": False, "new_decoder_architecture": False},
    "gemma": GEMMA,
    "gemma2": GEMMA | WINDOW | {"query_pre_attn_scalar": 64},
    "gemma3_text": GEMMA | WINDOW | {"query_pre_attn_scalar": 64},
    "glm4": {"head_dim": 64},
    "gpt2": GPT2,
    "gpt_neox": {},
    "gptj": {"n_embd": 128, "n_layer": LAYERS, "n_head": 2, "n_positions": 1024, "rotary_dim": 32},
    "granite": {"residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 2.0},
    "llama": {},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "olmo2": {},
    "opt": {"ffn_dim": 256, "word_embed_proj_dim": 128},
    "phi": {"intermediate_size": 512, "num_key_value_heads": 2},
    "phi3": {},
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": None},
}
FORMS: dict[str, str] = {}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_is_steered_as_in_transformers(engines: Any, tmp_path: Path, kind: str) -> None:
    folder = save_random(tmp_path / kind, kind, **FAMILIES[kind])
    known = vectors()
    cases = [case for i, case in enumerate(batch(known)) if i in (0, 1, 3, 5, 6, 9)]
    expected = [by_transformers(hf_model(folder), case, 8) for case in cases]
    assert len({tuple(one) for one in expected}) > 3
    llm = engines(folder)
    for name in ("a", "b", "clamp", "first", "last"):
        llm.register(known[name], name)
    assert by_vllm(llm, cases, 8) == expected
    (form,) = llm.engine.collective_rpc("steering_form")
    FORMS[kind] = form


def test_the_page_has_the_table() -> None:
    if set(FORMS) != set(FAMILIES):
        pytest.skip("not every family was run, or some failed")
    head = "| family | a layer gives the residual stream as |\n|---|---|\n"
    table = head + "".join(f"| `{kind}` | {form} |\n" for kind, form in sorted(FORMS.items()))
    text = PAGE.read_text(encoding="utf-8")
    begin = text.index("| family |")
    end = text.index("\n\n", begin) + 1
    if os.environ.get("MECHANEX_WRITE_TABLE"):
        PAGE.write_text(text[:begin] + table + text[end:], encoding="utf-8")
    else:
        assert text[begin:end] == table, "run: MECHANEX_WRITE_TABLE=1 make test-vllm"
