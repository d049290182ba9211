"""`rorqual serve`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rorqual.cli import engine as options
from rorqual.cli import searching, storage

if TYPE_CHECKING:
    from rorqual.serve.served import ServedModel


def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(help="A model directory or bundled name; repeat it to serve several.", metavar="DIR|NAME"),
    ] = None,
    upstream: Annotated[
        str | None,
        typer.Option(help="Serve another server's models instead: a vLLM's or SGLang's address.", metavar="URL"),
    ] = None,
    upstream_key: Annotated[
        str, typer.Option(help="What the upstream asks for.", envvar="RORQUAL_UPSTREAM_KEY", show_envvar=True)
    ] = "",
    host: Annotated[str, typer.Option(help="Address to listen on. Beyond loopback a key is needed.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Ask every request for this key (repeatable).", envvar="RORQUAL_API_KEY", show_envvar=True),
    ] = None,
    data_dir: storage.DataDir = None,
    database: storage.Database = None,
    search: searching.Search = "local",
    search_url: searching.SearchUrl = "",
    search_key: searching.SearchKey = "",
    alias: Annotated[
        list[str] | None,
        typer.Option(
            help="A further name of a model, with thinking on or off unless asked.",
            metavar="NAME=MODEL[:thinking|:plain]",
        ),
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    max_num_seqs: Annotated[int, typer.Option(help="Requests computed side by side.", min=1)] = 32,
    max_model_len: options.MaxModelLen = 0,
    max_waiting: Annotated[
        int, typer.Option(help="Requests that may wait beyond those; more get a 429.", min=1)
    ] = 1024,
    cache_tokens: options.CacheTokens = 0,
    cache_dir: options.CacheDir = None,
    cache_disk_gb: options.CacheDiskGb = 10.0,
    speculation: options.Speculation = -1,
    deterministic: options.Deterministic = None,
    kernels: options.Kernels = "auto",
    threads: options.Threads = 0,
    queue_timeout: Annotated[
        float, typer.Option(help="Seconds a request may wait for its first token.", min=0.1)
    ] = 600,
    idle_timeout: Annotated[float, typer.Option(help="Seconds it may wait for its next token.", min=0.1)] = 300,
    grace: Annotated[int, typer.Option(help="Seconds that requests may go on after SIGTERM.", min=0)] = 30,
    log_format: Annotated[str, typer.Option(help="text, or json: one object a line.")] = "text",
    log_prompts: Annotated[bool, typer.Option(help="Log what is asked and answered too.")] = False,
) -> None:
    """Serve the chat page and the API, with the bundled model unless told otherwise.

    The API is OpenAI's under /, /v1, /beta and /beta/v1, so that existing clients need another base URL and no more.
    Each model's engine runs in a process of its own. With an API key (see `rorqual keys`) everything but /health and the
    page is behind it; without one the server listens on loopback only.

    Examples:

        rorqual serve

        rorqual serve --model out/nano/model --port 9000

        rorqual serve --dtype int8 --cache-dir ~/.cache/rorqual/pages

        rorqual serve --alias deepseek-chat=rorqual-mini:plain --alias deepseek-reasoner=rorqual-mini:thinking

        rorqual serve --upstream http://gpu-box:8000 --upstream-key secret

        rorqual serve --search searxng --search-url http://127.0.0.1:8888

        rorqual keys create laptop && rorqual serve --host 0.0.0.0
    """
    from rorqual.config import DEFAULT_MODEL, resolve_model
    from rorqual.errors import ConfigError
    from rorqual.serve.app import create_app
    from rorqual.serve.run import serve as run
    from rorqual.serve.settings import Settings
    from rorqual.serve.upstream import Upstream

    set_up_logs(log_format)
    if upstream and model:
        raise ConfigError("--upstream serves the other server's models", remedy="leave --model out")
    paths = [] if upstream else [resolve_model(name) for name in model or [DEFAULT_MODEL]]
    names = [path.resolve().name for path in paths]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ConfigError(f"two models are called {', '.join(twice)}", remedy="rename one of the directories")
    told = options.settings(
        device=device, dtype=dtype, threads=threads, max_model_len=max_model_len, cache_tokens=cache_tokens,
        cache_dir=cache_dir, cache_disk_gb=cache_disk_gb, speculation=speculation, kernels=kernels,
        deterministic=deterministic, max_num_seqs=max_num_seqs, max_waiting=max_waiting,
    )  # fmt: skip
    served = {name: served_model(path, name, told) for name, path in zip(names, paths, strict=True)}
    served |= {name: aliased for spec in alias or () for name, aliased in [with_alias(spec, served)]}
    settings = Settings(
        api_keys=tuple(api_key or ()),
        database_url=storage.database(data_dir, database),
        queue_timeout_s=queue_timeout,
        idle_timeout_s=idle_timeout,
        log_prompts=log_prompts,
    )
    before = Upstream(upstream, api_key=upstream_key) if upstream else None
    app = create_app(served, settings, before, searching.searcher(search, search_url, search_key, data_dir))

    def bound() -> None:
        if not app.state.keyring.required:
            typer.echo(
                "no API keys: this machine alone can reach the server (`rorqual keys create` makes one)", err=True
            )
        typer.echo(f"before {upstream}" if upstream else f"loading {', '.join(names)} …", err=True)

    run(
        app,
        host,
        port,
        grace_s=grace,
        on_bound=bound,
        on_ready=lambda url: typer.echo(f"chat: {url}   API: {url}/v1   (Ctrl-C stops)", err=True),
    )


def with_alias(spec: str, served: Mapping[str, ServedModel]) -> tuple[str, ServedModel]:
    """The name and the model of NAME=MODEL[:thinking|:plain]: the same engine under other defaults. Raises ConfigError."""
    from rorqual.errors import ConfigError

    name, _, target = spec.partition("=")
    model, _, mode = target.partition(":")
    if not name or model not in served or mode not in ("", "thinking", "plain"):
        remedy = f"write NAME=MODEL, NAME=MODEL:thinking or NAME=MODEL:plain, MODEL one of {', '.join(served)}"
        raise ConfigError(f"--alias {spec} names no model that is served", remedy=remedy)
    if name in served:
        raise ConfigError(f"--alias {spec}: a model is called {name}", remedy="choose another name")
    thinking = mode == "thinking" if mode else served[model].defaults.thinking
    defaults = replace(served[model].defaults, thinking=thinking)
    return name, replace(served[model], defaults=defaults, alias=True)


def set_up_logs(form: str) -> None:
    """On standard error, from INFO on. Raises ConfigError for a form that there is not."""
    import logging

    from rorqual.errors import ConfigError
    from rorqual.serve.logs import JsonFormatter

    if form not in ("text", "json"):
        raise ConfigError(f"there is no log format {form!r}", remedy="choose text or json")
    logging.getLogger("rorqual").setLevel(logging.INFO)
    if form == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter())


def served_model(path: Path, name: str, options: dict[str, object]):  # type: ignore[no-untyped-def]
    """The tokenizer and template are read here; the weights by the engine's own process."""
    from rorqual.data.template import ChatTemplate
    from rorqual.data.tokenizer import Tokenizer
    from rorqual.engine.process import EngineProcess
    from rorqual.engine.settings import EngineSettings
    from rorqual.engine.supervisor import SupervisedEngine
    from rorqual.serve.served import GenerationDefaults, ServedModel

    settings = EngineSettings(model=str(path), **options)  # type: ignore[arg-type]
    return ServedModel(
        engine=SupervisedEngine(lambda: EngineProcess(settings), max_waiting=settings.max_waiting),
        tokenizer=Tokenizer.load(path),
        template=ChatTemplate.load(path),
        name=name,
        created=int((path / "config.json").stat().st_mtime),
        defaults=GenerationDefaults.load(path),
    )
