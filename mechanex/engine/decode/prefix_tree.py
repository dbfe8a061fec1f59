"""Which of many texts shares most of its first tokens with another one, found in the time that reading it takes."""

from __future__ import annotations

from typing import Any

import numpy

__all__ = ["PrefixTree"]


class _Node:
    """What texts have in common behind their parent's part.

    Args:
        labels: [tokens, 2] int64, one row a token.
        text: the number of the text that ends here, or None for a node with children.
    """

    __slots__ = ("children", "labels", "text")

    def __init__(self, labels: Any, text: int | None = None) -> None:
        self.labels, self.text = labels, text
        self.children: dict[tuple[int, int], _Node] = {}


class PrefixTree:
    """A radix tree over texts, none of which begins another one.

    A text is an array of labels [tokens, 2] int64, whose rows are equal where tokens are and are edited alike.
    """

    def __init__(self) -> None:
        self._root = _Node(numpy.zeros((0, 2), numpy.int64))

    def __bool__(self) -> bool:
        return bool(self._root.children)

    def longest(self, labels: Any) -> tuple[int, int] | None:
        """Of the texts that share most of these first tokens the latest one: how many, and its number."""
        node, n, _ = self._walk(labels)
        if not n:
            return None
        while node.text is None:
            node = next(reversed(node.children.values()))
        return n, node.text

    def add(self, labels: Any, text: int) -> None:
        """Adds a text; none that is here may begin it, and it may begin none."""
        node, n, common = self._walk(labels)
        if common < len(node.labels):
            node = self._split(labels[n - common :], node, common)
        node.children[_first(labels[n:])] = _Node(labels[n:].copy(), text)

    def remove(self, labels: Any) -> None:
        """Takes out a text that is here."""
        above, node, n = self._root, self._root, 0
        while n < len(labels):
            above, node = node, node.children[_first(labels[n:])]
            n += len(node.labels)
        del above.children[_first(node.labels)]
        if above is not self._root and len(above.children) == 1:
            (only,) = above.children.values()
            above.labels = numpy.concatenate([above.labels, only.labels])
            above.children, above.text = only.children, only.text

    def _walk(self, labels: Any) -> tuple[_Node, int, int]:
        """The last node that shares tokens with a text, how many are shared in all, and how many of the node's."""
        node, n, common = self._root, 0, 0
        while n < len(labels) and common == len(node.labels):
            child = node.children.get(_first(labels[n:]))
            if child is None:
                break
            node, common = child, _common(child.labels, labels[n:])
            n += common
        return node, n, common

    @staticmethod
    def _split(labels: Any, node: _Node, common: int) -> _Node:
        """Lets a node end where it differs from a text; what came behind becomes its child."""
        rest = _Node(node.labels[common:].copy(), node.text)
        rest.children = node.children
        node.labels, node.text = labels[:common].copy(), None
        node.children = {_first(rest.labels): rest}
        return node


def _first(labels: Any) -> tuple[int, int]:
    return int(labels[0, 0]), int(labels[0, 1])


def _common(ours: Any, others: Any) -> int:
    n = min(len(ours), len(others))
    apart = numpy.flatnonzero((ours[:n] != others[:n]).any(axis=1))
    return int(apart[0]) if len(apart) else n
