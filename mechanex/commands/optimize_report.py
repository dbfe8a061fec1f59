"""``mechanex optimize``: what a vector does on held-out prompts, the loss curve, and the page printed at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor, nn

from ..engine.doses.written import write
from ..engine.hooks import Intervention
from ..engine.intervention import Edit
from ..engine.models import adapter_for
from ..engine.optimize.datapoints import Side, TrainingDatapoint
from ..engine.positions import TokenSelector
from ..engine.sampling import Options
from ..engine.score import completion_logprobs
from ..engine.text import encode_pair, encode_prompt, prompt_text
from ..extras import install_line
from .console import console, exp, model_text

__all__ = ["Figures", "Scored", "measure", "print_report", "save_curve", "side_by_side"]

_PROMPTS, _TOKENS = 3, 40  # of texts that are shown


@dataclass(frozen=True)
class Scored:
    """One completion of a held-out prompt, without and with the vector.

    Attributes:
        prompt, completion: as given.
        side: "dst" (promoted) or "src" (suppressed).
        before, after: natural log-probability of the completion.
        likeliest_before, likeliest: whether each of its tokens was the likeliest one after those before it, so that
            greedy decoding writes the completion.
    """

    prompt: Any
    completion: str
    side: Side
    before: float
    after: float
    likeliest_before: bool
    likeliest: bool


@dataclass(frozen=True)
class Figures:
    """What a vector does to the completions of held-out prompts."""

    scored: list[Scored]

    def of(self, side: Side) -> list[Scored]:
        """The completions of one side."""
        return [one for one in self.scored if one.side == side]

    def share(self, side: Side, *, steered: bool = True) -> float:
        """Share of a side's completions that are what the model would write."""
        found = self.of(side)
        return sum(one.likeliest if steered else one.likeliest_before for one in found) / len(found)

    def change(self, side: Side) -> float:
        """Geometric mean of the factors by which probabilities changed."""
        found = self.of(side)
        return exp(sum(one.after - one.before for one in found) / len(found))

    def summary(self) -> dict[str, Any]:
        """The figures of each side that has completions."""
        return {
            side: {
                "completions": len(self.of(side)),
                "likeliest_before": self.share(side, steered=False),
                "likeliest": self.share(side),
                "factor": self.change(side),
                "smallest_factor": exp(min(one.after - one.before for one in self.of(side))),
                "largest_factor": exp(max(one.after - one.before for one in self.of(side))),
            }
            for side in ("dst", "src")
            if self.of(side)
        }

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**self.summary(), "completions": [asdict(one) for one in self.scored]}


def measure(
    model: nn.Module,
    tokenizer: Any,
    datapoints: Sequence[TrainingDatapoint],
    vector: Mapping[int, Tensor],
    *,
    only_prompt: bool = False,
) -> Figures:
    """Scores the completions of held-out datapoints without and with a vector, each steered as it asks for.

    Args:
        model: a Hugging Face model.
        tokenizer: its tokenizer.
        datapoints: prompts with completions.
        vector: ``{layer: [d_model]}``, added there.
        only_prompt: steer the prompts' tokens only.
    """
    sides: tuple[Side, ...] = ("dst", "src")
    steered_alike: dict[tuple[str, bool], list[tuple[TokenSelector, Any, str, Side]]] = {}
    for datapoint in datapoints:
        for side in sides:
            for text in datapoint.completions(side):
                tokens = datapoint.token
                if only_prompt:
                    tokens = _within(tokens, len(encode_pair(tokenizer, datapoint.prompt, text)[0]))
                key = (repr(tokens), datapoint.is_negative)
                steered_alike.setdefault(key, []).append((tokens, datapoint.prompt, text, side))
    scored: list[Scored] = []
    for (_, is_negative), group in steered_alike.items():
        sign = -1 if is_negative else 1
        edits = [Intervention(layer, Edit.add(sign * v), tokens=group[0][0]) for layer, v in vector.items()]
        _, prompts, completions, kinds = (list(column) for column in zip(*group, strict=True))
        before = completion_logprobs(model, prompts, completions, tokenizer, greedy=True)
        after = completion_logprobs(model, prompts, completions, tokenizer, edits=edits, greedy=True)
        assert before.greedy is not None and after.greedy is not None
        scored += [
            Scored(prompt, completion, side, float(p), float(q), bool(was.all()), bool(now.all()))
            for prompt, completion, side, p, q, was, now in zip(
                prompts, completions, kinds, before.sums, after.sums, before.greedy, after.greedy, strict=True
            )
        ]
    return Figures(scored)


def side_by_side(
    model: nn.Module,
    tokenizer: Any,
    datapoints: Sequence[TrainingDatapoint],
    vector: Mapping[int, Tensor],
    *,
    only_prompt: bool = False,
) -> list[dict[str, str]]:
    """What the model writes after a few of the prompts without and with a vector, drawn with the same seed.

    Args:
        model, tokenizer, datapoints, vector, only_prompt: as for :func:`measure`.

    Returns:
        ``prompt``, ``plain`` and ``steered`` of each; the first prompts that differ.
    """
    adapter = adapter_for(model)
    found: dict[str, dict[str, str]] = {}
    for datapoint in datapoints:
        text = prompt_text(tokenizer, datapoint.prompt)
        if text in found or len(found) == _PROMPTS:
            continue
        tokens = datapoint.token
        if only_prompt:
            tokens = _within(tokens, len(encode_prompt(tokenizer, datapoint.prompt)))
        sign = -1 if datapoint.is_negative else 1
        edits = tuple(Intervention(layer, Edit.add(sign * v), tokens=tokens) for layer, v in vector.items())
        options = Options(max_tokens=_TOKENS, seed=0)
        ((plain,), (steered,)) = write(adapter, tokenizer, [datapoint.prompt], [(), edits], options)
        found[text] = {"prompt": text, "plain": plain.text, "steered": steered.text}
    return list(found.values())


def _within(tokens: TokenSelector, n_prompt: int) -> TokenSelector:
    """The selected positions that lie in a prompt of ``n_prompt`` tokens."""
    if tokens is None:
        return slice(0, n_prompt)
    if isinstance(tokens, slice):
        return slice(*tokens.indices(n_prompt))
    position = tokens if tokens >= 0 else n_prompt + tokens
    return position if 0 <= position < n_prompt else slice(0, 0)


def save_curve(losses: Sequence[float], path: Path) -> Path | None:
    """Draws the loss after each step; None where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    axes.plot(range(len(losses)), losses, color="#2e86ab")
    axes.set(xlabel="step", ylabel="loss (nats)", title="sum over completions")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def print_report(report: Mapping[str, Any], figures: Figures | None, out: Path, curve: Path | None) -> None:
    """Prints what was optimized, how it ended, and the held-out figures."""
    screen = console()

    def say(text: str) -> None:
        screen.print(text, markup=False, soft_wrap=True)

    layers = ", ".join(map(str, report["layers"]))
    say(
        f"{report['model']}: {report['datapoints']} datapoint(s), layer {layers}, {report['iters']} steps in "
        f"{report['seconds']:.1f} s, stopped by {report['stopped']}"
    )
    if "output_constr_iters" in report:
        say(
            f"then {report['output_constr_iters']} steps to shorten it, stopped by {report['output_constr_stopped']}"
        )
    say(f"loss {report['starting_loss']:.4g} → {report['loss']:.4g} nats, norm {report['norm']:.4g}")
    if figures is not None:
        _print_figures(screen, figures)
    if report["texts"]:
        table = Table(title="seed 0", show_lines=True)
        for column in ("prompt", "plain", "steered"):
            table.add_column(column, ratio=1, overflow="fold")
        for one in report["texts"]:
            table.add_row(*(model_text(one[name].strip()) for name in ("prompt", "plain", "steered")))
        screen.print(table)
    say(f"vector: {out / 'vector.safetensors'}")
    say(f"report: {out / 'report.json'}")
    say(
        f"curve: {curve}"
        if curve is not None
        else f"curve: none, matplotlib is missing; {install_line('plot')}"
    )


def _print_figures(screen: Any, figures: Figures) -> None:
    table = Table(title="held-out prompts")
    table.add_column("completions")
    for heading in ("likeliest before", "likeliest", "probability × (mean)", "(range)"):
        table.add_column(heading, justify="right")
    for side, found in figures.summary().items():
        table.add_row(
            f"{found['completions']} {'to promote' if side == 'dst' else 'to suppress'}",
            f"{found['likeliest_before']:.0%}",
            f"{found['likeliest']:.0%}",
            f"{found['factor']:.3g}",
            f"{found['smallest_factor']:.2g}–{found['largest_factor']:.2g}",
        )
    screen.print(table)
