"""Rules of the house that a linter does not know: what an import costs, which names are public, no hidden state."""

from __future__ import annotations

import ast
import copy
import importlib
import pickle
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer
from typer.testing import CliRunner

import rorqual
from rorqual import errors
from rorqual.cli.main import app

PACKAGE = Path(rorqual.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAVY = ("torch", "transformers", "triton", "matplotlib", "tensorboard")


def loaded(statement: str) -> set[str]:
    """Top-level names of what an interpreter has in sys.modules after the statement."""
    code = f"import sys\n{statement}\nprint('MODULES', *{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("MODULES")[2].split())


def names_in(room: str) -> list[str]:
    return [f"rorqual.{room}", *(m.name for m in pkgutil.iter_modules([str(PACKAGE / room)], f"rorqual.{room}."))]


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in MODULES:
        yield path, ast.parse(path.read_text(encoding="utf-8"), str(path))


# ---- what an import costs ---------------------------------------------------------------------------------------


BENCH = ("benchmarks", "layers", "loading", "products", "profiling", "serving", "soaking")
"""What the bench commands import when they run."""


@pytest.mark.parametrize(
    "names",
    [
        ["rorqual"],
        ["rorqual.config", "rorqual.errors", "rorqual.registry"],
        ["rorqual.engine.api", "rorqual.engine.settings", "rorqual.engine.scripted"],
        names_in("serve"),
        names_in("data"),
        names_in("plan"),
        ["rorqual.net", *names_in("search")],
        [name for name in names_in("cli") if not name.endswith(BENCH)],
    ],
    ids=lambda names: names[0],
)
def test_importing_loads_nothing_heavy(names: list[str]) -> None:
    """The server, the command line and everything about data start without torch and its kin."""
    assert not loaded(f"import {', '.join(names)}") & set(HEAVY)


def test_the_engine_process_is_light_for_its_parent() -> None:
    """What the server imports to drive an engine; the child imports torch."""
    assert not loaded("import rorqual.engine.process") & set(HEAVY)


def test_an_engine_starts_without_torchs_compiler() -> None:
    """It takes a second and 150 MB, and comes with sympy; naming it in a decorator is enough to load it."""
    assert "sympy" not in loaded("import rorqual.engine.load, rorqual.engine.native_runner, rorqual.train.pretrain")


def test_importing_rorqual_alone_imports_nothing_but_the_standard_library() -> None:
    extra = loaded("import rorqual") - loaded("pass") - set(sys.stdlib_module_names)
    assert extra == {"rorqual"}


def test_help_loads_nothing_heavy() -> None:
    """`rorqual --help` and the help of a command answer at once."""
    for arguments in (["--help"], ["serve", "--help"], ["bench", "decode", "--help"]):
        code = (
            f"from rorqual.cli.main import main\ntry: main({arguments})\nexcept SystemExit as end: assert not end.code"
        )
        assert not loaded(code) & set(HEAVY)


# ---- public names -----------------------------------------------------------------------------------------------


def test_public_names_are_pinned() -> None:
    """Taking one away or renaming it breaks other people's programs."""
    assert rorqual.__all__ == ["LLM", "SamplingParams", "__version__"]
    for name in rorqual.__all__:
        assert getattr(rorqual, name) is not None
    from rorqual import LLM, SamplingParams
    from rorqual.engine import api, llm

    assert LLM is llm.LLM and SamplingParams is api.SamplingParams
    assert {"generate", "chat", "stream", "stream_chat", "info", "around"} <= set(dir(LLM))


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("rorqual.config", ["ModelConfig"]),
        ("rorqual.model.transformer", ["Transformer"]),
        ("rorqual.checkpoint", ["load_model", "save_model"]),
    ],
)
def test_contracted_names_are_where_they_were_promised(module: str, names: list[str]) -> None:
    for name in names:
        assert callable(getattr(importlib.import_module(module), name))


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    """The lazy module behaves like any other: hasattr, getattr with a default and `from … import` work."""
    with pytest.raises(AttributeError, match="module 'rorqual' has no attribute 'Whale'"):
        rorqual.Whale  # noqa: B018
    assert not hasattr(rorqual, "Whale")
    with pytest.raises(ImportError, match="Whale"):
        exec("from rorqual import Whale")


# ---- no hidden state --------------------------------------------------------------------------------------------


def test_no_function_uses_global() -> None:
    uses = [
        f"{path}:{node.lineno}" for path, tree in trees() for node in ast.walk(tree) if isinstance(node, ast.Global)
    ]
    assert not uses


def test_the_environment_is_read_by_the_command_line_only() -> None:
    """Everything else gets what it needs as an argument (typer's `envvar` is part of the command line). Building the CPU
    kernels honours CXX and XDG_CACHE_HOME, as every build tool does."""
    names = {"environ", "environb", "getenv", "putenv"}
    uses = []
    for path, tree in trees():
        if path.is_relative_to(PACKAGE / "cli") or path == PACKAGE / "ops" / "native" / "build.py":
            continue
        for node in ast.walk(tree):
            attribute = isinstance(node, ast.Attribute) and node.attr in names
            imported = isinstance(node, ast.ImportFrom) and node.module == "os" and names & {a.name for a in node.names}
            if attribute or imported:
                uses.append(f"{path}:{node.lineno}")
    assert not uses


CLIENTS = (
    "httpx", "httpx2", "httpcore", "httpcore2", "requests", "aiohttp", "urllib3", "urllib.request", "http.client", "socket",
    "ssl", "ftplib", "smtplib", "telnetlib", "primp", "curl_cffi", "websockets", "ddgs", "trafilatura.downloads",
)  # fmt: skip
MAY_CONNECT = {
    # `serve` listens: it makes its listening socket itself, to know that the port is free before models are loaded.
    ("serve/run.py", "socket"),
    # `verify` asks the inference server that its caller names, as a tool beside the server, in the training extra.
    ("checkpoint/verify_server.py", "urllib.request"),
    # The type of an answer that net's client hands out.
    ("serve/upstream.py", "httpx"),
    # The benchmark's client of a server that it started itself, on loopback: one that parses would be slower than it.
    ("cli/http_load.py", "open_connection"),
    # A search provider that is a client: it talks to the engines it knows, not to addresses that people or models name.
    ("search/providers.py", "ddgs"),
}


def test_http_clients_stay_in_net() -> None:
    """One door outward: a second client would be a second place to forget the address check. import-linter knows packages
    only; this sees parts of the standard library too, and imports inside functions."""
    found = set()
    for path, tree in trees():
        place = path.relative_to(PACKAGE).as_posix()
        if place == "net.py":
            continue
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Attribute) and node.attr in ("open_connection", "create_connection", "fetch_url"):
                found.add((place, node.attr))  # asyncio's and trafilatura's ways out
            found |= {(place, c) for c in CLIENTS for name in names if name == c or name.startswith(f"{c}.")}
    assert found <= MAY_CONNECT


def test_the_fetcher_is_never_told_to_let_addresses_through() -> None:
    """`allowed_for_tests` is what its name says."""
    uses = [
        f"{path}:{node.lineno}"
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "allowed_for_tests"
    ]
    assert not uses


def test_no_default_of_torch_is_changed() -> None:
    """Two models of different dtypes and devices live in one process."""
    uses = [
        f"{path}:{node.lineno}"
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.startswith("set_default_")
    ]
    assert not uses


def test_packages_are_empty() -> None:
    """`__init__.py` holds nothing, but for the top one (lazy names) and checkpoint's re-exports."""
    full = {p.parent.name for p in MODULES if p.name == "__init__.py" and p.read_text(encoding="utf-8").strip()}
    assert full == {"rorqual", "checkpoint"}


# ---- the command line teaches by example ------------------------------------------------------------------------


def verbs(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command that does something."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield path
    for name, sub in (inner or {}).items():
        yield from verbs(sub, (*path, name))


VERBS = sorted(verbs(typer.main.get_command(app)))


def test_the_verbs_are_those_that_are_promised() -> None:
    names = {" ".join(words) for words in VERBS}
    assert {"serve", "chat", "generate", "inspect", "train", "sft", "tokenizer train", "data prepare"} <= names
    assert {"bench decode", "bench prefill", "bench train"} <= names


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_help_holds_an_example(words: tuple[str, ...]) -> None:
    """Every verb's --help ends well and shows a line to copy, which begins with or pipes into this very verb."""
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    _, found, example = result.output.partition("Example")
    assert found, f"`rorqual {' '.join(words)} --help` has no example"
    assert f"rorqual {' '.join(words)}" in " ".join(example.split())


@pytest.mark.parametrize("words", [(), ("bench",), ("data",), ("index",), ("tokenizer",)], ids=" ".join)
def test_help_of_a_group_lists_its_commands(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for verb in VERBS:
        if verb[: len(words)] == words:
            assert verb[len(words)] in result.output


# ---- errors cross process borders -------------------------------------------------------------------------------


def tree(kind: type[errors.RorqualError]) -> Iterator[type[errors.RorqualError]]:
    yield kind
    for sub in kind.__subclasses__():
        if sub.__module__ == errors.__name__:
            yield from tree(sub)


ERRORS = list(tree(errors.RorqualError))


def test_every_error_is_drawn_in_the_tree() -> None:
    """The drawing at the top of the module is what people read."""
    defined = {kind.__name__ for kind in vars(errors).values() if isinstance(kind, type)}
    assert defined == {kind.__name__ for kind in ERRORS}
    assert errors.__doc__ and all(name in errors.__doc__ for name in defined)


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("again", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy])
def test_errors_survive_pickling_and_copying(kind: type[errors.RorqualError], again) -> None:  # type: ignore[no-untyped-def]
    """Kind, message, remedy, the field at fault, and whatever was noted on it."""
    more = {"param": "messages"} if issubclass(kind, errors.RequestError) else {}
    error = kind("it is too deep", remedy="swim up", **more)
    error.add_note("seen at 400 m")
    other = again(error)
    assert type(other) is kind and other is not error
    assert str(other) == str(error) == "it is too deep (swim up)"
    assert (other.remedy, other.args, other.__notes__) == ("swim up", ("it is too deep",), ["seen at 400 m"])
    assert getattr(other, "param", None) == more.get("param")
    assert str(kind("it is too deep")) == "it is too deep"
