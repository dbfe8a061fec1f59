"""TransformerLens models: the same sites as for Hugging Face models, through TransformerLens' hook points."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from ...errors import ValidationError
from ...ops.head import Head
from ..attaching import after, before
from ..following.calls import Followed
from ..following.facts import flat
from ..following.generating import watch_generate
from ..positions import Positions, positions_are_given, set_positions
from ..stream import others, residual
from .adapter import Following, ResidualHook
from .huggingface import HuggingFaceAdapter, is_traced

__all__ = ["HookedTransformerAdapter", "TransformerLensAdapter", "is_transformer_lens"]


def _is_a(model: object, name: str) -> bool:
    kinds = type(model).__mro__
    return any(k.__name__ == name and k.__module__.partition(".")[0] == "transformer_lens" for k in kinds)


def is_transformer_lens(model: object) -> bool:
    """Whether this is a ``TransformerBridge`` or ``HookedTransformer``; never imports TransformerLens."""
    return _is_a(model, "TransformerBridge") or _is_a(model, "HookedTransformer")


class TransformerLensAdapter(HuggingFaceAdapter):
    """A ``TransformerBridge`` (TransformerLens 4), or, as a subclass, a ``HookedTransformer`` (3).

    A bridge has replaced the decoder layers of the transformers model inside it by blocks of its own, so
    calls of either run the same blocks and pass the same hook points.

    Args:
        model: the TransformerLens model.

    Raises:
        ValidationError: the bridge holds no transformers model in this process, or has no list of blocks.
    """

    def __new__(cls, model: nn.Module) -> TransformerLensAdapter:
        return super().__new__(cls if _is_a(model, "TransformerBridge") else HookedTransformerAdapter)

    def __init__(self, model: nn.Module) -> None:
        inner = self._transformers_model(model)
        blocks = model._modules.get("blocks")
        if inner is None or getattr(inner, "config", None) is None or not isinstance(blocks, nn.ModuleList):
            raise ValidationError(
                f"This {type(model).__name__} can't be steered: it needs a transformers model here, "
                "with its decoder layers as `blocks`. Make one with mechanex.load(name), or load the plain "
                "model with mechanex.load(name, backend='transformers')."
            )
        super().__init__(inner)
        self.model = model
        self.layers = list(blocks)
        self.tokenizer = getattr(model, "tokenizer", None)
        name = getattr(inner, "name_or_path", "") or getattr(getattr(model, "cfg", None), "model_name", "")
        self.model_id = name or self.model_id

    @staticmethod
    def _transformers_model(model: nn.Module) -> nn.Module | None:
        inner = getattr(model, "original_model", None)
        return inner if isinstance(inner, nn.Module) else None

    def on_residual(self, layer: int, fn: ResidualHook) -> Any:
        index = self.layer_index(layer)
        last = index == self.n_layers
        point = self.layers[-1].hook_resid_post if last else self.layers[index].hook_resid_pre
        assert isinstance(point, nn.Module)
        stream = self.stream

        def hook(_module: nn.Module, _inputs: Any, hidden: Tensor) -> Tensor | None:
            stream.check(hidden)
            return fn(hidden)

        # Not point.add_hook: reset_hooks() would remove it behind our back.
        return after(point, hook, traced=is_traced(fn))


class HookedTransformerAdapter(TransformerLensAdapter):
    """A ``HookedTransformer`` (TransformerLens 3 and earlier), which has its own modules throughout."""

    @staticmethod
    def _transformers_model(model: nn.Module) -> nn.Module:
        return _AsTransformers(model)

    @property
    def unembedding(self) -> Head:
        head: Any = self.model.unembed
        return Head(self._matrix, head.b_U, 1.0, self.config.final_logit_softcapping)

    @property
    def _matrix(self) -> Tensor:
        head: Any = self.model.unembed
        matrix: Tensor = head.W_U.T
        return matrix

    def _follow(self) -> Following:
        """Follows the blocks: ``HookedTransformer.generate`` runs ``forward`` past any hook on the model."""
        followed = Followed()
        blocks, following = _BlockFollower(followed), Following(followed)
        for index, block in enumerate(self.layers):
            following.add(before(block, blocks.entering(index)))
            following.add(after(block, blocks.left, always=True))
        for watched in watch_generate([self.model], followed, self.d_model):
            following.add(watched)
        return following


class _BlockFollower:
    """Reads positions from what the blocks are called with; the first block of a pass speaks for all."""

    def __init__(self, followed: Followed) -> None:
        self._followed = followed
        self._pass: Positions | None = None
        self._last = -1

    def entering(self, index: int) -> Any:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, (positional, named) = residual(args, kwargs), others(args, kwargs)
            given = [*positional, *named.values()]
            if self._pass is None or index <= self._last or self._pass.shape != tuple(hidden.shape[:2]):
                # A block's own keys and values, which it adds to when it runs.
                cache = next((v for v in given if hasattr(v, "past_keys")), None)
                past = 0 if cache is None else int(cache.past_keys.shape[1])
                self._pass = self._followed.derive(hidden, flat(given), (), cache, past)
            self._last = index
            self._followed.begin((), {})
            if not positions_are_given():
                set_positions(self._pass)

        return enter

    def left(self, *_: Any) -> None:
        self._followed.end()


class _AsTransformers(nn.Module):
    """A ``HookedTransformer`` behind the part of a transformers model's interface that the engine uses."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.layers = model.blocks
        self.norm = model.ln_final
        self.hooked = model
        cfg = model.cfg
        self.name_or_path = cfg.model_name
        softcap = getattr(cfg, "output_logits_soft_cap", None)
        self.config = SimpleNamespace(
            vocab_size=cfg.d_vocab,
            hidden_size=cfg.d_model,
            num_hidden_layers=cfg.n_layers,
            max_position_embeddings=cfg.n_ctx,
            sliding_window=cfg.window_size if getattr(cfg, "use_local_attn", False) else None,
            final_logit_softcapping=softcap if softcap is not None and softcap > 0 else None,
            is_encoder_decoder=False,
        )

    def get_input_embeddings(self) -> Any:
        return self.hooked.embed

    def get_output_embeddings(self) -> Any:
        return self.hooked.unembed

    def forward(self, input_ids: Tensor, attention_mask: Any = None, **options: Any) -> SimpleNamespace:
        unknown = [k for k, v in options.items() if k not in ("use_cache", "return_dict") and v is not None]
        if attention_mask is not None and not (
            isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
        ):
            unknown.append("a mask of another shape")
        if unknown:
            raise TypeError(
                f"A HookedTransformer takes token ids and a [batch, length] mask; got {', '.join(unknown)}."
            )
        logits = self.hooked(input_ids, attention_mask=attention_mask, return_type="logits")
        return SimpleNamespace(logits=logits)
