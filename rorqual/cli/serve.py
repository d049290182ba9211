"""`rorqual serve`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rorqual.cli import engine as options

if TYPE_CHECKING:
    from rorqual.serve.served import ServedModel


def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(help="A model directory or bundled name; repeat it to serve several.", metavar="DIR|NAME"),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on. Beyond loopback a key is needed.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Ask every request for this key (repeatable).", envvar="RORQUAL_API_KEY", show_envvar=True),
    ] = None,
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
    cache_tokens: options.CacheTokens = 0,
    cache_dir: options.CacheDir = None,
    cache_disk_gb: options.CacheDiskGb = 10.0,
    speculation: options.Speculation = -1,
    deterministic: options.Deterministic = None,
    kernels: options.Kernels = "auto",
    threads: options.Threads = 0,
) -> None:
    """Serve the chat page and the API, with the bundled model unless told otherwise.

    The API is OpenAI's under /, /v1, /beta and /beta/v1, so that existing clients need another base URL and no more.
    Each model's engine runs in a process of its own.

    Examples:

        rorqual serve

        rorqual serve --model out/nano/model --port 9000

        rorqual serve --dtype int8 --cache-dir ~/.cache/rorqual/pages

        rorqual serve --alias deepseek-chat=rorqual-nano:plain --alias deepseek-reasoner=rorqual-nano:thinking

        RORQUAL_API_KEY=secret rorqual serve --host 0.0.0.0
    """
    import logging

    from rorqual.config import DEFAULT_MODEL, resolve_model
    from rorqual.errors import ConfigError
    from rorqual.serve.app import create_app
    from rorqual.serve.run import serve as run
    from rorqual.serve.settings import Settings

    logging.getLogger("rorqual").setLevel(logging.INFO)
    paths = [resolve_model(name) for name in model or [DEFAULT_MODEL]]
    names = [path.resolve().name for path in paths]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ConfigError(f"two models are called {', '.join(twice)}", remedy="rename one of the directories")
    told = options.settings(
        device=device, dtype=dtype, threads=threads, max_model_len=max_model_len, cache_tokens=cache_tokens,
        cache_dir=cache_dir, cache_disk_gb=cache_disk_gb, speculation=speculation, kernels=kernels,
        deterministic=deterministic, max_num_seqs=max_num_seqs,
    )  # fmt: skip
    served = {name: served_model(path, name, told) for name, path in zip(names, paths, strict=True)}
    served |= {name: aliased for spec in alias or () for name, aliased in [with_alias(spec, served)]}
    app = create_app(served, Settings(api_keys=tuple(api_key or ())))
    run(
        app,
        host,
        port,
        on_bound=lambda: typer.echo(f"loading {', '.join(names)} …", err=True),
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
    return name, replace(served[model], defaults=replace(served[model].defaults, thinking=thinking))


def served_model(path: Path, name: str, options: dict[str, object]):  # type: ignore[no-untyped-def]
    """The tokenizer and template are read here; the weights by the engine's own process."""
    from rorqual.data.template import ChatTemplate
    from rorqual.data.tokenizer import Tokenizer
    from rorqual.engine.process import EngineProcess
    from rorqual.engine.settings import EngineSettings
    from rorqual.serve.served import GenerationDefaults, ServedModel

    return ServedModel(
        engine=EngineProcess(EngineSettings(model=str(path), **options)),  # type: ignore[arg-type]
        tokenizer=Tokenizer.load(path),
        template=ChatTemplate.load(path),
        name=name,
        created=int((path / "config.json").stat().st_mtime),
        defaults=GenerationDefaults.load(path),
    )
