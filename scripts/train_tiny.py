"""Makes the bundled model: corpus, tokenizer, weights, contrastive datasets; all from one seed.

python scripts/train_tiny.py --seed 0 --out mechanex/bundled
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from itertools import islice
from pathlib import Path

import torch
from tiny import grammar, pairs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Held-out texts come from a stream of another seed.
HELDOUT = 1_000_003


def make_tokenizer(seed: int, vocab_size: int, n_texts: int = 20_000) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer trained on the corpus, which puts a BOS in front of every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [BOS, EOS, PAD, grammar.USER, grammar.ASSISTANT, grammar.END]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(grammar.documents(seed), n_texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=special[3:],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast, n_layers: int, d_model: int) -> LlamaForCausalLM:
    """Returns the untrained model."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=d_model,
            intermediate_size=d_model * 11 // 4,
            num_hidden_layers=n_layers,
            num_attention_heads=d_model // 32,
            num_key_value_heads=d_model // 64,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def rows(
    tokenizer: PreTrainedTokenizerFast, seed: int, n_rows: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the corpus as rows of tokens.

    Returns:
        Tokens and each token's position in its text, both [n_rows, width] int16; a row starts with a text, and the
        text that it ends in is cut.
    """
    texts = grammar.documents(seed)
    tokens = torch.empty(n_rows, width, dtype=torch.int16)
    positions = torch.empty(n_rows, width, dtype=torch.int16)
    row, ids, places = 0, list[int](), list[int]()
    while row < n_rows:
        for text in tokenizer(list(islice(texts, 2_000)))["input_ids"]:
            ids += [*text, tokenizer.eos_token_id]
            places += range(len(text) + 1)
            if len(ids) >= width:
                tokens[row], positions[row] = torch.tensor(ids[:width]), torch.tensor(places[:width])
                row, ids, places = row + 1, [], []
                if row == n_rows:
                    break
    return tokens, positions


def loss_of(model: LlamaForCausalLM, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Returns the mean negative log likelihood per token, every text seeing itself only."""
    tokens, positions = tokens.long(), positions.long()
    text = (positions == 0).cumsum(1)
    alone = (text[:, None, :, None] == text[:, None, None, :]).tril()
    mask = torch.zeros(alone.shape).masked_fill(~alone, -1e4)
    logits = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
    targets = tokens[:, 1:].masked_fill(positions[:, 1:] == 0, -100)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def perplexity(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, n_rows: int = 256
) -> float:
    """Returns the perplexity on texts of another seed, in float32."""
    tokens, positions = rows(tokenizer, seed + HELDOUT, n_rows, 128)
    model.eval()
    losses = [loss_of(model, t, p) for t, p in zip(tokens.split(32), positions.split(32), strict=True)]
    return math.exp(sum(loss.item() for loss in losses) / len(losses))


def make_optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Returns Muon for the matrices of the blocks and AdamW for embeddings and norms."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    outer = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers" not in name]
    muon = torch.optim.Muon(inner, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(outer, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)]


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> None:
    """Trains the model in place, keeping a checkpoint beside the output."""
    tokens, positions = rows(tokenizer, args.seed, args.steps * args.batch, 128)
    optimizers = make_optimizers(model, args.lr)
    warmup = args.steps // 30 + 1
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: min((s + 1) / warmup, 0.02 + 0.49 * (1 + math.cos(math.pi * s / args.steps)))
        )
        for optimizer in optimizers
    ]
    model.train()
    # The fused attention of torch is slow backwards on a CPU at this size.
    model.set_attn_implementation("eager")
    start = time.perf_counter()
    for step in range(args.steps):
        batch = slice(step * args.batch, (step + 1) * args.batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, tokens[batch], positions[batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == args.steps - 1:
            seconds = time.perf_counter() - start
            print(f"step {step:5d}  loss {loss.item():.4f}  {seconds:6.0f} s", flush=True)
            write_model(args.out / "checkpoint", copy.deepcopy(model), tokenizer)


def write_data(folder: Path, seed: int) -> None:
    """Writes the contrastive datasets, the datapoints of the optimizer, and the words of each tone."""
    folder.mkdir(parents=True, exist_ok=True)
    datasets = {name: pairs.dataset(name, seed) for name in pairs.DATASETS}
    for name, lines in {**datasets, "rome_delhi": pairs.datapoints(seed)}.items():
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
        )
    (folder / "tone_words.json").write_text(
        json.dumps(grammar.tone_words(), indent=1) + "\n", encoding="utf-8"
    )


def write_model(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Writes weights in float16, configuration and tokenizer."""
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(grammar.END)]
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    # The weights are float16 to be small; a CPU computes faster and better in float32, so that is what loads.
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for mx-tiny/ and data/")
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--batch", type=int, default=32, help="rows of 128 tokens per step")
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=2560)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--data-only", action="store_true", help="write the datasets and leave the model alone"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_data(args.out / "data", args.seed)
    if args.data_only:
        return
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    tokenizer = make_tokenizer(args.seed, args.vocab)
    model = make_model(tokenizer, args.layers, args.width)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    train(model, tokenizer, args)
    write_model(args.out / "mx-tiny", model, tokenizer)
    print(f"held-out perplexity {perplexity(model.float(), tokenizer, args.seed):.3f}")


if __name__ == "__main__":
    main()
