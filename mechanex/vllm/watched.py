"""Answers that are watched for behaviors in vLLM: which tokens of a step are scored, and what becomes of the stream."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..engine.sae.behavior import Behavior
from ..engine.sae.hook_points import HookPoint
from ..engine.sae.scorings import Scorings
from ..engine.sae.watching import ACTIONS, Action, Watch
from ..errors import ValidationError

__all__ = ["SHOWED", "WATCH_FIELD", "AskedWatch", "WatchedRead", "WatchedStream", "Watches", "watch_of"]

WATCH_FIELD = "mechanex_watch"
"""The key of what is watched in an answer among ``SamplingParams.extra_args``."""

SHOWED = -1
"""vLLM's ``stop_reason`` of an answer that ended with a behavior: neither a stop text nor a token's id."""

_MOST_TOLD = 4096


@dataclass(frozen=True)
class AskedWatch:
    """What a request has watched in its answer.

    Args:
        name: of this request, by which its scores are asked for.
        keys: of the behaviors.
        action: what is done where one shows.
        told: whether somebody is going to ask for the scores.
    """

    name: str
    keys: tuple[str, ...]
    action: Action
    told: bool = False

    @property
    def alters(self) -> bool:
        """Whether keys and values of the answer may become others than its tokens alone make."""
        return self.action == "correct"

    def as_text(self) -> str:
        """As the text that a request carries."""
        return json.dumps([self.name, self.keys, self.action, self.told])


@lru_cache(maxsize=4096)
def watch_of(text: str) -> AskedWatch:
    """What a request that carries this text has watched.

    Raises:
        ValidationError: ``as_text`` can't have written it.
    """
    try:
        name, keys, action, told = json.loads(text)
        if action not in ACTIONS:
            raise ValueError(f"no action is called {action!r:.40}")
        return AskedWatch(str(name), tuple(map(str, keys)), action, bool(told))
    except (TypeError, ValueError) as error:
        raise ValidationError(
            f"a request's extra_args[{WATCH_FIELD!r}] is written by mechanex.vllm and was changed since: {error}"
        ) from error


class Watches:
    """The watched answers of a worker, by request."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[AskedWatch, Watch]] = {}
        self._told: OrderedDict[str, list[Watch]] = OrderedDict()

    def of(self, request_id: str, asked: AskedWatch, behavior_of: Callable[[str], Behavior]) -> Watch:
        """The watch of a request, which begins when it is first read."""
        if request_id not in self._running:
            behaviors = tuple(behavior_of(key) for key in asked.keys)
            watch = Watch(behaviors, asked.action)
            self._running[request_id] = asked, watch
            if asked.told:
                self._told.setdefault(asked.name, []).append(watch)
                if len(self._told) > _MOST_TOLD:
                    self._forget_one()
        return self._running[request_id][1]

    def _forget_one(self) -> None:
        """Drops the oldest scores of a request that has ended, for which nobody came."""
        running = {asked.name for asked, _ in self._running.values()}
        gone = next((name for name in self._told if name not in running), None)
        if gone is not None:
            del self._told[gone]

    def release(self, knows: Callable[[str], bool]) -> None:
        """Ends the watches of requests that have ended; who asked for their scores may have them still."""
        for request_id in [one for one in self._running if not knows(one)]:
            del self._running[request_id]

    @property
    def ending(self) -> list[str]:
        """The requests whose answers are to end with the token that was read last."""
        return [request_id for request_id, (_, watch) in self._running.items() if watch.end is not None]

    def take(self, name: str) -> list[dict[str, Any]]:
        """What was seen in the answers of a request, once.

        Returns:
            For each answer the behaviors that were detected, and for each token that was read its scores, what it shows
            and what was corrected in it.
        """
        return [
            {
                "detected": list(watch.detected),
                "tokens": [[one.scores, list(one.detected), list(one.corrected)] for one in watch.seen],
            }
            for watch in self._told.pop(name, ())
        ]


@dataclass(frozen=True)
class WatchedRead:
    """What a step reads of a watched request.

    Args:
        watch: what is watched in it.
        begin: the row of the step that holds the first of its tokens.
        scheduled: how many it has there.
        first: which token of the answer the first one is, negative in the prompt.
    """

    watch: Watch
    begin: int
    scheduled: int
    first: int


class WatchedStream:
    """Looks at the residual stream of a step's watched requests, layer by layer.

    Tokens of answers are scored when they are read for the first time. Where they are read again, what was corrected in
    them is corrected again.
    """

    def __init__(self) -> None:
        self._reads: dict[int, list[tuple[WatchedRead, tuple[Behavior, ...]]]] = {}
        self._scorings = Scorings()

    def stage(self, reads: Sequence[WatchedRead]) -> None:
        """Makes these the watched requests of the next pass."""
        self._reads = {}
        for one in reads:
            if one.first + one.scheduled > 0:
                for point, behaviors in one.watch.by_point.items():
                    self._reads.setdefault(point.layer, []).append((one, behaviors))

    def clear(self) -> None:
        """Ends the pass."""
        self._reads = {}

    def looks_at(self, site: int) -> bool:
        """Whether some request is watched where the stream enters a layer."""
        return site in self._reads

    def changed(self, site: int, stream: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor] | None:
        """Scores the tokens of the step there.

        Args:
            site: the layer that the stream enters.
            stream: gives the stream [n, d] of some rows [n] of the step.

        Returns:
            The rows that are corrected, and the stream that they get; None where there are none.
        """
        point = HookPoint("resid", site)
        new: list[tuple[int, Watch, tuple[Behavior, ...]]] = []
        change: dict[Behavior, list[int]] = {}
        for one, behaviors in self._reads[site]:
            for i in range(max(0, -one.first), one.scheduled):
                row, token = one.begin + i, one.first + i
                if token >= one.watch.n_seen(point):
                    new.append((row, one.watch, behaviors))
                    continue
                for behavior in behaviors:
                    if behavior.name in one.watch.seen[token].corrected:
                        change.setdefault(behavior, []).append(row)
        if new:
            x = stream(torch.tensor([row for row, _, _ in new]))
            scoring = self._scorings.of({b for _, _, several in new for b in several}, x.device)
            for (row, watch, behaviors), values in zip(new, scoring.scorer(x).tolist(), strict=True):
                corrected = watch.note(point, *scoring.of(behaviors).read(values))
                for behavior in behaviors:
                    if behavior.name in corrected:
                        change.setdefault(behavior, []).append(row)
        if not change:
            return None
        rows = sorted({row for several in change.values() for row in several})
        place = {row: i for i, row in enumerate(rows)}
        index = torch.tensor(rows)
        x = stream(index).clone()
        for behavior, several in change.items():
            chosen = torch.tensor([place[row] for row in several], device=x.device)
            x.index_copy_(0, chosen, behavior.correction(x.index_select(0, chosen)))
        return index, x
