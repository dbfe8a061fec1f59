"""What the parts of ``run.sh`` share: one file for all, with the machine, and rows that may have goals and verdicts.

As a program it prints what calls take at every size and the goals that were missed: ``python record.py RESULT.json``.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import mechanex
from mechanex.backends.native import modules

Row = dict[str, object]

# Rows of ``steer.py`` on what `auto` takes, and their notes: microseconds of a call, and in a graph.
_BY_SIZE = re.compile(r"auto, (.+), (\d+x\d+): times the fastest")
_TIMES = re.compile(r"(\w+) ([\d.]+) \(([\d.]+)\)")
_PACKAGES = ("transformers", "triton", "numpy", "pybind11")


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What every part is told."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "result", type=Path, help="JSON file, or a folder for one named after device and date"
    )
    parser.add_argument("--tests", default="not run", help="what became of the tests before")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the script")
    parser.add_argument("--tiny", action="store_true", help="sizes for trying the script")
    return parser


def has_device(options: argparse.Namespace) -> bool:
    """Whether the device that was asked for is there; says so if not."""
    there = options.device == "cpu" or torch.cuda.is_available()
    if not there:
        sys.stderr.write("no CUDA device: nothing timed, nothing written\n")
    return there


class Record:
    """Rows of one part: printed and written as they come, so that a run that is cut short leaves what it has.

    Args:
        part: its name.
        options: as parsed by ``arguments``.
    """

    def __init__(self, part: str, options: argparse.Namespace) -> None:
        about = machine(options.device)
        path: Path = options.result
        if path.is_dir():
            device = "-".join(str(about["device"]).lower().split())
            path /= f"{device}-{datetime.date.today().isoformat()}.json"
        self.path = path
        self.rows: list[Row] = []
        self._part, self._begun = part, time.monotonic()
        self._head: Row = {"machine": about, "tests": options.tests}
        if options.tiny:
            self._head["tiny"] = True
        self._write()

    def add(
        self,
        what: str,
        value: float | int | None,
        unit: str = "",
        *,
        least: float | None = None,
        most: float | None = None,
        note: str = "",
        **more: object,
    ) -> None:
        """One row.

        Args:
            what: what was measured.
            value: the number; None where there is none, and ``note`` says why.
            unit: its unit, empty for a ratio.
            least, most: the goal, if there is one.
            note: for people.
            more: for the file alone.
        """
        row: Row = {"what": what, "value": value if value is None else float(f"{value:.4g}"), "unit": unit}
        if least is not None or most is not None:
            row["goal"] = f">= {least:g}" if least is not None else f"<= {most:g}"
            row["met"] = value is not None and (value >= least if least is not None else value <= (most or 0))
        if note:
            row["note"] = note
        self.rows.append(row | more)
        sys.stdout.write(line_of(row) + "\n")
        sys.stdout.flush()
        self._write()

    def _write(self) -> None:
        report = json.loads(self.path.read_text()) if self.path.exists() else {}
        seconds = round(time.monotonic() - self._begun, 1)
        report[self._part] = self._head | {"seconds": seconds, "rows": self.rows}
        self.path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def line_of(row: Row) -> str:
    """A row for people."""
    value = "-" if row["value"] is None else f"{row['value']:g}"
    verdict = f"{row['goal']}: {'met' if row['met'] else 'MISSED'}" if "goal" in row else ""
    return f"{row['what']!s:<78} {value:>9} {row['unit']!s:<8} {verdict:<16} {row.get('note', '')}".rstrip()


def summary(path: Path) -> str:
    """The goals that were missed, part by part, and how many were met."""
    lines: list[str] = []
    met = total = 0
    for part, found in json.loads(path.read_text()).items():
        if "tests" not in found:
            raise SystemExit(f"{path} is no result of run.sh: its {part} says nothing of tests")
        judged: Sequence[Row] = [row for row in found["rows"] if "goal" in row]
        met, total = met + sum(bool(row["met"]) for row in judged), total + len(judged)
        lines += [
            f"-- {part}, {found['seconds']} s, tests: {found['tests']}",
            *(line_of(row) for row in judged if not row["met"]),
        ]
    return "\n".join([*lines, f"{met} of {total} goals met ({path})", ""])


def auto_table(path: Path) -> str:
    """Markdown: for each kind of edit and number of rows what a call takes on each backend, and in a captured graph."""
    rows: Sequence[Row] = json.loads(path.read_text()).get("steer", {}).get("rows", ())
    found = [(match, row) for row in rows if (match := _BY_SIZE.fullmatch(str(row["what"])))]
    if not found:
        return ""
    names = _TIMES.findall(str(found[0][1]["note"]))
    backends = [name for name, *_ in names if name != "auto"]
    lines = [
        f"| edit | rows | {' | '.join(f'{name}, µs' for name, *_ in names)} | fastest call | in a graph |",
        "|---" * (len(names) + 4) + "|",
    ]
    for match, row in found:
        times = {name: (float(call), float(graph)) for name, call, graph in _TIMES.findall(str(row["note"]))}
        cells = [f"{call:g} ({graph:g})" for call, graph in times.values()]
        best = [min(backends, key=lambda name: times[name][i]) for i in range(2)]
        lines.append(f"| {' | '.join((*match.groups(), *cells, *best))} |")
    return "\n".join([*lines, ""])


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(device: str) -> Row:
    """What the numbers belong to."""
    nvcc = shutil.which("nvcc")
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""
    about: Row = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvcc": next((line.strip() for line in release.splitlines() if "release" in line), None),
        "mechanex": mechanex.__version__,
        **{package: version_of(package) for package in _PACKAGES},
    }
    if device == "cuda":
        built = modules.missing_cuda() is None
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30),
            "driver_serves_cuda": modules.cuda().driver_version() if built else None,
            "native": modules.describe_cuda() if built else modules.missing_cuda(),
        }
    return about


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path, help="JSON file that a part wrote")
    found: Path = parser.parse_args().result
    if not found.is_file():
        raise SystemExit(f"no file {found}")
    said = summary(found)
    if table := auto_table(found):
        sys.stdout.write(f"{table}\n")
    sys.stdout.write(said)
    raise SystemExit(0)
