"""The client object: a model, its stored vectors, and the modules that work with them."""

from __future__ import annotations

import gc
import logging
import sys
import threading
from typing import TYPE_CHECKING, Any

from .errors import MechanexError, ValidationError
from .generation import GenerationModule
from .steering import SteeringModule

if TYPE_CHECKING:
    from torch import nn

    from .engine.models.resolve import LoadedModel
    from .engine.vector_store import VectorStore

__all__ = ["EXECUTION_MODES", "Mechanex", "default_client"]

_logger = logging.getLogger(__name__)

EXECUTION_MODES = ("auto", "remote", "local")


class Mechanex:
    """A client for steering language models on this machine.

    Attributes:
        generation: text generation.
        steering: steering vectors.
    """

    def __init__(self) -> None:
        self.generation: GenerationModule = GenerationModule(self)
        self.steering: SteeringModule = SteeringModule(self)
        self._loaded: LoadedModel | None = None
        self._vectors: VectorStore | None = None
        self._execution_mode = "auto"

    @property
    def local_model(self) -> nn.Module | None:
        """The loaded model, or None."""
        return self._loaded.model if self._loaded is not None else None

    @property
    def tokenizer(self) -> Any:
        """The loaded model's tokenizer, or None."""
        return self._loaded.tokenizer if self._loaded is not None else None

    @property
    def model_name(self) -> str | None:
        """Name or path of the loaded model, or None."""
        return self._loaded.name if self._loaded is not None else None

    @property
    def execution_mode(self) -> str:
        """``"auto"``, ``"remote"`` or ``"local"``."""
        return self._execution_mode

    @property
    def vectors(self) -> VectorStore:
        """The stored steering vectors, by id."""
        if self._vectors is None:
            from .engine.vector_store import VectorStore

            self._vectors = VectorStore()
        return self._vectors

    def load(self, model_name: str, **kwargs: Any) -> Mechanex:
        """Alias for load_model."""
        return self.load_model(model_name, **kwargs)

    def load_model(self, model_name: str, backend: str = "auto", **kwargs: Any) -> Mechanex:
        """Loads a model into this process, in place of the one that was there.

        The earlier model stays until the new one is loaded, and stays if that fails; call ``unload`` first
        where memory doesn't hold both.

        Args:
            model_name: ``"mx-tiny"`` (bundled), a folder, a Hugging Face or a TransformerLens short name.
            backend: ``"transformers"``, ``"transformer_lens"``, or ``"auto"``: TransformerLens where it is
                installed, else transformers.
            kwargs: passed on to the library that loads the model.

        Returns:
            This client.

        Raises:
            NotFoundError: no such model.
            ValidationError: an unknown backend or an unsupported model.
        """
        from .engine.models.resolve import load

        self._loaded = load(model_name, backend=backend, **kwargs)
        _release_memory()
        return self

    def unload(self) -> Mechanex:
        """Alias for unload_model."""
        return self.unload_model()

    def unload_model(self) -> Mechanex:
        """Unloads the local model and clears associated metadata; its memory is free. Stored vectors stay.

        Returns:
            This client.
        """
        self._loaded = None
        _release_memory()
        return self

    def set_local_model(self, model: Any, tokenizer: Any = None) -> Mechanex:
        """Uses a model that is already in memory.

        Args:
            model: a Hugging Face causal model or a TransformerLens model.
            tokenizer: its tokenizer; not needed where the model carries one, as TransformerLens models do.

        Returns:
            This client.

        Raises:
            ValidationError: not a model, or one whose decoder layers aren't found.
        """
        from .engine.models import adapter_for
        from .engine.models.resolve import LoadedModel

        adapter = adapter_for(model)
        backend = "transformers" if adapter.hf_model is adapter.model else "transformer_lens"
        if tokenizer is not None:
            adapter.tokenizer = tokenizer
        if adapter.tokenizer is None:
            _logger.warning(
                "%s comes without a tokenizer: pass set_local_model(model, tokenizer) to work with text",
                adapter.model_id,
            )
        self._loaded = LoadedModel(adapter.model, adapter.tokenizer, adapter.model_id, backend)
        return self

    def set_execution_mode(self, mode: str) -> Mechanex:
        """Chooses where calls run: ``"auto"``, ``"remote"`` or ``"local"``.

        This version runs everything here; in ``"remote"`` mode calls raise an error.

        Raises:
            ValidationError: an unknown mode.
        """
        if mode not in EXECUTION_MODES:
            raise ValidationError(f"the execution mode is one of {', '.join(EXECUTION_MODES)}; got {mode!r}.")
        self._execution_mode = mode
        return self

    def require_local(self, caller: str) -> LoadedModel:
        """The loaded model, for a call that needs one.

        Args:
            caller: the call's documented name, for the message.

        Raises:
            MechanexError: the mode is ``"remote"``, or no model is loaded; names the ways out.
        """
        if self._execution_mode == "remote":
            raise MechanexError(
                f"{caller} was asked to run remotely, and this version has no HTTP client yet: load a "
                "model and call set_execution_mode('local'), or wait for the version that runs remotely."
            )
        if self._loaded is None:
            raise MechanexError(
                f"{caller} needs a model: load one with load('mx-tiny'), load('<Hugging Face name>') or "
                "set_local_model(model, tokenizer). The HTTP client, the other way, comes in a later version."
            )
        return self._loaded


_default: Mechanex | None = None
_default_lock = threading.Lock()


def default_client() -> Mechanex:
    """The client behind ``mechanex.load``, ``mechanex.generation`` and the like; made on first use."""
    global _default
    with _default_lock:
        if _default is None:
            _default = Mechanex()
        return _default


def _release_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
