"""Links of the repository's texts, for places that have other files beside them: a page of a site, a package's page."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable

# Code is left alone: blocks between fences, and what stands between backticks.
_CODE = re.compile(r"(^(`{3,}|~{3,}).*?^\2`*$|(?<!`)`[^`\n]+`(?!`))", re.MULTILINE | re.DOTALL)
# A label may itself have code or a pair of brackets in it.
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
_FOREIGN = re.compile(r"[a-z][a-z+.-]*:", re.IGNORECASE)

Placed = Callable[[str, bool], "str | None"]


def replaced(text: str, folder: str, placed: Placed) -> str:
    """Give every link to a file of the repository the target that it has elsewhere.

    Args:
        text: Markdown.
        folder: the folder of the text's file, from the repository's root; "" is the root.
        placed: what stands in place of a file's path (from the root), given whether it is a picture; None: nothing
            does, so a link becomes its label, and a picture is left out.
    """

    def put(link: re.Match[str]) -> str:
        picture, label, target, anchor = link[1], link[2], link[3], link[4] or ""
        if not target or _FOREIGN.match(target):
            return link[0]
        new = placed(posixpath.normpath(posixpath.join(folder, target)), bool(picture))
        if new is None:
            return "" if picture else label
        return f"{picture}[{label}]({new}{anchor})"

    kept: list[str] = []

    def hide(code: re.Match[str]) -> str:
        kept.append(code[0])
        return f"\0{len(kept) - 1}\0"

    shown = _LINK.sub(put, _CODE.sub(hide, text))
    return re.sub("\0(\\d+)\0", lambda mark: kept[int(mark[1])], shown)
