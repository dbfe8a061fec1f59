"""Short model names, as TransformerLens users type them, and the Hub names that they stand for."""

from __future__ import annotations

__all__ = ["hub_name"]

# A short name is the last part of the Hub name, in any case.
PUBLISHED = {
    "EleutherAI": """pythia-14m pythia-31m pythia-70m pythia-160m pythia-410m pythia-1b pythia-1.4b
        pythia-2.8b pythia-6.9b pythia-12b pythia-70m-deduped pythia-160m-deduped
        pythia-410m-deduped pythia-1b-deduped pythia-1.4b-deduped pythia-2.8b-deduped
        pythia-6.9b-deduped pythia-12b-deduped
        gpt-neo-125M gpt-neo-1.3B gpt-neo-2.7B gpt-j-6B gpt-neox-20b""",
    "facebook": "opt-125m opt-1.3b opt-2.7b opt-6.7b opt-13b opt-30b opt-66b",
    "bigscience": "bloom-560m bloom-1b1 bloom-1b7 bloom-3b bloom-7b1",
    "google": """gemma-2b gemma-7b gemma-2b-it gemma-7b-it gemma-2-2b gemma-2-9b gemma-2-27b gemma-2-2b-it
        gemma-2-9b-it gemma-2-27b-it gemma-3-270m gemma-3-270m-it gemma-3-1b-pt gemma-3-1b-it gemma-3-4b-pt
        gemma-3-4b-it gemma-3-12b-pt gemma-3-12b-it gemma-3-27b-pt gemma-3-27b-it""",
    "meta-llama": """Llama-2-7b-hf Llama-2-13b-hf Llama-2-7b-chat-hf Llama-2-13b-chat-hf Meta-Llama-3-8B
        Meta-Llama-3-8B-Instruct Llama-3.1-8B Llama-3.1-8B-Instruct Llama-3.2-1B Llama-3.2-1B-Instruct
        Llama-3.2-3B Llama-3.2-3B-Instruct Llama-3.3-70B-Instruct""",
    "microsoft": "phi-1 phi-1_5 phi-2 phi-4",
    "openai": "gpt-oss-20b",
    "Qwen": """Qwen2-0.5B Qwen2-1.5B Qwen2-7B Qwen2-0.5B-Instruct Qwen2-1.5B-Instruct Qwen2-7B-Instruct
        Qwen2.5-0.5B Qwen2.5-1.5B Qwen2.5-3B Qwen2.5-7B Qwen2.5-14B Qwen2.5-0.5B-Instruct
        Qwen2.5-1.5B-Instruct Qwen2.5-3B-Instruct Qwen2.5-7B-Instruct Qwen2.5-14B-Instruct
        Qwen3-0.6B Qwen3-1.7B Qwen3-4B Qwen3-8B Qwen3-14B""",
}
OTHERS = {
    # These have no publisher in their name; listed so that they need no further look.
    **{name: name for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")},
    "gpt2-small": "gpt2",
    "distil-gpt2": "distilgpt2",
    "gpt-j": "EleutherAI/gpt-j-6B",
    "gpt-neo-small": "EleutherAI/gpt-neo-125M",
    "gpt-neox": "EleutherAI/gpt-neox-20b",
    "opt-small": "facebook/opt-125m",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.1",
    "phi-3": "microsoft/Phi-3-mini-4k-instruct",
    "tiny-stories-1m": "roneneldan/TinyStories-1M",
    "tiny-stories-33m": "roneneldan/TinyStories-33M",
}
SHORT = {n.lower(): f"{who}/{n}" for who, names in PUBLISHED.items() for n in names.split()} | OTHERS


def hub_name(name: str, *, ask_transformer_lens: bool = False) -> str:
    """The Hub name of a short name; any other name comes back as it is.

    Args:
        name: what the user typed.
        ask_transformer_lens: look in TransformerLens' own, longer table too. It must be installed.
    """
    if known := SHORT.get(name.lower()):
        return known
    if "/" in name or not ask_transformer_lens:
        return name
    from .lens import official_name

    return official_name(name) or name
