"""Times the engine's work on the GPU: an optimization step beside what its bytes and products alone take, several
such steps together beside one after another, scoring and extraction beside padded batches. Run by ``run.sh``.

Random bfloat16 Llamas: one of 1.2 B for all of it, one of 8 B for a step. Sections: step, jobs, score, extract. A note
tells what bounds a call: the host, where the call takes about as long to return as until the device is done.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clock import call_seconds, device_seconds
from decode_model import llama, synchronize
from plain import one_by_one, padded, padded_means
from record import Record, arguments, has_device
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mechanex.engine.caa import caa_vectors
from mechanex.engine.models.adapter import undisturbed
from mechanex.engine.optimize.objective import plain_sum
from mechanex.engine.optimize.passes import Passes
from mechanex.engine.optimize.problem import OptimizationJob
from mechanex.engine.optimize.settings import OptimizeSettings
from mechanex.engine.score import completion_logprobs
from mechanex.utils.optimization import TrainingDatapoint

SECTIONS = ("step", "jobs", "score", "extract")
# Width, layers, vocabulary, heads; the layer that is steered.
MODELS = {"1.2 B": ((2048, 16, 128256, 32), 8), "8 B": ((4096, 32, 128256, 32), 8)}
TINY = {"tiny": ((64, 4, 500, 4), 2)}
FLOOR, TOGETHER, PADDED, EXTRACTED = 1.5, 2.0, 2.5, 4.0


class Bench:
    """The sections on one device.

    Args:
        record: where rows go.
        device: ``"cuda"`` or ``"cpu"``.
        tiny: sizes for trying the script.
    """

    def __init__(self, record: Record, device: str, tiny: bool) -> None:
        self.record, self.device, self.tiny = record, device, tiny
        self.models = TINY if tiny else MODELS
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.draw = torch.Generator().manual_seed(1)
        self.copy_rate, self.product_rate = self._rates()

    def _rates(self) -> tuple[float, float]:
        """Bytes read and written a second by a copy, and operations a second of a product."""
        n = 64 if self.tiny else 8192
        x = torch.randn(n, n, device=self.device, dtype=self.dtype)
        found = device_seconds({"copy": [x.clone] * 4, "product": [partial(torch.mm, x, x)] * 4}, 5)
        return 2 * x.nbytes / found["copy"], 2 * n**3 / found["product"]

    def _ids(self, mean: int, spread: int) -> list[int]:
        n = int(torch.randint(mean - spread, mean + spread + 1, (), generator=self.draw))
        return torch.randint(3, 500, (n,), generator=self.draw).tolist()

    def _model(self, name: str) -> nn.Module:
        return llama(self.device, self.dtype, *self.models[name][0])

    def step(self) -> None:
        """A step of 8 datapoints with a completion to promote and one to suppress each."""
        data = self._data()
        for name, (size, layer) in self.models.items():
            model = self._model(name)
            job = OptimizationJob(model, data, layer, OptimizeSettings(seed=0))
            with undisturbed(model), Passes(job.adapter, [job.layers], 4096) as passes:
                request = job.request(job.start(), plain_sum)
                begun = time.perf_counter()
                passes.run([request])
                first = time.perf_counter() - begun
                seconds = _median(partial(passes.run, [request]), 2 if self.tiny else 20)
                packs = [one.pack for one in passes.layout(request.spec).packs]
            tokens, scored = (sum(t.numel() for t in found) for found in _sizes(packs))
            blocks = sum(p.numel() for block in job.adapter.layers[layer:] for p in block.parameters())
            unembedding = size[0] * size[2]
            n_bytes = 2 * (blocks + unembedding) * self.dtype.itemsize
            operations = 4 * (tokens * blocks + scored * unembedding)
            by_bytes, by_operations = n_bytes / self.copy_rate, operations / self.product_rate
            self.record.add(
                f"optimization step, 8 x (1 + 1), layer {layer} of {size[1]}, {name}: times what it can't do without",
                seconds / max(by_bytes, by_operations),
                most=FLOOR,
                note=f"{seconds * 1e3:.2f} ms; bytes {by_bytes * 1e3:.2f} ms, products {by_operations * 1e3:.2f} ms; "
                f"{tokens} tokens, {scored} scored; first step {first:.1f} s",
            )
            del model, job, passes, request
            _free()

    def jobs(self) -> None:
        """A step of four jobs over other data each, at three layers, in one pass."""
        name, (size, layer) = next(iter(self.models.items()))
        model = self._model(name)
        layers = (layer // 2, layer, layer, layer + layer // 2)
        made = [
            OptimizationJob(model, self._data(), n, OptimizeSettings(seed=i)) for i, n in enumerate(layers)
        ]
        with undisturbed(model), Passes(made[0].adapter, [job.layers for job in made], 4096) as passes:
            passes.prepare([job.spec for job in made])
            requests = [job.request(job.start(), plain_sum) for job in made]
            ways: dict[str, Callable[[], object]] = {
                "together": lambda: passes.run(requests),
                "one after another": lambda: [passes.run([request]) for request in requests],
            }
            found = self._in_turn(ways)
            note = self._notes(found, ways, model)
        self.record.add(
            f"optimization step of 4 jobs, layers {layers} of {size[1]}, {name}: times as fast as one after another",
            found["one after another"] / found["together"],
            least=TOGETHER,
            note=note,
        )

    def score(self) -> None:
        """128 completions: 8 prompts of 16."""
        model = self._model(next(iter(self.models)))
        prompts = [self._ids(90, 20) for _ in range(8)]
        completions = [[self._ids(6, 3) for _ in range(16)] for _ in prompts]
        flat = [p for p in prompts for _ in range(16)], [c for row in completions for c in row]
        ways: dict[str, Callable[[], object]] = {
            "ours": lambda: completion_logprobs(model, *flat),
            "padded": lambda: padded(model, prompts, completions, batch_size=128),
            "one by one": lambda: one_by_one(model, prompts, completions),
        }
        found = self._in_turn(ways)
        note = self._notes(found, ways, model)
        what = "scoring 128 pairs, 1.2 B: times as fast as"
        self.record.add(f"{what} a padded batch", found["padded"] / found["ours"], least=PADDED, note=note)
        self.record.add(f"{what} one by one", found["one by one"] / found["ours"])

    def extract(self) -> None:
        """CAA over 256 pairs at every layer."""
        model = self._model(next(iter(self.models)))
        n = 8 if self.tiny else 256
        prompts = [self._ids(30, 8) for _ in range(n)]
        sides = [[self._ids(8, 3) for _ in range(n)] for _ in range(2)]
        layers = range(model.config.num_hidden_layers)
        ways: dict[str, Callable[[], object]] = {
            "ours": lambda: caa_vectors(model, prompts, *sides, layers=layers),
            "padded": lambda: padded_means(model, prompts, *sides),
        }
        found = self._in_turn(ways)
        note = self._notes(found, ways, model)
        self.record.add(
            f"CAA, {n} pairs, all layers, 1.2 B: times as fast as padded batches of 32",
            found["padded"] / found["ours"],
            least=EXTRACTED,
            note=note,
        )

    def _data(self) -> list[TrainingDatapoint]:
        return [TrainingDatapoint(self._ids(12, 3), [self._ids(4, 1)], [self._ids(4, 1)]) for _ in range(8)]

    def _notes(self, found: dict[str, float], ways: dict[str, Callable[[], object]], model: nn.Module) -> str:
        """What each way takes, and what of it the host and the device do; what launching one pass takes the host."""
        few = torch.tensor([self._ids(4, 0)], device=self.device)

        def one_pass() -> None:
            with torch.no_grad():
                model(few, use_cache=False)

        parts = [f"a pass of 4 tokens {self._host_seconds(one_pass) * 1e3:.1f} ms of the host"]
        for name, run in ways.items():
            host, (n, busy) = self._host_seconds(run), _kernels(run)
            parts.append(
                f"{name} {found[name] * 1e3:.1f} ms (returns after {host * 1e3:.1f}; {n} kernels, device busy "
                f"{busy * 1e3:.1f})"
            )
        return "; ".join(parts)

    def _host_seconds(self, run: Callable[[], object]) -> float:
        """Seconds until a call returns, with nothing before it on the device."""
        run()
        synchronize(torch.device(self.device))
        begun = time.perf_counter()
        run()
        taken = time.perf_counter() - begun
        synchronize(torch.device(self.device))
        return taken

    def _in_turn(self, ways: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Median seconds of each, to the end of its work on the device, the ways taking turns."""

        def waiting(run: Callable[[], object]) -> Callable[[], object]:
            def call() -> None:
                run()
                synchronize(torch.device(self.device))

            return call

        return call_seconds({name: waiting(run) for name, run in ways.items()}, 1 if self.tiny else 3, 1)


def _kernels(run: Callable[[], object]) -> tuple[int, float]:
    """Kernels and copies of a call, and seconds that the device spends on them; none without a GPU."""
    if not torch.cuda.is_available():
        return 0, 0.0
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    on_device = [event for event in seen.events() if event.device_type == DeviceType.CUDA]
    return len(on_device), sum(event.time_range.elapsed_us() for event in on_device) / 1e6


def _sizes(packs: list) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [pack.input_ids for pack in packs], [pack.target for pack in packs]


def _median(run: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which of them, in order")
    options = parser.parse_args()
    wanted = options.sections.split(",")
    if unknown := set(wanted).difference(SECTIONS):
        parser.error(f"unknown sections {', '.join(sorted(unknown))}: choose from {', '.join(SECTIONS)}")
    if not has_device(options):
        return 0
    bench = Bench(Record("work", options), options.device, options.tiny)
    status = 0
    for section in wanted:
        try:
            getattr(bench, section)()
        except Exception as error:  # the other sections are worth their time all the same
            status = 1
            bench.record.add(section, None, note=f"failed: {type(error).__name__}: {error}".splitlines()[0])
            sys.excepthook(type(error), error, error.__traceback__)
        _free()
    return status


if __name__ == "__main__":
    raise SystemExit(main())
