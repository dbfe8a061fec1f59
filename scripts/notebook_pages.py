"""A notebook with its outputs as a page of Markdown, and its pictures."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """The page, and each picture by the name that the page gives it."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in cells:
        source = _text(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(_text(data["image/png"]))
                parts.append(f"![What the cell above draws]({name})")
            elif shown := _text(output.get("text", data.get("text/plain", ""))).strip():
                parts.append(f"````text\n{_COLOURS.sub('', shown)}\n````")
    return "\n\n".join(parts) + "\n", pictures


def _text(lines: Any) -> str:
    """What a notebook keeps as one string or as a list of lines."""
    return lines if isinstance(lines, str) else "".join(lines)
