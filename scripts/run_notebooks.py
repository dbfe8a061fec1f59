"""Runs notebooks and writes what their cells give into them.

    python scripts/run_notebooks.py                               # all of examples/
    python scripts/run_notebooks.py examples/05_serving.ipynb

A notebook runs in an empty folder, so that nothing it writes stays here. What goes to stderr (progress, log lines) is
left out: it differs from run to run.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TIMEOUT = 1800
"""Seconds that a cell may take."""


def executed(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run.

    Args:
        path: the notebook's file, which stays as it is.
        folder: where it runs.

    Raises:
        CellExecutionError: a cell fails; the error has the cell and its traceback.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute()
    notebook.metadata = {"language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def main() -> None:
    for path in [Path(given) for given in sys.argv[1:]] or sorted(EXAMPLES.glob("*.ipynb")):
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(executed(path, Path(folder)), path)
        print(f"{path.name}: {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
