"""Tokenizers of the SentencePiece kind, which put a space before a text, in each way that checkpoints do."""

from __future__ import annotations

from functools import cache
from typing import Any

from families import _TEXT
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

KINDS = ("always", "first", "prepend", "unigram", "prefix_space")
"""Metaspace before every piece of text or the first one, Llama's normalizer, Unigram, byte-level with a space."""

_EXTRA = " Anna met the old man. The dog met Anna. You are an assistant. <0x00>"
_SPECIAL = ["<unk>", "<s>", "</s>"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@cache
def _trained(kind: str) -> str:
    tokenizer = Tokenizer(models.Unigram() if kind == "unigram" else models.BPE(unk_token="<unk>"))
    if kind == "prefix_space":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
    elif kind == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        scheme: Any = "first" if kind == "first" else "always"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    if kind != "prefix_space":
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    lines = [*_TEXT.split("\n"), *[_EXTRA] * 8]
    if kind == "prepend":  # as SentencePiece, which learns from words: its models join none of them
        lines = [word for line in lines for word in line.split()]
    settings: dict[str, Any] = {"special_tokens": [*_SPECIAL, *_BYTES], "show_progress": False}
    if kind == "unigram":
        trainer: Any = trainers.UnigramTrainer(vocab_size=600, unk_token="<unk>", **settings)
    elif kind == "prefix_space":
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, **settings)
    else:
        trainer = trainers.BpeTrainer(vocab_size=700, **settings)
    tokenizer.train_from_iterator(lines, trainer)
    if isinstance(tokenizer.model, models.BPE) and kind != "prefix_space":
        tokenizer.model.byte_fallback = True
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return str(tokenizer.to_str())


def spaced_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A new tokenizer of one of ``KINDS`` that adds BOS."""
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(_trained(kind)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


@cache
def _trained_word_pieces() -> str:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    # Digits too, as every published vocabulary has them.
    lines = [*_TEXT.split("\n"), *[_EXTRA] * 8, *"0123456789"]
    trainer = trainers.WordPieceTrainer(vocab_size=360, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return str(tokenizer.to_str())


def word_piece_tokenizer() -> PreTrainedTokenizerFast:
    """A new tokenizer as BERT's, and some GPT-2s': ``##`` marks what goes on with a word, [CLS] and [SEP] surround."""
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(_trained_word_pieces()),
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        clean_up_tokenization_spaces=False,
    )
