"""Makes the sparse autoencoder of the bundled model, on texts that the model's own grammar generates.

python scripts/train_sae.py --out mechanex/bundled/saes/mx-tiny
"""

from __future__ import annotations

import argparse
import json
import logging
from itertools import islice
from pathlib import Path

import torch
from tiny import grammar

from mechanex.engine.models.resolve import load
from mechanex.engine.sae.train import train_sae
from mechanex.engine.sae.train_step import TrainingSettings

# The model's corpus is of seed 0, its held-out texts of 1,000,003.
SEED = 500_009


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=40_000)
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--k", type=int, default=24)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rule", default="topk")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--point", help="where; by default the residual stream two thirds of the way up")
    parser.add_argument("--checkpoint", type=Path, help="file from which a stopped run goes on")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(chosen.threads)
    loaded = load("mx-tiny", backend="transformers")
    texts = list(islice(grammar.documents(SEED), chosen.texts))
    settings = TrainingSettings(
        chosen.rule,
        n_features=chosen.features,
        k=chosen.k,
        steps=chosen.steps,
        batch=1024,
        buffer=1 << 16,
        lr=chosen.lr,
        dead_after=100_000,
    )
    trained = train_sae(
        loaded.model,
        texts,
        settings=settings,
        point=chosen.point,
        tokenizer=loaded.tokenizer,
        out=chosen.out,
        checkpoint=chosen.checkpoint,
        dtype=torch.float16,
        progress=True,
    )
    print(json.dumps(trained.report, indent=1))
    print(f"{sum(path.stat().st_size for path in chosen.out.iterdir()):,} bytes in {chosen.out}")


if __name__ == "__main__":
    main()
