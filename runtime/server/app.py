"""The FastAPI application: routes, and every error as OpenAI's clients expect it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from atomc.errors import AtomcError
from atomc.runtime.frontend import Frontend
from atomc.runtime.server.chat import chat
from atomc.runtime.server.completions import complete
from atomc.runtime.server.problems import ApiError
from atomc.runtime.server.recipe import ChatFormat
from atomc.runtime.server.schema import ChatBody, CompletionBody, parse

MAX_BODY_BYTES = 32 * 2**20

_log = logging.getLogger(__name__)


def create_app(engine: Frontend, *, names: Sequence[str] = ()) -> FastAPI:
    """Serves `engine` under `names`, by default the artifact's model name. Does not own the engine's life."""
    serving = engine.serving
    models = tuple(names) or (serving.model_name,)
    form = ChatFormat(engine.tokenizer_path)
    created = int(time.time())
    # No OpenAPI page: bodies are checked by msgspec, so FastAPI would have nothing true to say about them.
    app = FastAPI(title="atomc", openapi_url=None)

    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "atomc",
            "max_model_len": serving.max_context,
        }

    def known(name: str) -> None:
        if name not in models:
            raise ApiError(
                404,
                f"The model {name!r} does not exist; this server has {', '.join(models)}.",
                type="not_found_error",
                param="model",
                code="model_not_found",
            )

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = parse(await _read(request), CompletionBody)
        known(body.model)
        return await complete(engine, body, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = parse(await _read(request), ChatBody)
        known(body.model)
        return await chat(engine, form, body, request)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in models]}

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        known(name)
        return card(name)

    @app.get("/health")
    async def health() -> Response:
        status = engine.status
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(engine.metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    _add_error_handlers(app)
    return app


async def _read(request: Request) -> bytes:
    """The body; refuses one that no prompt can need before it fills the memory."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise ApiError(413, f"The body is larger than {MAX_BODY_BYTES} bytes.", code="body_too_large")
        parts.append(part)
    return b"".join(parts)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(AtomcError)
    async def atomc_error(request: Request, error: AtomcError) -> Response:
        return ApiError.of(error).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> Response:
        _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return ApiError(500, "Internal error of the server.", code="internal_error").response()
