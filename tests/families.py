"""Tiny random models of every supported family, the same weights on every call, and a tokenizer for them.

All are float32, on the CPU and in eval mode. The weights are much larger than a fresh model's, so that
attention, positions and masks change the logits by far more than rounding does: a mistake shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mechanex._private.transformers import CAPTURING

N_LAYERS = 4
D_MODEL = 48
N_HEADS = 4
N_VOCAB = 384
MAX_POSITIONS = 256
PAD, BOS, EOS = 0, 1, 2

_COMMON: dict[str, Any] = {
    "vocab_size": N_VOCAB,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": D_MODEL,
    "intermediate_size": 96,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": MAX_POSITIONS,
}
_TOKENIZER_VOCAB = 376  # below the models' rows, as in models whose embedding is padded
_TEXT = """
The morning was cold and the street was quiet. A woman opened the window and looked at the river below. She
said that the bread was still warm, and that the market would open in an hour. The old man at the corner
sold apples, oranges and flowers; he knew every child by name. "Where are you going?" he asked. "To the
station," they answered, "because the train to Paris leaves at seven." It had rained in the night and the
stones were shining. What is the capital of France? The capital of France is Paris. What is the capital of
Italy? The capital of Italy is Rome. I am happy that you came. I am angry that you did not write. He was
calm when he heard the news, and she was not. They walked slowly through the park, talking about the
weather, about their work, and about the people they had met when they were young. Nothing is better than a
good book and a cup of tea. Nothing is worse than waiting for a letter that never comes. The doctor said
that everything would be well, but the lawyer was not so sure. Please close the door when you leave. Thank
you for the lovely evening; we should do it again. In the summer the days are long and the city is full of
music. In the winter the snow covers the roofs and the children play until the lamps are lit.
"""
_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def _enlarge(model: PreTrainedModel, seed: int, gain: float) -> None:
    """Redraw every weight, biases and norms included, at a size at which errors show."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if "A_log" in name or name.endswith(".D"):
                continue
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            elif "embed" in name or "wte" in name or "wpe" in name:
                parameter.copy_(0.5 * noise)
            else:
                # A gain of 1 keeps a row's length through the product.
                parameter.copy_(gain / math.sqrt(parameter.shape[-1]) * noise)


def _family(
    prefix: str, *, config: str = "", model: str = "", gain: float = 1.5, **settings: Any
) -> Callable[..., PreTrainedModel]:
    config_class = getattr(transformers, config or f"{prefix}Config")
    model_class = getattr(transformers, model or f"{prefix}ForCausalLM")

    def make(**more: Any) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            built: PreTrainedModel = model_class(config_class(**(_COMMON | settings | more)))
        _enlarge(built, seed=len(prefix), gain=gain)
        built.generation_config.pad_token_id = PAD
        built.config.architectures = [type(built).__name__]  # as in a checkpoint
        built.eval()  # type: ignore[no-untyped-call]
        return built

    return make


def _like_llama(prefix: str, **settings: Any) -> Callable[..., PreTrainedModel]:
    return _family(prefix, **(_LLAMA_LIKE | settings))


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": _like_llama("Llama"),
    "mistral": _like_llama("Mistral", sliding_window=MAX_POSITIONS),
    "mixtral": _like_llama("Mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen2": _like_llama("Qwen2"),
    "qwen3": _like_llama("Qwen3"),
    "qwen3_moe": _like_llama("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48),
    "gemma": _like_llama("Gemma"),
    "gemma2": _like_llama(
        "Gemma2",
        sliding_window=MAX_POSITIONS,
        layer_types=_MIXED,
        query_pre_attn_scalar=12,
        final_logit_softcapping=4.0,
        attn_logit_softcapping=8.0,
    ),
    "gemma3": _like_llama(
        "Gemma3",
        config="Gemma3TextConfig",
        sliding_window=MAX_POSITIONS,
        layer_types=_MIXED,
        query_pre_attn_scalar=12,
    ),
    "gpt2": _family(
        "GPT2",
        model="GPT2LMHeadModel",
        n_embd=D_MODEL,
        n_layer=N_LAYERS,
        n_head=N_HEADS,
        n_positions=MAX_POSITIONS,
    ),
    "gpt_neox": _family(
        "GPTNeoX",
        hidden_size=D_MODEL,
        intermediate_size=96,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        max_position_embeddings=MAX_POSITIONS,
        rotary_pct=0.5,
    ),
    "gptj": _family(
        "GPTJ", n_embd=D_MODEL, n_layer=N_LAYERS, n_head=N_HEADS, n_positions=MAX_POSITIONS, rotary_dim=8
    ),
    "gpt_neo": _family(
        "GPTNeo",
        hidden_size=D_MODEL,
        num_layers=N_LAYERS,
        num_heads=N_HEADS,
        attention_types=[[["global", "local"], 2]],
        window_size=MAX_POSITIONS,
        max_position_embeddings=MAX_POSITIONS,
    ),
    "opt": _family(
        "OPT",
        hidden_size=D_MODEL,
        word_embed_proj_dim=D_MODEL,
        ffn_dim=96,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        max_position_embeddings=MAX_POSITIONS,
    ),
    "bloom": _family("Bloom", hidden_size=D_MODEL, n_layer=N_LAYERS, n_head=N_HEADS),
    "falcon": _family(
        "Falcon",
        hidden_size=D_MODEL,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        max_position_embeddings=MAX_POSITIONS,
    ),
    "mpt": _family("Mpt", d_model=D_MODEL, n_layers=N_LAYERS, n_heads=N_HEADS, max_seq_len=MAX_POSITIONS),
    "phi": _like_llama("Phi"),
    "phi3": _like_llama("Phi3"),
    "olmo2": _like_llama("Olmo2"),
    "cohere": _like_llama("Cohere", logit_scale=0.7),
    "cohere2": _like_llama("Cohere2", logit_scale=0.7, sliding_window=MAX_POSITIONS, layer_types=_MIXED),
    "granite": _like_llama("Granite", logits_scaling=2.0, residual_multiplier=0.5, embedding_multiplier=3.0),
    "smollm3": _like_llama("SmolLM3"),
    "stablelm": _like_llama(
        "StableLm",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ),
    "glm4": _like_llama("Glm4"),
    "deepseek_v3": _like_llama(
        "DeepseekV3",
        num_key_value_heads=N_HEADS,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=12,
        head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        moe_intermediate_size=48,
    ),
    "gpt_oss": _like_llama(
        "GptOss",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=MAX_POSITIONS,
        layer_types=_MIXED,
    ),
    "starcoder2": _like_llama("Starcoder2", sliding_window=MAX_POSITIONS),
    "mamba": _family("Mamba", gain=1.0, hidden_size=D_MODEL, num_hidden_layers=N_LAYERS, state_size=8),
}

SLIDING = ("mistral", "starcoder2", "gemma2", "gemma3", "cohere2", "gpt_oss")


_shared: dict[str, tuple[PreTrainedModel, int]] = {}


def _share(name: str, model: PreTrainedModel) -> PreTrainedModel:
    _shared[name] = model, _written(model)
    return model


def _written(model: PreTrainedModel) -> int:
    """Moves when a weight is written to, put in another's place or trained."""
    return hash(tuple((id(p), p._version, p.requires_grad) for p in model.parameters()))


def changed_models() -> list[str]:
    """The shared models that somebody has changed; they are forgotten, so that the next one who asks gets new ones."""
    changed = [
        name
        for name, (model, written) in _shared.items()
        if _written(model) != written or model.training or n_hooks(model)
    ]
    if changed:
        _shared.clear()
        build.cache_clear()
        sliding_family.cache_clear()
    return changed


@cache
def build(name: str) -> PreTrainedModel:
    """The shared model of a family; callers leave it as it is, which is checked after every test."""
    return _share(name, FAMILIES[name]())


@cache
def sliding_family(name: str, window: int) -> PreTrainedModel:
    """A family whose sliding layers see `window` positions; some layers stay full in mixed families."""
    if name not in SLIDING:
        raise KeyError(f"{name} has no sliding layers here; one of {', '.join(SLIDING)}")
    return _share(f"{name}, window {window}", FAMILIES[name](sliding_window=window))


@cache
def _trained_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_TOKENIZER_VOCAB,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT.split("\n"), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return str(tokenizer.to_str())


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A new byte-level BPE tokenizer of 376 tokens that adds BOS and can encode any text."""
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer()),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def n_hooks(model: torch.nn.Module) -> int:
    """How many hooks a model has beside those by which transformers collects hidden states, which stay for ever."""
    hooks = [
        hook
        for m in model.modules()
        for of in (m._forward_pre_hooks, m._forward_hooks)
        for hook in of.values()
    ]
    return sum(getattr(hook, "__module__", None) != CAPTURING for hook in hooks)
