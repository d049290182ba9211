"""The application: routes on models, and nothing that thinks.

    app = create_app({"nano": ServedModel(engine, tokenizer, template, name="nano", created=0)}, Settings())

The same API answers under `/`, `/v1`, `/beta`, `/beta/v1` and `/anthropic`, because clients hard-code each of them. There
are no globals: routes are closures over the models and settings of this one app, so two apps live in one
process. The lifespan starts the engines and stops them; until it has, `/ready` says 503. No torch here or
below.

Left out: FastAPI's /docs pages, which load scripts from other hosts; `/openapi.json` is published (`serve.openapi`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from rorqual.errors import ConfigError, RorqualError
from rorqual.serve.admission import AdmittedEngine
from rorqual.serve.answer_schemas import Status
from rorqual.serve.border import Border, Traffic, answer_error, answer_nobody
from rorqual.serve.callers import Caller
from rorqual.serve.chats import routes as chat_routes
from rorqual.serve.chats.files import Files
from rorqual.serve.chats.prompting import estimate
from rorqual.serve.chats.service import Chats
from rorqual.serve.chats.store import ChatStore
from rorqual.serve.chats.voices import OwnModels, TheirModels
from rorqual.serve.errors import Refused, engine_gone
from rorqual.serve.keys import Keyring, KeyStore
from rorqual.serve.metrics import Metrics
from rorqual.serve.openapi import answers, publish
from rorqual.serve.prepare import Platform
from rorqual.serve.routes import api
from rorqual.serve.searching import Searcher
from rorqual.serve.searching import routes as search_routes
from rorqual.serve.served import GenerationDefaults, ServedModel
from rorqual.serve.settings import Settings
from rorqual.serve.static import PageFile, answer_file, load_page
from rorqual.serve.upstream import Upstream

__all__ = ["GenerationDefaults", "ServedModel", "Settings", "create_app"]

PREFIXES = ("", "/v1", "/beta", "/beta/v1", "/anthropic", "/anthropic/v1")
PROBES = ("/health", "/ready")
FORM_BYTES = 4096  # what a form puts around a file


def create_app(
    models: Mapping[str, ServedModel],
    settings: Settings,
    upstream: Upstream | None = None,
    searcher: Searcher | None = None,
) -> FastAPI:
    """`models` maps public names to models; several names may share one. With an `upstream` its models are served and
    there are none here. Raises ConfigError if there are no models or both kinds. Conversations are kept where the settings
    name a database.

    `app.state` carries `models`, `settings`, `keyring`, `traffic`, `chats`, `ready`, and `startup_error` once an engine
    failed to start. Raises ConfigError where the database of the keys cannot be opened.
    """
    if bool(models) == (upstream is not None):
        raise ConfigError("a server needs either models or an upstream", remedy="name one with --model or --upstream")
    page = load_page(settings.page_dir)
    app = FastAPI(title="rorqual", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=_lifespan)
    # By its own name, a model once: the dictionary's names may be several for one.
    metrics = Metrics({served.name: served.engine for served in models.values()})
    app.state.models = _admitted(models, settings, metrics)
    app.state.settings = settings
    app.state.keyring = Keyring(KeyStore(settings.database_url) if settings.database_url else None, settings.api_keys)
    app.state.keyring.load()
    app.state.traffic = Traffic()
    app.state.upstream = upstream
    app.state.ready = False
    app.state.startup_error = None
    platform = Platform(app.state.models, settings)
    _mount(app, platform, metrics, searcher)
    publish(app, PREFIXES)
    app.include_router(_page(page))
    for kind in (RorqualError, RequestValidationError, HTTPException, Refused):
        app.add_exception_handler(kind, answer_error)
    app.add_exception_handler(ClientDisconnect, answer_nobody)
    public = {*page, *(prefix + probe for prefix in PREFIXES for probe in PROBES)}
    app.add_middleware(
        Border,
        settings=settings,
        keyring=app.state.keyring,
        traffic=app.state.traffic,
        metrics=metrics,
        is_public=lambda method, path: method in ("GET", "HEAD") and path in public,
        is_free=chat_routes.is_free,
        is_upload=lambda path: path in chat_routes.UPLOADS,
    )
    return app


def _admitted(models: Mapping[str, ServedModel], settings: Settings, metrics: Metrics) -> dict[str, ServedModel]:
    """The models with their engines behind the server's rules; names that shared an engine share it still."""
    engines = {id(served.engine): AdmittedEngine(served, settings, metrics) for served in models.values()}
    return {name: replace(served, engine=engines[id(served.engine)]) for name, served in models.items()}


def _mount(app: FastAPI, platform: Platform, metrics: Metrics, searcher: Searcher | None) -> None:
    settings, upstream = platform.settings, app.state.upstream
    app.state.chats = app.state.files = None
    if settings.database_url:
        app.state.chats = _chats(app, platform, searcher, metrics)
        app.state.files = Files(app.state.chats.store, _counter(platform.models))
        app.include_router(chat_routes.routes(app.state.chats, app.state.files))
    for prefix in PREFIXES:
        models = upstream.router(settings, metrics) if upstream else api(platform)
        for router in (search_routes(searcher), _probes(app), _metrics(metrics), models):
            app.include_router(router, prefix=prefix, include_in_schema=not prefix)


def _chats(app: FastAPI, platform: Platform, searcher: Searcher | None, metrics: Metrics) -> Chats:
    settings, traffic, upstream = platform.settings, app.state.traffic, app.state.upstream

    def hold(caller: Caller) -> Callable[[], None]:
        """A running answer is one of the caller's requests, and what a draining server waits for."""
        traffic.in_flight += 1
        caller.in_flight += 1

        def release() -> None:
            traffic.in_flight -= 1
            caller.in_flight -= 1

        return release

    assert settings.database_url is not None
    return Chats(
        ChatStore(settings.database_url),
        TheirModels(upstream, settings, metrics) if upstream else OwnModels(platform),
        searcher,
        default_model=next(iter(platform.models), ""),
        file_bytes=settings.max_upload_bytes - FORM_BYTES,
        heartbeat_s=settings.heartbeat_s,
        hold=hold,
    )


def _counter(models: Mapping[str, ServedModel]) -> Callable[[str], int]:
    """How many tokens a text is: to the first model, or about."""
    first = next(iter(models.values()), None)
    return estimate if first is None else lambda text: len(first.tokenizer.encode(text))


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Engines run while the server does. If one cannot start, those already started are stopped again."""
    engines = {id(served.engine): served.engine for served in app.state.models.values()}
    async with AsyncExitStack() as stack:
        if app.state.upstream is not None:
            stack.push_async_callback(app.state.upstream.close)
        try:
            if app.state.chats is not None:  # a database that cannot be opened is told before models are loaded
                await asyncio.to_thread(lambda: app.state.chats.store.engine)
            for engine in engines.values():
                stack.push_async_callback(engine.stop)  # before start: a half-started engine has to be stopped too
                await engine.start()
            if app.state.chats is not None:
                stack.push_async_callback(app.state.chats.stop)  # before the engines: what it writes is theirs
                await app.state.chats.start()
        except Exception as error:
            app.state.startup_error = error
            raise
        app.state.ready = True
        yield
        app.state.ready = False


def _probes(app: FastAPI) -> APIRouter:
    """For load balancers: /health is 200 while every engine lives or is being started again, /ready while requests are
    taken up at once."""
    router = APIRouter()

    def require(*conditions: bool) -> dict[str, str]:
        if not all(conditions):
            raise engine_gone()
        return {"status": "ok"}

    @router.head("/health", include_in_schema=False)
    @router.get("/health", responses=answers(Status))
    async def health() -> dict[str, str]:
        return require(*(served.engine.alive for served in app.state.models.values()))

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready", responses=answers(Status))
    async def ready() -> dict[str, str]:
        engines = [served.engine.ready for served in app.state.models.values()]
        if app.state.upstream is not None:
            engines.append(await app.state.upstream.ready())
        return require(app.state.ready, not app.state.traffic.draining, *engines)

    return router


def _metrics(metrics: Metrics) -> APIRouter:
    router = APIRouter()

    @router.get("/metrics", responses={200: {"description": "Prometheus", "content": {"text/plain": {}}}})
    async def exposition(request: Request) -> Response:
        body, content_type = metrics.exposition(request.headers.get("accept", ""))
        return Response(body, media_type=content_type)

    return router


def _page(files: Mapping[str, PageFile]) -> APIRouter:
    router = APIRouter()

    async def file(request: Request) -> Response:
        return answer_file(files[request.url.path], request)

    for path in files:
        router.add_api_route(path, file, methods=["GET", "HEAD"], include_in_schema=False)
    return router
