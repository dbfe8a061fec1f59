"""Loading a model so that it lies in the processes of a job, each of which holds a part (tensor parallelism)."""

from __future__ import annotations

import os
from typing import Any

import transformers

from ..._private.torch import join_job
from ..._private.transformers import tensor_parallel
from ...errors import ValidationError
from ...launched import SWITCH, global_rank

__all__ = ["check_splits", "splitting"]


def splitting(tp: int | str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` by which it splits a model over the processes of this job.

    Args:
        tp: ``"auto"`` or the number of processes; None splits nothing.
        given: what is passed on beside, by name; None where it isn't given.

    Raises:
        ValidationError: there is one process, another number of them, an argument that doesn't go with it, or a
            transformers without tensor parallelism on every device.
    """
    if tp is None:
        return {}
    if tp != "auto" and (isinstance(tp, bool) or not isinstance(tp, int) or tp < 1):
        raise ValidationError(f"tp is 'auto' or the number of processes that hold the model; got {tp!r}.")
    for name, value in given.items():
        if value is not None:
            raise ValidationError(f"tp= places the parts of a model itself: leave {name}= out.")
    if global_rank() is None:
        if tp == 1 or (tp == "auto" and os.environ.get("WORLD_SIZE") == "1"):
            return {}
        why = f"{SWITCH}=0 keeps the processes apart" if os.environ.get(SWITCH) == "0" else "there is one"
        raise ValidationError(
            f"tp={tp!r} splits a model over the processes of a job, and {why}: start the program with "
            "torchrun --nproc-per-node N."
        )
    size = int(os.environ["WORLD_SIZE"])
    if tp not in ("auto", size):
        raise ValidationError(f"tp is 'auto' or the number of processes, {size}; got {tp}.")
    try:
        wanted = tensor_parallel(size)
    except (ImportError, TypeError):
        raise ValidationError(
            f"tp= needs a newer transformers than {transformers.__version__}: pip install -U transformers."
        ) from None
    join_job()
    return {"distributed_config": wanted}


def check_splits(name: str, config: Any) -> None:
    """Raises a ValidationError for a model that transformers can't split over the processes of this job.

    Args:
        name: the model's.
        config: of its text part.
    """
    if not getattr(config, "base_model_tp_plan", None):
        raise ValidationError(
            f"transformers has no plan to split a {config.model_type} model over processes: load {name} without tp=, "
            "or over several devices by device_map='auto'."
        )
    size = int(os.environ["WORLD_SIZE"])
    for heads in ("num_attention_heads", "num_key_value_heads"):
        n = getattr(config, heads, None)
        if isinstance(n, int) and n % size:
            raise ValidationError(
                f"{name} has {n} heads ({heads}), which {size} processes can't share evenly: start as many "
                "as divide them."
            )
