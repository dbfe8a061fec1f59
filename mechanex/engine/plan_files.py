"""Steering plans on disk: one safetensors file, whose text says where each edit applies."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from .._version import __version__
from ..errors import MechanexError, NotFoundError, ValidationError
from ..home import atomic_path
from ..ops.gate import KINDS
from .formats.files import MAX_BYTES
from .formats.record import CHECKSUM, with_checksum
from .intervention import Edit
from .prompt_conditions import PromptCondition
from .schedules import Schedule, Varying

if TYPE_CHECKING:
    from .hooks import Intervention

__all__ = ["plan_digest", "read_plan", "write_plan"]

_PLAN = "plan"
_VERSION = "plan_version"


def write_plan(path: str | os.PathLike[str], interventions: Sequence[Intervention]) -> None:
    """Writes interventions; a half-written file never has the final name.

    Raises:
        ValidationError: another suffix than ``.safetensors``, no interventions, or a schedule that is a function.
    """
    target = Path(path)
    _check_suffix(target)
    if not interventions:
        raise ValidationError("The plan has no interventions: there is nothing to save.")
    said, stored = _written(interventions)
    fields = {_PLAN: said, _VERSION: "1", "library_version": __version__}
    with atomic_path(target) as temporary:
        temporary.write_bytes(safetensors_bytes(stored, metadata=with_checksum({}, fields, stored)))


def plan_digest(interventions: Sequence[Intervention]) -> str:
    """A hash of what interventions do.

    Raises:
        ValidationError: a schedule that is a function.
    """
    said, stored = _written(interventions)
    return hashlib.sha256(said.encode() + safetensors_bytes(stored)).hexdigest()


def _written(interventions: Sequence[Intervention]) -> tuple[str, dict[str, Tensor]]:
    """The text and the tensors that a file has for interventions."""
    tensors: dict[str, Tensor] = {}
    said = json.dumps([_said(one, f"{i}.", tensors) for i, one in enumerate(interventions)])
    # Tensors that share memory are refused by the format.
    return said, {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


def read_plan(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads what :func:`write_plan` wrote, as arguments of each intervention.

    Raises:
        NotFoundError: there is no such file.
        ValidationError: the file is not a sound plan; names the file and the problem.
    """
    source = Path(path)
    _check_suffix(source)
    if not source.is_file():
        raise NotFoundError(f"no plan at {source}: check the path.")
    if source.stat().st_size > MAX_BYTES:
        raise ValidationError(f"{source} has more than {MAX_BYTES:,} bytes: is it a model's file?")
    try:
        with safe_open(source, framework="pt") as file:
            fields = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if fields.get(_VERSION) != "1":
            raise ValueError("it says nothing of a plan; SteeringVector.load reads vectors")
        checksum = fields.pop(CHECKSUM, None)
        if checksum != with_checksum({}, fields, tensors)[CHECKSUM]:
            raise ValueError("its checksum is not that of its content: it was damaged or edited")
        return [_arguments(one, f"{i}.", tensors) for i, one in enumerate(json.loads(fields[_PLAN]))]
    except (SafetensorError, MechanexError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValidationError(f"{source} is not a usable plan: {error}") from error


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() != ".safetensors":
        raise ValidationError(f"a plan's file ends in .safetensors; got {str(path)!r}.")


def _said(one: Intervention, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What is no tensor of an intervention; its tensors go to ``tensors``."""
    said: dict[str, Any] = {"layer": one.layer, "edit": _keep(one.edit, prefix, tensors)}
    if isinstance(one.tokens, slice):
        said["tokens"] = [one.tokens.start, one.tokens.stop, one.tokens.step]
    elif one.tokens is not None:
        said["tokens"] = one.tokens
    if one.rows is not None:
        said["rows"] = list(one.rows)
    if one.mask is not None:
        tensors[prefix + "mask"] = one.mask
    if one.condition is not None:
        said["condition"] = one.condition.said()
        tensors[prefix + "condition"] = one.condition.weight
    if one.varying is not None:
        schedule = one.varying.schedule
        said["schedule"] = schedule.said()
        values = dict.fromkeys([*schedule.values, *(() if schedule.prompt is None else (schedule.prompt,))])
        made = {value: one.varying.made(value) for value in values if value}
        said["schedule"]["edits"] = [
            [value, _keep(edit, f"{prefix}at{i}.", tensors)] for i, (value, edit) in enumerate(made.items())
        ]
    return said


def _keep(edit: Edit, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    for name in ("bias", "left", "right", "matrix"):
        if (tensor := getattr(edit, name)) is not None:
            tensors[prefix + name] = tensor
    if edit.gate is None:
        return {}
    tensors[prefix + "gate"] = edit.gate.weight[0]
    return {"gate": KINDS[int(edit.gate.kinds[0])], "offset": float(edit.gate.offset[0])}


def _edit(said: Mapping[str, Any], prefix: str, tensors: Mapping[str, Tensor]) -> Edit:
    left, right, matrix = (tensors.get(prefix + name) for name in ("left", "right", "matrix"))
    edit = Edit(tensors[prefix + "bias"], left, right, matrix)
    if "gate" in said:
        return edit.gated(said["gate"], tensors[prefix + "gate"], said["offset"])
    return edit


def _arguments(said: Mapping[str, Any], prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    tokens, condition, varying = said.get("tokens"), None, None
    if "condition" in said:
        condition = PromptCondition(weight=tensors[prefix + "condition"], **said["condition"])
    if "schedule" in said:
        told = dict(said["schedule"])
        edits = {
            float(value): _edit(edit, f"{prefix}at{i}.", tensors)
            for i, (value, edit) in enumerate(told.pop("edits"))
        }
        varying = Varying(Schedule(**told), edits.__getitem__)
    return {
        "layer": int(said["layer"]),
        "edit": _edit(said["edit"], prefix, tensors),
        "tokens": slice(*tokens) if isinstance(tokens, list) else tokens,
        "rows": said.get("rows"),
        "mask": tensors.get(prefix + "mask"),
        "varying": varying,
        "condition": condition,
    }
