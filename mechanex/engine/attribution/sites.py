"""Where activations are read and patched, and the passes that do it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...errors import ValidationError
from ..attaching import after, before
from ..capabilities.packing import packing_form
from ..models.adapter import Handles, ModelAdapter
from ..pack import usual_tokens
from ..stream import by_token, given_out, with_given_out
from ..structure.graph import Structure

__all__ = ["Site", "last_logits", "rows_at_once", "sites_of", "tapped"]


@dataclass(frozen=True, eq=False)
class Site:
    """A module's output, or what its heads hand to their output projection.

    Args:
        path: the module that is asked for.
        module: the module that is observed.
        n_heads: 0 for the module's output; else what enters ``module`` are this many heads, side by side.
    """

    path: str
    module: nn.Module
    n_heads: int = 0


def sites_of(adapter: ModelAdapter, structure: Structure, paths: Iterable[str], heads: bool) -> list[Site]:
    """The sites of modules, each followed by that of its heads where it is attention or holds their way out."""
    modules = dict(adapter.hf_model.named_modules(remove_duplicate=False))
    layers = {index: _path_of(modules, layer) for index, layer in enumerate(adapter.layers)}
    found = []
    for path in paths:
        found.append(Site(path, modules[path]))
        for component in structure.components if heads else ():
            if (
                component.heads is None
                or component.layer is None
                or not path.startswith(f"{layers[component.layer]}.")
            ):
                continue
            if component.path == path or component.heads.path.startswith(f"{path}."):
                found.append(Site(path, component.heads.module, component.heads.n_heads))
    return found


def _path_of(modules: Mapping[str, nn.Module], module: nn.Module) -> str:
    return next(path for path, one in modules.items() if one is module)


def tapped(site: Site, rows: int, tokens: int, fn: Callable[[Tensor], Tensor | None]) -> Any:
    """Calls ``fn`` with a site's activations [rows, tokens, …] on every pass; what it returns takes their place.

    Returns:
        A handle with ``remove()``.
    """

    def put(value: Any) -> Any:
        each = by_token(value, rows, tokens)
        new = fn(_checked(site, each))
        return None if new is None else new.reshape(value.shape)

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = next(iter(kwargs)) if not args else ""
        new = put(args[0] if args else kwargs[name])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, name: new})

    def leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        new = put(given_out(output))
        return None if new is None else with_given_out(new, output)

    return before(site.module, enter) if site.n_heads else after(site.module, leave)


def _checked(site: Site, value: Tensor | None) -> Tensor:
    if value is None:
        raise ValidationError(
            f"{site.path} gave out something else in this pass than numbers for each token."
        )
    return value


def last_logits(adapter: ModelAdapter, ids: Tensor) -> Tensor:
    """[B, n_vocab] float32 logits at the last position of each row, as the model computes them.

    Args:
        adapter: the model.
        ids: [B, T] token ids.
    """
    head = adapter.head
    if head is None:
        raise ValidationError(f"{adapter.model_id} has no language head; load it with AutoModelForCausalLM.")

    def keep_last(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (args[0][:, -1:], *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: kwargs[name][:, -1:]}

    handles = Handles()
    handles.add(before(head, keep_last))
    with handles:
        logits: Tensor = adapter.call(input_ids=ids).logits
    return logits[:, -1].float()


def rows_at_once(adapter: ModelAdapter, tokens: int) -> int:
    """Rows of so many tokens that run in one pass: one where a model gives a text other results among others."""
    if packing_form(adapter, tokens) == "apart":
        return 1
    return max(1, usual_tokens(adapter.device) // tokens)
