"""Mechanex changes what a language model does by editing its residual stream while it runs.

``mechanex.load("mx-tiny")`` and the like act on a default client; ``mechanex.Mechanex()`` makes another one.
Names are loaded when they are first used: importing the package imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _default
from ._version import __version__

_SUBMODULES = frozenset(
    {
        "attribution",
        "backends",
        "bundled",
        "client",
        "distributed",
        "engine",
        "errors",
        "eval",
        "generation",
        "model",
        "ops",
        "raag",
        "sae",
        "serving",
        "steering",
        "utils",
    }
)
_NAMES = {
    "Chat": "engine.chat",
    "Mechanex": "client",
    "SteeringVector": "engine.vectors",
    "APIError": "errors",
    "AuthenticationError": "errors",
    "MechanexError": "errors",
    "NotFoundError": "errors",
    "RateLimitError": "errors",
    "ValidationError": "errors",
}
_CLIENT_METHODS = frozenset(
    {
        "change_password",
        "create_api_key",
        "delete_account",
        "delete_api_key",
        "end_session",
        "get_huggingface_models",
        "list_api_keys",
        "list_sessions",
        "load",
        "load_model",
        "login",
        "logout",
        "reset",
        "serve",
        "set_execution_mode",
        "set_key",
        "set_local_model",
        "set_model",
        "set_token",
        "signup",
        "unload",
        "unload_model",
        "whoami",
    }
)


def _new_client() -> Any:
    from .client import Mechanex

    return Mechanex()


_default.made_by(_new_client)

if TYPE_CHECKING:
    from . import (
        attribution,
        backends,
        bundled,
        client,
        distributed,
        engine,
        errors,
        generation,
        model,
        ops,
        raag,
        sae,
        serving,
        steering,
        utils,
    )
    from .client import Mechanex
    from .engine.chat import Chat
    from .engine.vectors import SteeringVector
    from .errors import (
        APIError,
        AuthenticationError,
        MechanexError,
        NotFoundError,
        RateLimitError,
        ValidationError,
    )

    _client = client.default_client()
    change_password = _client.change_password
    create_api_key = _client.create_api_key
    delete_account = _client.delete_account
    delete_api_key = _client.delete_api_key
    end_session = _client.end_session
    get_huggingface_models = _client.get_huggingface_models
    list_api_keys = _client.list_api_keys
    list_sessions = _client.list_sessions
    load = _client.load
    load_model = _client.load_model
    login = _client.login
    logout = _client.logout
    reset = _client.reset
    serve = _client.serve
    set_execution_mode = _client.set_execution_mode
    set_key = _client.set_key
    set_local_model = _client.set_local_model
    set_model = _client.set_model
    set_token = _client.set_token
    signup = _client.signup
    unload = _client.unload
    unload_model = _client.unload_model
    whoami = _client.whoami
else:

    def __getattr__(name: str) -> Any:
        if name in _CLIENT_METHODS:
            return getattr(_default.client(), name)
        if name in _SUBMODULES:
            return importlib.import_module(f".{name}", __name__)
        if name in _NAMES:
            found = getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)
            globals()[name] = found
            return found
        raise AttributeError(f"module 'mechanex' has no attribute {name!r}")


__all__ = [
    "APIError",
    "AuthenticationError",
    "Chat",
    "Mechanex",
    "MechanexError",
    "NotFoundError",
    "RateLimitError",
    "SteeringVector",
    "ValidationError",
    "__version__",
    "attribution",
    "backends",
    "bundled",
    "change_password",
    "client",
    "create_api_key",
    "delete_account",
    "delete_api_key",
    "distributed",
    "end_session",
    "engine",
    "errors",
    "generation",
    "get_huggingface_models",
    "list_api_keys",
    "list_sessions",
    "load",
    "load_model",
    "login",
    "logout",
    "model",
    "ops",
    "raag",
    "reset",
    "sae",
    "serve",
    "serving",
    "set_execution_mode",
    "set_key",
    "set_local_model",
    "set_model",
    "set_token",
    "signup",
    "steering",
    "unload",
    "unload_model",
    "utils",
    "whoami",
]


def __dir__() -> list[str]:
    # What this file needs itself is nobody's to use; tools look for the names with two underscores.
    own = {name for name in globals() if name.startswith("__")}
    return sorted({*own, *__all__, *_SUBMODULES})
