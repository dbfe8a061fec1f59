"""Watching inside captured steps: the same texts, scores and corrections as by calls of the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import D_MODEL, FAMILIES
from test_decode import ids_of
from test_static_step import DEVICES, HostGraphs, random_edit, rows_of, run

from mechanex.engine.decode import static_step
from mechanex.engine.decode.decoder import Decoder
from mechanex.engine.decode.request import Steer, TextRequest
from mechanex.engine.models import adapter_for
from mechanex.engine.sae.behavior import Behavior
from mechanex.engine.sae.corrections import Correction
from mechanex.engine.sae.detectors import ProbeDetector
from mechanex.engine.sae.hook_points import HookPoint
from mechanex.engine.sae.watching import Watch, WatchingSteering


@pytest.fixture(params=DEVICES)
def device(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        monkeypatch.setattr(static_step, "Graphs", HostGraphs)
    return str(request.param)


def behavior(
    seed: int, threshold: float, kind: Any = "resid", layer: int = 2, strength: float = 3.0
) -> Behavior:
    """One that some tokens of a small random model show."""
    direction = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))
    direction /= direction.norm()
    return Behavior(
        f"b{seed}",
        "",
        "tiny",
        None,
        D_MODEL,
        HookPoint(kind, layer),
        "probe",
        ProbeDetector(direction, 0.0, 0.1),
        None,
        None,
        threshold,
        Correction("subtract", direction, 0.0, 0.5, strength),
    )


BEHAVIORS = (behavior(1, 12.0), behavior(2, 14.0, layer=3), behavior(3, 2.0, "mlp_out", 1), behavior(4, 1e9))


def watched(model: Any, requests: list[TextRequest], form: str) -> Any:
    rows = rows_of([replace(one, onlooker=_fresh(one.onlooker)) for one in requests])
    adapter = adapter_for(model)
    run(Decoder(adapter, 0, form=form, steering=WatchingSteering(adapter)), rows)  # type: ignore[arg-type]
    return [
        (
            row.chosen,
            row.result.finish_reason if row.result else None,
            [(one.detected, one.corrected) for one in row.request.onlooker.seen],
            [score for one in row.request.onlooker.seen for _, score in sorted(one.scores.items())],
        )
        for row in rows
        if isinstance(row.request.onlooker, Watch)
    ]


def _fresh(onlooker: Any) -> Any:
    return None if onlooker is None else Watch(onlooker.behaviors, onlooker.action, onlooker.floor)


def close(found: Any, wanted: Any) -> None:
    assert [one[:3] for one in found] == [one[:3] for one in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one[3] == pytest.approx(other[3], abs=1e-3)


def test_watched_rows_get_what_calls_of_the_model_give(device: str) -> None:
    model, ids = FAMILIES["llama"]().to(device), ids_of()
    requests = [
        TextRequest(ids[0], 16, onlooker=Watch(BEHAVIORS)),
        TextRequest(ids[1], 16, onlooker=Watch(BEHAVIORS[:2], "report")),
        TextRequest(ids[2], 16),
        TextRequest(ids[2], 16, onlooker=Watch(BEHAVIORS, "abort", frozenset({"b1"}))),
        TextRequest(ids[0], 16, onlooker=Watch(BEHAVIORS[1:2]), steering=(Steer(2, random_edit(5)),)),
    ]
    wanted = watched(model, requests, "rolling")
    close(watched(model, requests, "static"), wanted)
    said = [one for found in wanted for one in found[2]]
    assert any(corrected for _, corrected in said) and any(not detected for detected, _ in said)
    assert {found[1] for found in wanted} == {"behavior", "length"}


def test_nothing_is_captured_again_for_other_watches_of_the_same_behaviors(device: str) -> None:
    model, ids = FAMILIES["llama"]().to(device), ids_of()
    adapter = adapter_for(model)

    def captures(*watches: Watch) -> int:
        requests = [TextRequest(ids[i], 9, onlooker=watch) for i, watch in enumerate(watches)]
        close(watched(model, requests, "static"), watched(model, requests, "rolling"))
        return int(adapter.kept.step.graphs.captures)

    silent = tuple(replace(one, threshold=1e9) for one in BEHAVIORS)
    first = captures(Watch(silent), Watch(silent[:2]), Watch(silent[3:], "report"))
    assert first >= 1
    assert captures(Watch(silent[:1]), Watch(silent), Watch(silent[1:2])) == first
    loud = captures(Watch(BEHAVIORS), Watch(BEHAVIORS), Watch(BEHAVIORS))
    assert captures(Watch(BEHAVIORS), Watch(BEHAVIORS), Watch(BEHAVIORS)) == loud > first


def test_a_step_in_which_something_is_corrected_is_the_only_one_that_runs_twice(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = FAMILIES["llama"]().to(device), ids_of()
    told: list[bool] = []
    tell = WatchingSteering.tell

    def noting(self: Any, *args: Any) -> bool:
        told.append(tell(self, *args))
        return told[-1]

    monkeypatch.setattr(WatchingSteering, "tell", noting)
    (found,) = watched(model, [TextRequest(ids[0], 16, onlooker=Watch(BEHAVIORS))], "static")
    first = next(i for i, (_, corrected) in enumerate(found[2]) if corrected)
    assert told == [True] * first + [False]  # after it, the host runs the answer's steps
    told.clear()
    watched(model, [TextRequest(ids[0], 16, onlooker=Watch(BEHAVIORS, "report"))], "static")
    assert told == [True] * 15


def test_behaviors_that_can_not_be_captured_leave_other_steps_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Unable(HostGraphs):
        def capture(self, key: Any, step: Any, undo: Any) -> bool:
            if key[3]:
                self.note_failure(key, RuntimeError("operation not permitted when stream is capturing"))
                return False
            return super().capture(key, step, undo)

    monkeypatch.setattr(static_step, "Graphs", Unable)
    model, ids = FAMILIES["llama"](), ids_of()
    requests = [TextRequest(ids[0], 9, onlooker=Watch(BEHAVIORS)), TextRequest(ids[1], 9)]
    close(watched(model, requests, "static"), watched(model, requests, "rolling"))
    graphs = adapter_for(model).kept.step.graphs
    assert graphs.failure is None and not graphs.captures
    run(Decoder(adapter_for(model), 0, form="static"), rows_of([TextRequest(ids[0], 9)]))
    assert graphs.captures == 1
