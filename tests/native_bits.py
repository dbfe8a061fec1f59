"""Prints, for every instruction set, a digest of the bits that the compiled CPU kernels give on the op table.

Two builds of one source must print the same: what a request gets may not depend on the compiler. Run by
``scripts/second_compiler.sh``.
"""

from __future__ import annotations

import hashlib

import torch
from optable import (
    CASES,
    DTYPES,
    ENCODERS,
    LOGPROB_CASES,
    MANY_CASES,
    SAE_CASES,
    TOP_CASES,
    SteerCase,
    with_edits,
    with_head,
)
from torch import Tensor

from mechanex.backends import native
from mechanex.backends.native import modules

# Ranks and widths at which groups of sums, vectors and rows end.
MORE = [SteerCase(13, width, n_edits=2, rank=rank, rows="mixed") for width in (47, 256) for rank in (4, 6, 7)]


def results() -> list[Tensor]:
    """What the kernels make of every case."""
    found = []
    for dtype in DTYPES:
        found += [native.steer(*case.make(dtype)) for case in (*CASES, *MORE)]
        found += [native.steer_many(*with_edits(case.make(dtype))) for case in MANY_CASES]
        for case in LOGPROB_CASES:
            args = with_head(case.make(dtype))
            found += [*native.LOGPROB.run(*args), *native.LOGPROB.with_slope(*args)]
    for encoder in ENCODERS:
        found += [native.sae_features(*case.encoder(torch.float32, encoder)) for case in SAE_CASES]
        for case in TOP_CASES:
            found += native.sae_top_features(*case.encoder(torch.float32, encoder), case.k, case.signed)
    return found


def main() -> None:
    torch.set_num_threads(1)
    for level in native.levels():
        modules.cpu().select_level(level)
        digest = hashlib.sha256()
        for tensor in results():
            # NaN of any payload counts as one.
            digest.update(tensor.double().nan_to_num(nan=0.5).contiguous().numpy().tobytes())
        print(level, digest.hexdigest())


if __name__ == "__main__":
    main()
