"""The application: routes, errors, health and metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from expunge.core.version import __version__
from expunge.serving import route_answers, route_requests
from expunge.serving.errors import Refused
from expunge.serving.limits import BodyLimit
from expunge.serving.parts import Parts, parts_of

FOLLOW = 0.4  #: seconds between two looks at the store


class ErrorBody(BaseModel):
    """What went wrong."""

    error: dict[str, Any]


_ERRORS: dict[int | str, dict[str, Any]] = {
    s: {"model": ErrorBody} for s in (400, 401, 403, 404, 405, 409, 413, 422, 429, 500, 502, 503, 504, 507)
}  # fmt: skip


def make_app(parts: Parts) -> FastAPI:
    """The application of one server. The backend is closed when it ends, once every answer that has begun is finished."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await parts.requests.follow()
        follower = asyncio.create_task(parts.requests.keep_up(FOLLOW))
        if parts.canaries is not None:
            parts.canaries.start()
        try:
            yield
        finally:
            if parts.canaries is not None:
                await parts.canaries.stop()
            follower.cancel()
            with suppress(asyncio.CancelledError):
                await follower
            await parts.backend.close()

    app = FastAPI(title="Expunge", version=__version__, lifespan=lifespan, responses=_ERRORS, redoc_url=None)
    app.state.parts = parts
    app.include_router(route_answers.router)
    app.include_router(route_requests.router)
    _state(app)
    _errors(app)

    @app.middleware("http")
    async def counted(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        route = getattr(request.scope.get("route"), "path", "none")
        parts.telemetry.requests.labels(route, str(response.status_code)).inc()
        return response

    app.add_middleware(BodyLimit, limit=parts.limits.body)
    return app


def _state(app: FastAPI) -> None:
    @app.get("/health", tags=["state"])
    async def health() -> dict[str, str]:
        """Whether the process lives."""
        return {"status": "ok"}

    @app.get("/ready", tags=["state"], response_model=None)
    async def ready(request: Request) -> Response:
        """Whether requests would be answered now, with all hidden that is to be."""
        parts = parts_of(request)
        up = await parts.backend.ready() and not parts.requests.open and not parts.requests.behind
        said: dict[str, Any] = {
            "targets": len(parts.policy.targets), "open": len(parts.requests.open), "behind": parts.requests.behind,
        }  # fmt: skip
        if parts.canaries is not None:  # told, and no reason to take a server away: the others have the same guards
            said["canaries"] = {"failing": parts.canaries.failing, "overdue": parts.canaries.overdue}
        return JSONResponse({"status": "ready" if up else "not ready", **said}, 200 if up else 503)

    @app.get("/metrics", tags=["state"], response_class=PlainTextResponse)
    async def metrics(request: Request) -> Response:
        """Counts and times, as Prometheus reads them."""
        return Response(parts_of(request).telemetry.page(), media_type="text/plain; version=0.0.4")


def _errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        # Neither names that the client has made up nor the library's sentences: both can quote what was sent.
        where = ".".join(str(p) for p in first["loc"][1:] if first["type"] != "extra_forbidden")[:100]
        said = f"The request is not understood{f' at {where!r}' if where else ''}: {first['type'].replace('_', ' ')}."
        made = Refused(400, said, where or None)
        return JSONResponse(made.body(), made.status)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        said = str(error.detail).rstrip(".") + "." if error.status_code in (404, 405) else "The request is not understood."
        made = Refused(error.status_code, said)
        return JSONResponse(made.body(), made.status, headers=error.headers)
