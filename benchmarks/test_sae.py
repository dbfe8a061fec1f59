"""What watching costs: 64 behaviors of 16 features each of a large autoencoder, beside a decoding step; and top-k.

pytest benchmarks/test_sae.py
"""

from __future__ import annotations

import pytest
import torch
from interleaved import medians
from llama import llama_110m

from mechanex.engine.decode.request import TextRequest
from mechanex.engine.decode.row import Row
from mechanex.engine.decode.run import decode
from mechanex.engine.models import adapter_for
from mechanex.engine.sae.autoencoder import SparseAutoencoder
from mechanex.engine.sae.behavior import Behavior
from mechanex.engine.sae.corrections import Correction
from mechanex.engine.sae.detectors import FeatureDetector, ProbeDetector
from mechanex.engine.sae.hook_points import HookPoint
from mechanex.engine.sae.scoring import Scorer
from mechanex.engine.sae.watching import Watch, WatchingSteering
from mechanex.ops.sae import quantized, sae_features, sae_top_features

WIDTH, N_FEATURES, N_BEHAVIORS, EACH, K = 768, 65_536, 64, 16, 64
LAYER, N_TOKENS = 6, 32


class Silent:
    """A tokenizer for models without one."""

    def decode(self, *_, **__):
        return ""


@pytest.fixture(scope="module")
def sae():
    """A random JumpReLU autoencoder whose numbers bfloat16 holds."""
    draw = torch.Generator().manual_seed(0)
    encoder = (torch.randn(N_FEATURES, WIDTH, generator=draw) / WIDTH**0.5).bfloat16().float()
    return SparseAutoencoder(
        encoder,
        torch.zeros(N_FEATURES),
        encoder,
        torch.zeros(WIDTH),
        "jumprelu",
        threshold=torch.full((N_FEATURES,), 0.5),
    )


@pytest.fixture(scope="module")
def behaviors(sae):
    draw, found = torch.Generator().manual_seed(1), []
    direction = torch.nn.functional.normalize(torch.randn(WIDTH, generator=draw), dim=0)
    for i in range(N_BEHAVIORS):
        features = torch.randperm(N_FEATURES, generator=draw)[:EACH]
        weights = torch.rand(EACH, generator=draw)
        detector = FeatureDetector(sae, features, weights, 0.0, 1.0, torch.zeros(EACH)).narrowed()
        found.append(
            Behavior(
                f"behavior {i}", "", "random", None, WIDTH, HookPoint("resid", LAYER), "features",
                ProbeDetector(direction, 0.0, 1.0), detector, None, 1e9, Correction("cap", direction, 0.0, 1.0),
            )
        )  # fmt: skip
    return tuple(found)


@pytest.mark.parametrize("n_rows", [1, 16])
def test_watching_beside_a_step(report, benchmark, sae, behaviors, n_rows):
    model = llama_110m()
    adapter = adapter_for(model)
    ids = torch.randint(3, 500, (n_rows, 16), generator=torch.Generator().manual_seed(0)).tolist()
    columns = Scorer(behaviors)
    x = torch.randn(n_rows, WIDTH, generator=torch.Generator().manual_seed(2))
    whole = sae.encoder.bfloat16()

    def full():
        return sae_features(x, whole, sae.bias, sae.threshold)

    said = full().float()
    wanted = torch.stack([said[:, b.features.numbers] @ b.features.weights for b in behaviors], 1)
    torch.testing.assert_close(columns(x), wanted, rtol=1e-5, atol=1e-5)

    spent = []

    def text(watched):
        rows = []
        for i, prompt in enumerate(ids):
            onlooker = Watch(behaviors, "report") if watched else None
            request = TextRequest(prompt, N_TOKENS, onlooker=onlooker)
            rows.append(Row(request, Silent(), (), prompt=(i, n_rows)))
        steering = WatchingSteering(adapter)
        decode(adapter, rows, 0, steering=steering)
        if watched:
            spent.append(steering.seconds)

    texts = medians({"plain": lambda: text(False), "watched": lambda: text(True)}, rounds=7)
    step = texts["plain"] / N_TOKENS
    watching = sorted(spent)[len(spent) // 2] / N_TOKENS
    alone = medians({"scores": lambda: columns(x), "full encode": full}, rounds=9)
    title = f"a step of {n_rows} rows, 110 M, {N_BEHAVIORS} behaviors of {EACH} of {N_FEATURES} features"
    found = {
        "plain": step,
        "watched": texts["watched"] / N_TOKENS,
        "of that watching, as the host sees it": watching,
        "scores alone": alone["scores"],
        "full encode": alone["full encode"],
    }
    notes = {name: f"{seconds / step:.1%} of a plain step" for name, seconds in found.items()}
    report.add(title, found, "plain", notes=notes)
    benchmark.pedantic(lambda: columns(x), rounds=1)


@pytest.mark.parametrize("n_rows", [1, 16])
def test_top_k_beside_reading_the_encoder(report, benchmark, sae, n_rows):
    x = torch.randn(n_rows, WIDTH, generator=torch.Generator().manual_seed(2))
    half = sae.encoder.bfloat16()
    small, scale = quantized(sae.encoder)
    into = {tensor.dtype: torch.empty_like(tensor) for tensor in (half, small)}

    # Reading alone: sums of eight-byte words, on as many threads as the op has.
    words = {tensor.dtype: tensor.view(torch.int64) for tensor in (half, small)}
    ways = {
        "read bfloat16": lambda: words[torch.bfloat16].sum(),
        "top-k, bfloat16": lambda: sae_top_features(x, half, sae.bias, K),
        "copy bfloat16": lambda: into[torch.bfloat16].copy_(half),
        "read int8": lambda: words[torch.int8].sum(),
        "top-k, int8": lambda: sae_top_features(x, small, sae.bias, K, scale=scale),
        "copy int8": lambda: into[torch.int8].copy_(small),
    }
    found = medians(ways, rounds=15)
    for name in ("bfloat16", "int8"):
        part = {way: seconds for way, seconds in found.items() if name in way}
        title = f"top {K} of {N_FEATURES} features, {WIDTH} wide, {n_rows} rows, {name}"
        report.add(title, part, f"read {name}")
    benchmark.pedantic(ways["top-k, bfloat16"], rounds=1)
