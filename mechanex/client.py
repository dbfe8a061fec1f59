"""The client object: a model, its stored vectors, and the modules that work with them."""

from __future__ import annotations

import gc
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

from . import _default
from .attribution import AttributionModule
from .errors import MechanexError, ValidationError
from .generation import GenerationModule
from .home import vectors_folder
from .model import ModelModule
from .raag import RAAGModule
from .remote.account import AccountCalls
from .remote.address import Address
from .remote.answers import names
from .remote.credentials import CredentialStore
from .remote.transport import MAX_ANSWER_BYTES, Transport
from .sae import SAEModule
from .steering import SteeringModule

if TYPE_CHECKING:
    from torch import nn

    from .engine.models.resolve import LoadedModel
    from .engine.vector_store import VectorStore
    from .server.serve import RunningServer
    from .vllm.launch import RunningEngine

__all__ = ["EXECUTION_MODES", "Mechanex", "default_client"]

_logger = logging.getLogger(__name__)

EXECUTION_MODES = ("auto", "remote", "local")


class Mechanex(AccountCalls):
    """A client for interacting with the Axionic API, and for steering language models on this machine.

    Making one does no I/O. Local work needs no key; ``set_execution_mode`` says where calls run.

    Args:
        base_url: the server; ``MECHANEX_BASE_URL`` goes before it, and the public backend is the default.
        api_key: goes before ``MECHANEX_API_KEY``, which goes before the file of stored credentials
            (``MECHANEX_CONFIG``, or ``~/.mechanex/config.json``).
        timeout: seconds that any call to the server may take; by default 30, and 600 for those that run a model.
        allow_http: send credentials over plain http to other machines (``MECHANEX_ALLOW_HTTP=1`` does too).
        max_answer_bytes: most bytes of a server's answer, packed and unpacked; 64 MiB by default.

    Attributes:
        generation: text generation.
        steering: steering vectors.
        sae: behaviors, watched and corrected through sparse autoencoders.
        attribution: attribution patching.
        model: the model's structure.
        raag: retrieval-augmented answers.
        transport: the HTTP calls.

    Raises:
        ValidationError: an ``api_key`` that can't be one, or a timeout that isn't above 0.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float | None = None,
        allow_http: bool = False,
        max_answer_bytes: int = MAX_ANSWER_BYTES,
    ) -> None:
        self.generation: GenerationModule = GenerationModule(self)
        self.steering: SteeringModule = SteeringModule(self)
        self.sae: SAEModule = SAEModule(self)
        self.attribution: AttributionModule = AttributionModule(self)
        self.model: ModelModule = ModelModule(self)
        self.raag: RAAGModule = RAAGModule(self)
        self.transport = Transport(
            CredentialStore(api_key),
            base_url,
            timeout=timeout,
            allow_http=allow_http,
            max_answer_bytes=max_answer_bytes,
        )
        self._loaded: LoadedModel | None = None
        self._vectors: VectorStore | None = None
        self._execution_mode = "auto"

    def __repr__(self) -> str:
        model = "no model" if self.model_name is None else f"model={self.model_name!r}"
        return f"Mechanex({model}, mode={self.execution_mode!r})"

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

    def reset(self, model: Any = None) -> None:
        """Removes all steering of this library from a model: what was attached and whose handle is lost, say.

        Orthogonalized weights are put back as they were. The handles do nothing from then on, other hooks stay, and so
        do stored vectors.

        Args:
            model: a Hugging Face or TransformerLens model or its adapter; None for the loaded one.

        Raises:
            MechanexError: no model is given or loaded.
            ValidationError: not a model.
        """
        if model is None:
            if self._loaded is None:
                raise MechanexError("reset needs a model: reset(model), or load one first with load(…).")
            model = self._loaded.model
        from .engine.reset import reset

        reset(model)

    @staticmethod
    def get_huggingface_models(host: str = "127.0.0.1", port: int = 8000) -> list[str]:
        """Fetches the list of available public models from the server at this host and port.

        This is a static method and does not require a model to be loaded. It sends no credentials, so
        a server that asks every client for a key, as one bound to more than loopback does, answers 401.

        Raises:
            ValidationError: a host that is no text, or a port that is none.
            AuthenticationError: the server wants a key; ``Mechanex(base_url, api_key)`` sends one.
            APIError: no server there, or one that answers something else.
        """
        if not isinstance(host, str) or not host.strip():
            raise ValidationError(f"host is a name or an address, such as '127.0.0.1'; got {host!r}.")
        if isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 1 << 16:
            raise ValidationError(f"port is an int from 1 to 65535; got {port!r}.")
        where = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        transport = Transport(CredentialStore(), Address(where, where, True))
        try:
            return names(transport.call("GET", "/models", signed="no"), "get_huggingface_models")
        finally:
            transport.close()

    def serve(
        self,
        model: Any = None,
        host: str = "0.0.0.0",
        port: int = 8000,
        use_vllm: bool = False,
        corrected_behaviors: list[str] | None = None,
        *,
        block: bool = True,
        **settings: Any,
    ) -> RunningServer | RunningEngine | None:
        """Turns the model into an OpenAI-compatible endpoint, with the Axionic API beside it, until it is stopped.

        Blocks until SIGINT (Ctrl-C) or SIGTERM, or with ``block=False`` serves from a thread. An address that other
        machines reach needs a key from every client: ``MECHANEX_SERVER_KEY``, an account's, or one that is made and
        printed when there is none. Where ``load(…, tp="auto")`` has split the model over processes, all of them call
        this and serve it together (docs/scale.md).

        Args:
            model: a name to load, or a model; None for the loaded one. It stays this client's model.
            host: address to bind; ``127.0.0.1`` for this machine only.
            port: TCP port.
            use_vllm: run the model in vLLM; it needs a name or a folder.
            corrected_behaviors: names of behaviors that are corrected in every answer, unless its request names others.
            block: False, for notebooks and programs that go on, serves from a thread.
            settings: ``vectors`` (a folder of vector files for every client), ``behaviors`` (contrastive examples),
                ``database``, ``key`` and the limits of ``mechanex.server.settings.ServerSettings``. With
                ``use_vllm``: ``vectors``, ``behaviors`` (files of behaviors), ``key``, ``model_name``, ``max_batch``,
                and ``vllm_args``, a list of arguments of ``vllm serve``.

        Returns:
            With ``block=False``, once it answers, a handle with ``url``, ``key`` and ``stop()``, which is a context
            manager too; else None, once it has ended.

        Raises:
            MechanexError: no model, the ``serve`` extra is missing, the address is taken, or an event loop runs in this
                thread and ``block`` is True.
            ValidationError: a setting out of its range, ``use_vllm`` without vLLM, or a behavior that isn't known.
        """
        from .serving import check_no_loop, serve

        check_no_loop(block)  # before a model is loaded
        if use_vllm:
            from .vllm.supported import check_installed

            check_installed()
            from .vllm.launch import serve_vllm

            given = {"host": host, "port": port, "corrected_behaviors": corrected_behaviors, **settings}
            arguments = given.pop("vllm_args", ())
            return serve_vllm(self._named(model), given, vllm_args=arguments, block=block)
        if isinstance(model, str | os.PathLike):
            self.load_model(os.fspath(model))
        elif model is not None:
            self.set_local_model(model)
        if self._loaded is None:
            raise MechanexError(
                "serve needs a model: serve('mx-tiny'), serve(model), or load one first with load(…)."
            )
        return serve(
            self._loaded,
            host=host,
            port=port,
            corrected_behaviors=corrected_behaviors,
            stored=self.vectors,
            block=block,
            **settings,
        )

    def _named(self, model: Any) -> str:
        """The name or folder of the model that vLLM is to load."""
        if isinstance(model, str | os.PathLike):
            return os.fspath(model)
        if model is None and self._loaded is not None and self._loaded.name:
            return self._loaded.name
        raise ValidationError(
            "use_vllm loads a model by its name or folder: serve('name', use_vllm=True), with save_pretrained before "
            "for a model of your own."
        )

    def set_execution_mode(self, mode: str) -> Mechanex:
        """Chooses where calls run: ``"auto"``, ``"remote"`` or ``"local"``.

        ``auto``, the default, asks the server first where there is a key or token, and runs on the loaded
        model, with a warning, when the server can't be reached, refuses the credentials or fails.

        Raises:
            ValidationError: an unknown mode.
        """
        if mode not in EXECUTION_MODES:
            raise ValidationError(f"the execution mode is one of {', '.join(EXECUTION_MODES)}; got {mode!r}.")
        self._execution_mode = mode
        return self

    def has_vector(self, vector_id: str) -> bool:
        """Whether vectors with this id are stored on this machine; told without importing torch where they aren't."""
        if self._vectors is None and not (vectors_folder() / f"{vector_id}.safetensors").exists():
            return False
        return vector_id in self.vectors

    def require_local(self, caller: str, only_local: str | None = None) -> LoadedModel:
        """The loaded model, for a call that needs one.

        Args:
            caller: the call's documented name, for the message.
            only_local: why no server can be asked instead, if none can.

        Raises:
            MechanexError: the mode is ``"remote"``, or no model is loaded; names the ways out.
        """
        if self._execution_mode == "remote":
            raise MechanexError(
                f"{caller} runs on a local model only, and the mode is 'remote': load a model and call "
                "set_execution_mode('local') or ('auto')."
            )
        if self._loaded is None:
            or_ask = (
                " Or ask a server: login(email, password), set_key(key) or MECHANEX_API_KEY, and "
                "MECHANEX_BASE_URL for one of your own."
            )
            if self._execution_mode == "local":
                only_local, or_ask = None, ""
            elif only_local is not None:
                or_ask = ""
            why = "" if only_local is None else f" here, since it can't run on a server ({only_local})"
            raise MechanexError(
                f"{caller} needs a model{why}: load one with load('mx-tiny'), load('<Hugging Face name>') or "
                f"set_local_model(model, tokenizer).{or_ask}"
            )
        return self._loaded


def default_client() -> Mechanex:
    """The client behind ``mechanex.load``, ``mechanex.generation`` and the like; made on first use."""
    found: Mechanex = _default.client()
    return found


def _release_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
