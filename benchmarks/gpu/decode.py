"""Times decoding on the GPU: a random bfloat16 Llama of 1.2 B, beside transformers' ``generate``. Run by ``run.sh``.

Sections: first (the first request after loading), exact (the same tokens as eager runs), pace (steps a second),
captures (changed steering captures nothing), watched (64 behaviors of an autoencoder), served (the server's model
thread), compiled (transformers' compiled static cache, which takes most of the time).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from captures import Captures
from decode_model import (
    Letters,
    Pace,
    clamps,
    forget_compiled,
    llama,
    ours,
    prompts,
    synchronize,
    theirs,
)
from record import Record, arguments, has_device
from served import RequestOf, clients, first_token, scheduled
from transformers import LlamaForCausalLM

from mechanex.engine.capabilities.decoding import form
from mechanex.engine.decode.decoder import Decoder
from mechanex.engine.decode.request import Steer, TextRequest
from mechanex.engine.decode.row import Row
from mechanex.engine.hooks import Intervention, SteeringPlan
from mechanex.engine.intervention import Edit
from mechanex.engine.models import adapter_for
from mechanex.engine.models.adapter import exclusive, undisturbed
from mechanex.engine.sae.autoencoder import SparseAutoencoder
from mechanex.engine.sae.behavior import Behavior
from mechanex.engine.sae.corrections import Correction
from mechanex.engine.sae.detectors import FeatureDetector, ProbeDetector
from mechanex.engine.sae.hook_points import HookPoint
from mechanex.server.model.requests import TextRequest as Asked

SECTIONS = ("first", "exact", "pace", "captures", "watched", "served", "compiled")
# The decoder's window of tokens: long enough for a rate, short enough for one bucket of columns.
N_TOKENS, N_EAGER = 96, 16


class Bench:
    """The models and what was found so far.

    Args:
        options: as parsed.
        record: where rows go.
    """

    def __init__(self, options: argparse.Namespace, record: Record) -> None:
        self.record, self.options = record, options
        self.rows: list[int] = options.rows
        self.rounds = 2 if options.quick else 5
        self.n_tokens = 12 if options.tiny else 48 if options.quick else N_TOKENS
        self.begun = time.monotonic()
        self.plain: dict[int, float] = {}
        begun = time.perf_counter()
        dtype = torch.float32 if options.tiny else torch.bfloat16
        size = (64, 2, 500, 4) if options.tiny else (2048, 16, 128256, 32)
        self.model = llama(options.device, dtype, *size)
        synchronize(self.model.device)
        self.vocab, self.width = size[2], size[0]
        self.n_bytes = sum(p.nbytes for p in self.model.parameters())
        record.add(
            "making the model", time.perf_counter() - begun, "s", note=f"{self.n_bytes / 2**30:.2f} GiB"
        )
        self.adapter = adapter_for(self.model)

    def first(self) -> None:
        """The first request of the process."""
        pace = ours(self.adapter, prompts(1, self.vocab, 1), 4, clamps(self.width))
        self.record.add(
            "first request after loading: to its first token, every layer steered", pace.first, "s", most=3
        )
        self.record.add("first request after loading: all of its 4 tokens", pace.whole, "s")

    def pace(self) -> None:
        """Plain and steered steps a second."""
        for n in self.rows:
            given = prompts(n, self.vocab)
            edits = clamps(self.width)
            begun = time.perf_counter()
            with Captures() as first:
                ours(self.adapter, given, self.n_tokens)
                ours(self.adapter, given, self.n_tokens, edits)
            warm = time.perf_counter() - begun
            found: dict[str, list[Pace]] = {"plain": [], "steered": []}
            with Captures() as again:
                for _ in range(self.rounds):
                    found["plain"].append(ours(self.adapter, given, self.n_tokens))
                    found["steered"].append(ours(self.adapter, given, self.n_tokens, edits))
            rates = {way: statistics.median(p.rate for p in paces) for way, paces in found.items()}
            self.plain[n] = rates["plain"]
            whole = statistics.median(p.whole for p in found["plain"])
            n_steps = 2 * self.rounds * (self.n_tokens - 1)
            self.record.add(
                f"{n} rows: ours, plain",
                rates["plain"],
                "steps/s",
                note=f"whole call {whole * 1e3:.1f} ms; weights at {self.n_bytes * rates['plain'] / 1e12:.2f} TB/s",
            )
            self.record.add(
                f"{n} rows: ours, every layer clamped, eight ways by row, against plain",
                rates["steered"] / rates["plain"],
                least=0.97,
                note=f"{rates['steered']:.4g} steps/s",
            )
            self.record.add(
                f"{n} rows: graphs captured again by equal calls",
                again.captured,
                most=0,
                note=f"first calls captured {first.captured} and took {warm:.2f} s; "
                f"{again.replayed / n_steps:.2f} replays a step",
            )

    def captures(self) -> None:
        """Other vectors and strengths, in another request and in the middle of a batch."""
        given = prompts(8, self.vocab)
        ours(self.adapter, given, 24, clamps(self.width))
        with Captures() as found:
            for seed in (1, 2, 3):
                ours(self.adapter, given, 24, clamps(self.width, seed, value=1.0 + seed))
        self.record.add(
            "graphs captured by requests with other vectors and strengths", found.captured, most=0
        )
        self._relay(0)
        with Captures() as found:
            self._relay(10)
        self.record.add("graphs captured by rows that join with other vectors", found.captured, most=0)

    def watched(self) -> None:
        """Rows that are watched for 64 behaviors of 16 features each, of an autoencoder of 65,536, at one layer."""
        behaviors = self._behaviors(4096 if self.options.tiny else 65_536)
        for n in self.rows:
            given = prompts(n, self.vocab)
            with Captures() as first:
                ours(self.adapter, given, self.n_tokens)
                ours(self.adapter, given, self.n_tokens, behaviors=behaviors)
            rates: dict[bool, list[float]] = {False: [], True: []}
            with Captures() as again:
                for _ in range(self.rounds):
                    for watched in rates:
                        used = behaviors if watched else ()
                        rates[watched].append(ours(self.adapter, given, self.n_tokens, behaviors=used).rate)
            plain, seen = (statistics.median(rates[watched]) for watched in (False, True))
            self.record.add(
                f"{n} rows: ours, 64 behaviors watched, against plain",
                seen / plain,
                least=0.98,
                note=f"{seen:.4g} steps/s; first calls captured {first.captured}, equal calls {again.captured}",
            )

    def _behaviors(self, n_features: int) -> tuple[Behavior, ...]:
        draw, device = torch.Generator().manual_seed(0), self.model.device
        encoder = (torch.randn(n_features, self.width, generator=draw) / self.width**0.5).to(device)
        zeros = torch.zeros(self.width, device=device)
        thresholds = torch.full((n_features,), 0.5, device=device)
        sae = SparseAutoencoder(
            encoder, torch.zeros(n_features, device=device), encoder, zeros, "jumprelu", threshold=thresholds
        )
        direction = torch.nn.functional.normalize(torch.randn(self.width, generator=draw), dim=0)
        found = []
        for i in range(64):
            features = torch.randperm(n_features, generator=draw)[:16]
            detector = FeatureDetector(sae, features, torch.ones(16), 0.0, 1.0, torch.zeros(16)).narrowed()
            found.append(
                Behavior(
                    f"b{i}", "", "random", None, self.width, HookPoint("resid", self.adapter.n_layers // 2),
                    "features", ProbeDetector(direction, 0.0, 1.0), detector, None, 1e9,
                    Correction("cap", direction, 0.0, 1.0),
                )
            )  # fmt: skip
        return tuple(found)

    @torch.no_grad()
    def _relay(self, seed: int) -> None:
        """Eight steered rows, four of which are replaced by others with other vectors after some steps."""
        adapter = self.adapter

        def rows(n: int, seed: int) -> list[Row]:
            edits = clamps(self.width, seed)
            return [
                Row(
                    TextRequest(ids, 64, steering=tuple(Steer(k, edits[i]) for k in range(adapter.n_layers))),
                    Letters(),
                    (),
                    prompt=(i, n),
                )
                for i, ids in enumerate(prompts(n, self.vocab, seed))
            ]

        with exclusive(adapter), undisturbed(adapter.hf_model):
            decoder = Decoder(adapter, 0, form=form(adapter, 8))
            try:
                for n, off in ((8, 0), (4, 1)):
                    reading = decoder.read(rows(n, seed + off))
                    while not decoder.advance(reading):
                        pass
                    decoder.join(reading)
                    for _ in range(6):
                        decoder.step()
                    decoder.catch_up()
                    decoder.drop(decoder.rows[:4])
            finally:
                decoder.close()

    def exact(self) -> None:
        """Tokens against eager runs of each row alone, in float32; near ties in bfloat16."""
        size = (64, 2, 500, 4) if self.options.tiny else (512, 8, 32000, 8)
        n_rows, n_tokens = (4, 8) if self.options.tiny else (16, 32)
        given = prompts(n_rows, size[2], 5, (5, 20, 9, 13, 7))
        edits = clamps(size[0], 3)
        model = llama(self.options.device, torch.float32, *size)
        for name, used in (("plain", []), ("steered", edits)):
            found = ours(adapter_for(model), given, n_tokens, used).tokens
            alone = self._alone(model, given, n_tokens, used)
            same = sum(a == b for a, b in zip(found, alone, strict=True))
            self.record.add(
                f"float32, {name}: rows with the tokens of eager runs alone, of {n_rows}", same, least=n_rows
            )
        half = llama(self.options.device, torch.bfloat16, *size)
        half.load_state_dict(model.state_dict())
        found = ours(adapter_for(half), given, n_tokens).tokens
        alone = self._alone(half, given, n_tokens, [])
        differing, beyond = 0, 0
        for ids, a, b in zip(given, found, alone, strict=True):
            if a != b:
                differing += 1
                k = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
                beyond += not _near_tie(model, half, [*ids, *a[:k]], a[k], b[k])
        self.record.add(
            f"bfloat16: rows that leave the eager run where there is no near tie, of {n_rows}",
            beyond,
            most=0,
            note=f"{differing} leave it",
        )

    @staticmethod
    def _alone(
        model: LlamaForCausalLM, given: Sequence[Sequence[int]], n: int, edits: Sequence[Edit]
    ) -> list[list[int]]:
        found = []
        for i, ids in enumerate(given):
            layers = range(model.config.num_hidden_layers) if edits else ()
            with SteeringPlan([Intervention(k, edits[i % len(edits)]) for k in layers]).apply(model):
                found += theirs(model, [ids], n).tokens
        return found

    def served(self) -> None:
        """The server's model thread against the decoder on the same requests."""
        n_tokens, each = (8, 1) if self.options.tiny else (64, 2 if self.options.quick else 3)
        asyncio.run(self._served(n_tokens, each))

    async def _served(self, n_tokens: int, each: int) -> None:
        adapter, edits = self.adapter, clamps(self.width)

        def asked(steered: bool, stream: bool, seed: int) -> RequestOf:
            def request(i: int, k: int) -> Asked:
                layers = range(adapter.n_layers) if steered else ()
                steering = tuple(Steer(layer, edits[i % 8]) for layer in layers)
                ids = prompts(1, self.vocab, seed + 1000 * k + i)[0]
                return Asked(ids, n_tokens, steering=steering, stream=stream)

            return request

        decoder: dict[tuple[int, bool], float] = {}
        for n in (64, 1):
            for steered in (False, True):
                used = edits if steered else []
                ours(adapter, prompts(n, self.vocab), n_tokens, used)
                times = [ours(adapter, prompts(n, self.vocab, s), n_tokens, used).whole for s in range(each)]
                decoder[n, steered] = n * n_tokens / statistics.median(times)
        begun = time.perf_counter()
        async with scheduled(adapter) as scheduler:
            ready = time.perf_counter() - begun
            seconds = await first_token(scheduler, asked(True, True, 7)(0, 0))
            self.record.add(
                "server's model thread: start, and its first request to the first token", ready + seconds, "s"
            )
            seed = 10_000
            for n, least in ((64, 0.8), (1, 0.9)):
                await clients(scheduler, n, 1, asked(True, True, seed))
                for steered in (False, True):
                    for stream in (False, True):
                        seed += 10_000
                        rate = await clients(scheduler, n, each, asked(steered, stream, seed))
                        what = "steered eight ways" if steered else "plain"
                        what += ", streamed" if stream else ", whole answers"
                        self.record.add(
                            f"{n} client{'s' if n > 1 else ''}, {what}: model thread without HTTP, against the decoder",
                            rate / decoder[n, steered],
                            least=least,
                            note=f"{rate:.0f} tokens/s; decoder {decoder[n, steered]:.0f}",
                        )

    def compiled(self) -> None:
        """transformers' own: eager and its compiled static cache; our plain decoding against them."""
        for n in self.rows:
            given = prompts(n, self.vocab)
            theirs(self.model, given, 4)
            pace = theirs(self.model, given, N_EAGER if not self.options.tiny else 4)
            self._against(n, "eager", pace.rate, None)
        for n in self.rows:
            spent = time.monotonic() - self.begun
            if spent > self.options.budget:
                self.record.add(
                    f"{n} rows: transformers, static cache compiled",
                    None,
                    note=f"left out after {spent:.0f} s",
                )
                continue
            given = prompts(n, self.vocab)
            forget_compiled(self.model)
            warm = theirs(self.model, given, self.n_tokens, "static")
            rounds = [theirs(self.model, given, self.n_tokens, "static") for _ in range(self.rounds)]
            rate = statistics.median(pace.rate for pace in rounds)
            self._against(
                n,
                "static cache compiled",
                rate,
                1.0,
                f"first token {warm.first:.2f} s, first call {warm.whole:.1f} s",
            )
        forget_compiled(self.model)

    def _against(self, n: int, how: str, rate: float, least: float | None, note: str = "") -> None:
        self.record.add(f"{n} rows: transformers, {how}", rate, "steps/s", note=note)
        if n in self.plain:
            self.record.add(
                f"{n} rows: ours, plain, against transformers, {how}", self.plain[n] / rate, least=least
            )


def _near_tie(
    wide: LlamaForCausalLM, half: LlamaForCausalLM, ids: Sequence[int], one: int, other: int
) -> bool:
    """Whether two tokens' logits lie within the rounding of the half type, as the float32 model shows it here."""
    with torch.no_grad():
        text = torch.tensor([list(ids)], device=wide.device)
        exact = wide(text).logits[0, -1]
        rounded = half(text).logits[0, -1].float()
    return bool((exact[one] - exact[other]).abs() <= 2 * (exact - rounded).abs().max())


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], default=[1, 16, 128])
    parser.add_argument("--quick", action="store_true", help="fewer tokens and rounds")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which of them, in order")
    parser.add_argument(
        "--budget", type=float, default=150, help="seconds after which nothing more is compiled"
    )
    options = parser.parse_args()
    wanted = options.sections.split(",")
    if unknown := set(wanted).difference(SECTIONS):
        parser.error(f"unknown sections {', '.join(sorted(unknown))}: choose from {', '.join(SECTIONS)}")
    if not has_device(options):
        return 0
    torch.set_float32_matmul_precision("highest")
    bench = Bench(options, Record("decode", options))
    status = 0
    for section in wanted:
        begun = time.monotonic()
        try:
            getattr(bench, section)()
        except Exception as error:  # the other sections are worth their time all the same
            status = 1
            bench.record.add(section, None, note=f"failed: {type(error).__name__}: {error}".splitlines()[0])
            sys.excepthook(type(error), error, error.__traceback__)
        gc.collect()
        sys.stdout.write(f"  ({section}: {time.monotonic() - begun:.1f} s)\n")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
