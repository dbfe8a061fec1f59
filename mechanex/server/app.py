"""The application: what its requests share, its routers, its errors."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from .. import __version__
from ..errors import MechanexError, ValidationError
from .accounts.auth import OPEN_PATHS, WRONG_KEYS_PER_MINUTE, AuthenticationMiddleware
from .accounts.scopes import permitted
from .accounts.store import StorageError, open_store
from .axionic.guards import Guards
from .axionic.routes import axionic_router
from .http.errors import add_handlers
from .http.limits import TOKEN_HEADERS, RateLimit
from .http.middleware import RequestMiddleware
from .model.engine import ServingEngine
from .openai.embeddings import embeddings_router
from .openai.messages import messages_router
from .openai.responses import responses_router
from .openai.routes import openai_router
from .openai.tokens import tokens_router
from .page.files import page_paths
from .page.routes import page_router
from .settings import ServerSettings

if TYPE_CHECKING:
    from ..engine.models.resolve import LoadedModel
    from ..engine.vector_store import VectorStore
    from .model.wire import Lead

__all__ = ["create_app"]


_logger = logging.getLogger(__name__)

_CREDENTIALS_BYTES = 8 * 2**10  # what anyone may send


def create_app(
    settings: ServerSettings,
    loaded_model: LoadedModel,
    *,
    vectors: VectorStore | None = None,
    lead: Lead | None = None,
) -> FastAPI:
    """The server's application; the model's thread runs while the application does.

    ``app.state`` holds what handlers share:

    * ``settings``: the :class:`ServerSettings`.
    * ``engine``: the :class:`~mechanex.server.model.engine.ServingEngine`: ``engine.scheduler.submit_all(requests)``
      for text, ``await engine.scheduler.run(fn)`` for any other work on the model.
    * ``store``: accounts, their vectors and behaviors; see :class:`~mechanex.server.accounts.store.Store`.
    * ``server_key``: the key that opens the whole server, or None on a loopback address without one.
    * ``started``: seconds since 1970.

    Handlers learn the sender from :func:`mechanex.server.accounts.auth.principal`. They raise the library's errors,
    which become ``{"detail": …}`` with the status of the wire contract, and OpenAI's envelope under ``/v1``.

    Args:
        settings: how to serve.
        loaded_model: the model, with a tokenizer.
        vectors: the operator's stored vectors; by default those under ``MECHANEX_HOME``.
        lead: where other processes hear what is done, where the model is split over several; else None.

    Raises:
        ValidationError: settings that don't fit the model, or an address that others reach and no key for them.
        MechanexError: a database, folder or file that can't be used.
    """
    key = settings.server_key()
    if key is None and not settings.is_loopback:
        raise ValidationError(
            f"a server at {settings.host} is reached by other machines and needs a key: set MECHANEX_SERVER_KEY or "
            "key=…, or bind 127.0.0.1."
        )
    try:
        store = open_store(settings)
    except StorageError as error:
        raise MechanexError(error.message) from error  # nobody asked over HTTP, so no status
    try:
        engine = ServingEngine(settings, loaded_model, store.library, vectors, lead)
    except BaseException:
        store.close()
        raise

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.scheduler.start()
        try:
            yield
        finally:
            await engine.scheduler.drain(settings.shutdown_grace)
            store.close()

    app = FastAPI(
        title="Mechanex",
        version=__version__,
        description="An OpenAI-compatible server that steers each request its own way, and the Axionic API.",
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        dependencies=[Depends(permitted)],
    )
    app.state.settings, app.state.engine, app.state.store = settings, engine, store
    app.state.server_key, app.state.started = key, time.time()
    app.state.public = engine.public
    app.state.wrong_keys = RateLimit("wrong keys from this address", WRONG_KEYS_PER_MINUTE)
    app.state.guards, app.state.token_quota = Guards(settings), engine.scheduler.quota
    app.state.open_paths = OPEN_PATHS | page_paths()
    add_handlers(app)
    app.include_router(openai_router())
    app.include_router(embeddings_router())
    app.include_router(responses_router())
    app.include_router(messages_router())
    app.include_router(tokens_router())
    app.include_router(axionic_router())
    app.include_router(page_router())
    _add_operation(app)
    app.add_middleware(AuthenticationMiddleware, open_paths=app.state.open_paths)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],  # clients have their own, OpenAI's among them
            expose_headers=["x-request-id", "retry-after", *TOKEN_HEADERS],
        )
    app.add_middleware(
        RequestMiddleware,
        metrics=engine.metrics,
        max_body_bytes=settings.max_body_bytes,
        small_bodies={"/auth/": _CREDENTIALS_BYTES},
    )
    return app


def _add_operation(app: FastAPI) -> None:
    @app.get("/health", tags=["operation"])
    async def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok", "version": __version__}

    @app.get("/version", tags=["operation"])
    async def version() -> dict[str, str]:
        """The library's version."""
        return {"version": __version__}

    @app.get("/ready", tags=["operation"], responses={503: {"description": "Not yet, or no longer."}})
    async def ready(request: Request) -> Response:
        """Whether requests for text are taken."""
        is_ready = request.app.state.engine.scheduler.ready
        body = {"status": "ready" if is_ready else "not ready"}
        return JSONResponse(body, status_code=200 if is_ready else 503)

    @app.get("/metrics", tags=["operation"], response_class=Response)
    async def metrics(request: Request) -> Response:
        """Counters in Prometheus' text format: of all clients, and so for the operator."""
        return Response(request.app.state.engine.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/openapi.json", include_in_schema=False)
    async def document(request: Request) -> dict[str, Any]:
        return dict(request.app.openapi())
