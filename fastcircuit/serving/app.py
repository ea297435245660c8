"""The HTTP side: OpenAI's routes over engines."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from fastcircuit.serving.answer import Answer
from fastcircuit.serving.body import parse
from fastcircuit.serving.engine import Engine
from fastcircuit.serving.errors import ApiError

_GONE = 499  # what nginx writes in its log for a client that left; nobody reads it


def create_app(engines: Mapping[str, Engine]) -> FastAPI:
    """The application that serves ``engines`` by name, and closes them when it shuts down."""
    started = int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        for engine in engines.values():
            engine.close()

    app = FastAPI(title="fastcircuit", lifespan=lifespan, openapi_url=None)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected_error)

    def find(name: str) -> Engine:
        if name not in engines:
            raise ApiError(
                f"the model {name!r} does not exist; served here: {', '.join(engines)}",
                param="model",
                status=404,
                code="model_not_found",
            )
        return engines[name]

    def describe(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": started,
            "owned_by": "fastcircuit",
            "max_model_len": engines[name].max_positions,
        }

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "models": {name: engine.load() for name, engine in engines.items()}}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [describe(name) for name in engines]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        find(name)
        return describe(name)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = parse(await request.body())
        answer = Answer(body, find(body.model))
        if body.stream:
            return StreamingResponse(_events(answer), media_type="text/event-stream")
        return await _unless_gone(request, answer)

    return app


async def _events(answer: Answer) -> AsyncIterator[str]:
    """Server-sent events, the last one ``[DONE]`` unless the answer broke off."""
    try:
        async for chunk in answer.chunks():
            yield _event(chunk)
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body)
    finally:
        answer.cancel()


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def _unless_gone(request: Request, answer: Answer) -> Response:
    """The whole answer, given up as soon as the client hangs up."""
    work = asyncio.ensure_future(answer.whole())
    hang_up = asyncio.ensure_future(request.receive())  # the body is read: all that can come is a disconnect
    try:
        await asyncio.wait([work, hang_up], return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(work.result()) if work.done() else Response(status_code=_GONE)
    finally:
        answer.cancel()
        work.cancel()
        hang_up.cancel()


async def _api_error(request: Request, error: Any) -> Response:
    return JSONResponse(error.body, status_code=error.status)


async def _http_error(request: Request, error: Any) -> Response:
    """An unknown route or a wrong method."""
    message = f"{request.method} {request.url.path}: {error.detail}; served: /v1/models, /v1/completions, /health"
    return JSONResponse(ApiError(message).body, status_code=error.status_code, headers=error.headers)


async def _unexpected_error(request: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(f"unexpected {type(error).__name__}", status=500).body, status_code=500)
