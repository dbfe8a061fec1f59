"""What the benchmarks found: tables on the screen, JSON, the page RESULTS.md, and comparison with an earlier JSON."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path

import torch
import transformers

from mechanex import backends
from mechanex._version import __version__
from mechanex.doctor import examine

HEADINGS = ("", "median", "GB/s", "of the base", "note")


@dataclass
class Row:
    """One way of doing one thing: seconds, bytes of input and output (0: not counted), share of the base's time."""

    title: str
    name: str
    seconds: float
    base: str
    n_bytes: int = 0
    note: str = ""
    ratio: float = float("nan")

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        scale, unit = (
            (1, "s") if self.seconds >= 0.1 else (1e3, "ms") if self.seconds >= 1e-4 else (1e6, "µs")
        )
        rate = f"{self.n_bytes / self.seconds / 1e9:.1f}" if self.n_bytes else ""
        return (
            self.name,
            f"{self.seconds * scale:.3g} {unit}",
            rate,
            f"{self.ratio:.3f} of {self.base}",
            self.note,
        )


@dataclass
class Report:
    """All rows of one run."""

    rows: list[Row] = field(default_factory=list)

    def add(
        self,
        title: str,
        found: Mapping[str, float],
        base: str,
        *,
        n_bytes: int = 0,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        """Adds median seconds by name; ratios are to ``base``, which may come in another call of the same title."""
        for name, seconds in found.items():
            self.rows.append(Row(title, name, seconds, base, n_bytes, (notes or {}).get(name, "")))

    def finish(self) -> None:
        """Works out the ratios."""
        seconds = {(row.title, row.name): row.seconds for row in self.rows}
        for row in self.rows:
            row.ratio = row.seconds / seconds.get((row.title, row.base), float("nan"))

    def tables(self, *, markdown: bool) -> str:
        """One table per title."""
        parts = []
        for title, group in groupby(sorted(self.rows, key=lambda r: r.title), key=lambda r: r.title):
            lines = [row.cells for row in group]
            if markdown:
                parts += [
                    f"### {title}",
                    "",
                    "| " + " | ".join(HEADINGS) + " |",
                    "|---" * len(HEADINGS) + "|",
                ]
                parts += ["| " + " | ".join(cells) + " |" for cells in lines] + [""]
            else:
                parts += [title] + [
                    f"  {c[0]:<26}{c[1]:>10}{c[2]:>8}  {c[3]}  {c[4]}".rstrip() for c in lines
                ]
        return "\n".join(parts)

    def compared(self, earlier: Path) -> str:
        """Each row against the same row of an earlier JSON: its time, and its ratio, which travels between machines."""
        old = {(row["title"], row["name"]): row for row in json.loads(earlier.read_text())["rows"]}
        lines = [f"compared with {earlier}: time, ratio to the base"]
        for row in self.rows:
            if (before := old.get((row.title, row.name))) is not None:
                time, ratio = row.seconds / before["seconds"], row.ratio / before["ratio"]
                lines.append(f"  {row.title}: {row.name}: {time:.2f}, {ratio:.2f}")
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """Writes ``RESULTS.md`` and ``results/cpu-DATE.json``."""
        date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
        machine = {
            "date": date,
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "mechanex": __version__,
        }
        (folder / "results").mkdir(exist_ok=True)
        target = folder / "results" / f"cpu-{date}.json"
        rows = [asdict(row) for row in self.rows]
        target.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        page = [
            "# Results",
            "",
            "Written by `make bench`. Ways that are compared took turns in one run; times are medians.",
            "",
            *(f"- {name}: {value}" for name, value in machine.items()),
            "",
            "```text",
            str(examine()),
            "```",
            "",
            "What `auto` takes, first to last:",
            "",
            "```text",
            backends.selection(),
            "```",
            "",
            self.tables(markdown=True),
        ]
        (folder / "RESULTS.md").write_text("\n".join(page), encoding="utf-8")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{name}, {os.cpu_count()} cores"
