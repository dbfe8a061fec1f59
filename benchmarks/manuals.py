"""Paragraphs of the manuals that are installed on this machine, as plain text."""

from __future__ import annotations

import gzip
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

SECTIONS = Path("/usr/share/man")

# Macros whose arguments are running text; all others say how a page is laid out.
_TEXT = re.compile(r"\.(?:B|I|R|BR|RB|BI|IB|IR|RI|SM|SB|Nm|Fl|Ar|Pa|Xr|Cm|Em|Li|Va)\s+(.*)")
_ENDS = re.compile(r"\.(?:PP|P|LP|Pp|SH|SS|Sh|Ss|TP|IP|It|HP|sp|br|RS|RE|nf|fi|TH|Dd)\b")
_ESCAPES = (
    (re.compile(r'\\".*'), ""),
    (re.compile(r"\\f(?:\[[^\]]*\]|\(..|.)"), ""),
    (re.compile(r"\\s[-+]?\d+"), ""),
    (re.compile(r"\\\((?:lq|rq)|\\\[(?:lq|rq)\]|\\\*\([LR]\"|\\\(dq|\\\[dq\]"), '"'),
    (re.compile(r"\\\((?:aq|cq|oq)|\\\[(?:aq|cq|oq)\]"), "'"),
    (re.compile(r"\\\((?:em|en)|\\\[(?:em|en)\]|\\-|\\\((?:hy|mi)"), "-"),
    (re.compile(r"\\\*?\(..|\\\*?\[[^\]]*\]|\\\*."), ""),
    (re.compile(r"\\[&|^/,:%{}c]"), ""),
    (re.compile(r"\\[ ~0]"), " "),
    (re.compile(r"\\(?:e|\\)"), r"\\"),
)
_FEWEST_WORDS, _FEWEST_LETTERS = 25, 0.75
_MOST_OF_A_FAMILY = 40


def paragraphs(seed: int, each: int = 3) -> Iterator[str]:
    """Paragraphs of running text, in an order that a seed decides.

    Pages whose names begin with the same word say much the same, and a few of them are read.

    Args:
        seed: of the order of manuals and the choice of paragraphs.
        each: most paragraphs of one manual.
    """
    rng = random.Random(seed)
    pages = sorted(path for folder in SECTIONS.glob("man[1-8]") for path in folder.glob("*.gz"))
    rng.shuffle(pages)
    seen: set[str] = set()
    families: Counter[str] = Counter()
    for path in pages:
        family = re.split(r"[-_.:]", path.name)[0]
        families[family] += 1
        if families[family] > _MOST_OF_A_FAMILY:
            continue
        page = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
        found = [text for text in _running_text(page) if text not in seen]
        for text in rng.sample(found, min(each, len(found))):
            seen.add(text)
            yield text


def _running_text(page: str) -> list[str]:
    """The paragraphs of a page in roff that are mostly words."""
    found: list[list[str]] = [[]]
    for line in page.splitlines():
        if not line.strip() or _ENDS.match(line):
            found.append([])
        elif not line.startswith((".", "'")):
            found[-1].append(line)
        elif inside := _TEXT.match(line):
            found[-1].append(inside[1].replace('"', ""))
    texts = (re.sub(r"\s+", " ", _plain(" ".join(lines))).strip() for lines in found)
    return [text for text in texts if _is_prose(text)]


def _plain(text: str) -> str:
    for pattern, plain in _ESCAPES:
        text = pattern.sub(plain, text)
    return text


def _is_prose(text: str) -> bool:
    letters = sum(one.isalpha() or one.isspace() for one in text)
    return len(text.split()) >= _FEWEST_WORDS and letters >= _FEWEST_LETTERS * len(text) and "<|" not in text
