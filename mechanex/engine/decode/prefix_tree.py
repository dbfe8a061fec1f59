"""Which of many texts share most of their first tokens with another one, found in the time that reading it takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy

__all__ = ["PrefixTree"]


class _Node:
    """What texts have in common behind their parent's part.

    Args:
        labels: [tokens, 2] int64, one row a token.
        text: the number of the text that ends here, or None.
    """

    __slots__ = ("children", "labels", "text")

    def __init__(self, labels: Any, text: int | None = None) -> None:
        self.labels, self.text = labels, text
        self.children: dict[tuple[int, int], _Node] = {}

    def texts(self, but: _Node | None = None) -> Iterator[int]:
        """Those that end here or behind, but for one child's, the latest child's first."""
        left = [child for child in self.children.values() if child is not but]
        if self.text is not None:
            yield self.text
        while left:
            node = left.pop()
            if node.text is not None:
                yield node.text
            left += node.children.values()


class PrefixTree:
    """A radix tree over texts.

    A text is an array of labels [tokens, 2] int64, whose rows are equal where tokens are and are edited alike.
    """

    def __init__(self) -> None:
        self._root = _Node(numpy.zeros((0, 2), numpy.int64))

    def __bool__(self) -> bool:
        return bool(self._root.children)

    def sharing(self, labels: Any) -> Iterator[tuple[int, int]]:
        """Texts by how many of these first tokens they share, most first: how many, and their numbers.

        Nothing may be added or removed meanwhile.
        """
        path, common = self._walk(labels)
        n = sum(len(node.labels) for node in path[:-1]) + common
        below = None
        for node in reversed(path):
            if not n:
                return
            for text in node.texts(but=below):
                yield n, text
            n -= common if below is None else len(node.labels)
            below = node

    def beginning(self, labels: Any) -> list[int]:
        """The texts that these labels begin with."""
        path, common = self._walk(labels)
        whole = path if common == len(path[-1].labels) else path[:-1]
        return [node.text for node in whole if node.text is not None]

    def add(self, labels: Any, text: int) -> None:
        """Adds a text that isn't here."""
        path, common = self._walk(labels)
        node, n = path[-1], sum(len(one.labels) for one in path[:-1]) + common
        if common < len(node.labels):
            self._split(node, common)
        if n == len(labels):
            node.text = text
        else:
            node.children[_first(labels[n:])] = _Node(labels[n:].copy(), text)

    def remove(self, labels: Any) -> None:
        """Takes out a text that is here."""
        path, _ = self._walk(labels)
        node = path[-1]
        node.text = None
        if not node.children:
            path.pop()
            del path[-1].children[_first(node.labels)]
            node = path[-1]
        if node is not self._root and node.text is None and len(node.children) == 1:
            (only,) = node.children.values()
            node.labels = numpy.concatenate([node.labels, only.labels])
            node.children, node.text = only.children, only.text

    def _walk(self, labels: Any) -> tuple[list[_Node], int]:
        """From the root the nodes that share tokens with a text, and how many of the last one's."""
        path, n, common = [self._root], 0, 0
        while n < len(labels) and common == len(path[-1].labels):
            child = path[-1].children.get(_first(labels[n:]))
            if child is None:
                break
            path.append(child)
            common = _common(child.labels, labels[n:])
            n += common
        return path, common

    @staticmethod
    def _split(node: _Node, common: int) -> None:
        """Lets a node end behind its first tokens; what came behind them becomes its child."""
        rest = _Node(node.labels[common:].copy(), node.text)
        rest.children = node.children
        node.labels, node.text = node.labels[:common].copy(), None
        node.children = {_first(rest.labels): rest}


def _first(labels: Any) -> tuple[int, int]:
    return int(labels[0, 0]), int(labels[0, 1])


def _common(ours: Any, others: Any) -> int:
    n = min(len(ours), len(others))
    apart = numpy.flatnonzero((ours[:n] != others[:n]).any(axis=1))
    return int(apart[0]) if len(apart) else n
