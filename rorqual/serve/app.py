"""The application: routes on models, and nothing that thinks.

    app = create_app({"nano": ServedModel(engine, tokenizer, template, name="nano", created=0)}, Settings())

The same API answers under `/`, `/v1`, `/beta`, `/beta/v1` and `/anthropic`, because clients hard-code each of them. There
are no globals: routes are closures over the models and settings of this one app, so two apps live in one
process. The lifespan starts the engines and stops them; until it has, `/ready` says 503. No torch here or
below.

Left out: FastAPI's /docs pages (they load scripts from other hosts) and its OpenAPI file (it would describe
our bodies, but not our streams and errors; the reference in docs/ does).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from rorqual.errors import ConfigError, RorqualError
from rorqual.serve.border import Border, answer_error, answer_nobody
from rorqual.serve.errors import engine_gone
from rorqual.serve.prepare import Platform
from rorqual.serve.routes import api
from rorqual.serve.served import GenerationDefaults, ServedModel
from rorqual.serve.settings import Settings
from rorqual.serve.static import PageFile, answer_file, load_page

__all__ = ["GenerationDefaults", "ServedModel", "Settings", "create_app"]

PREFIXES = ("", "/v1", "/beta", "/beta/v1", "/anthropic", "/anthropic/v1")
PROBES = ("/health", "/ready")


def create_app(models: Mapping[str, ServedModel], settings: Settings) -> FastAPI:
    """`models` maps public names to models; several names may share one. Raises ConfigError if there is none.

    `app.state` carries `models`, `settings`, `ready`, and `startup_error` once an engine failed to start.
    """
    if not models:
        raise ConfigError("a server needs at least one model", remedy="name one with --model")
    page = load_page(settings.page_dir)
    app = FastAPI(title="rorqual", openapi_url=None, redirect_slashes=False, lifespan=_lifespan)
    app.state.models = dict(models)
    app.state.settings = settings
    app.state.ready = False
    app.state.startup_error = None
    platform = Platform(app.state.models, settings)
    for prefix in PREFIXES:
        app.include_router(_probes(app), prefix=prefix)
        app.include_router(api(platform), prefix=prefix)
    app.include_router(_page(page))
    for kind in (RorqualError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer_error)
    app.add_exception_handler(ClientDisconnect, answer_nobody)
    public = {*page, *(prefix + probe for prefix in PREFIXES for probe in PROBES)}
    app.add_middleware(
        Border, settings=settings, is_public=lambda method, path: method in ("GET", "HEAD") and path in public
    )
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Engines run while the server does. If one cannot start, those already started are stopped again."""
    engines = {id(served.engine): served.engine for served in app.state.models.values()}
    async with AsyncExitStack() as stack:
        try:
            for engine in engines.values():
                stack.push_async_callback(engine.stop)  # before start: a half-started engine has to be stopped too
                await engine.start()
        except Exception as error:
            app.state.startup_error = error
            raise
        app.state.ready = True
        yield
        app.state.ready = False


def _probes(app: FastAPI) -> APIRouter:
    """For load balancers: /health is 200 while every engine lives, /ready while requests are welcome too."""
    router = APIRouter()

    def require(ok: bool) -> dict[str, str]:
        if not ok or not all(served.engine.alive for served in app.state.models.values()):
            raise engine_gone()
        return {"status": "ok"}

    @router.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> dict[str, str]:
        return require(True)

    @router.api_route("/ready", methods=["GET", "HEAD"])
    async def ready() -> dict[str, str]:
        return require(app.state.ready)

    return router


def _page(files: Mapping[str, PageFile]) -> APIRouter:
    router = APIRouter()

    async def file(request: Request) -> Response:
        return answer_file(files[request.url.path], request)

    for path in files:
        router.add_api_route(path, file, methods=["GET", "HEAD"])
    return router
