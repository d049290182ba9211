"""The command line as people meet it: what it prints, what it refuses and how, and a model from text to chat."""

from __future__ import annotations

import json
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from rorqual.cli.main import main
from rorqual.config import DEFAULT_MODEL, resolve_model

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    def complaint(self) -> str:
        """The error: exit code 1, nothing on standard output, one line without a traceback on standard error."""
        assert self.code == 1, self
        assert not self.out, self
        [line] = self.err.strip().splitlines()
        assert line.startswith("rorqual: ") and "Traceback" not in line, self
        return line


Run = Callable[..., Done]


@pytest.fixture
def rorqual(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process."""

    def run(*words: object) -> Done:
        capsys.readouterr()
        code: object = 0
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        assert isinstance(code, int)
        return Done(code, out, err)

    return run


def spawn(*words: object, stdin: str = "", timeout_s: float = 60) -> Done:
    """Runs a command line in a process of its own."""
    command = [sys.executable, "-m", "rorqual", *map(str, words)]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout_s, cwd=ROOT)
    return Done(done.returncode, done.stdout, done.stderr)


# ---- a model from text to chat, tiny ----------------------------------------------------------------------------

MODEL = """\
vocab_size = 340
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 8
v_head_dim = 8
intermediate_size = 64
moe_intermediate_size = 16
n_routed_experts = 4
num_experts_per_tok = 2
num_nextn_predict_layers = 1
max_position_embeddings = 128
"""
TEXT = "the whale swims under ice and takes in a whole sea of krill keeps what feeds it sings dives far"


@dataclass(frozen=True)
class Toy:
    """What the commands made: a corpus, a tokenizer, shards, a run file and the trained model."""

    corpus: Path
    tokenizer: Path
    shards: Path
    run: Path
    model: Path


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """tokenizer train, data prepare and a two-step train, each as a command that must end well."""
    home = tmp_path_factory.mktemp("toy")
    made = Toy(home / "text", home / "tokenizer", home / "shards", home / "run.toml", home / "run" / "model")
    made.corpus.mkdir()
    rng = random.Random(5)
    for number in range(40):
        (made.corpus / f"{number}.txt").write_text(" ".join(rng.choices(TEXT.split(), k=120)) + ".\n", encoding="utf-8")
    made.run.write_text(
        f'out = "{made.model.parent}"\nsteps = 2\nbatch = 4\ndevice = "cpu"\nthreads = 1\n'
        f'[data]\ntrain = [{{path = "{made.shards / "train"}"}}]\nval = [{{path = "{made.shards / "val"}"}}]\n'
        f'tokenizer = "{made.tokenizer}"\nseq_len = 32\n[optim]\nwarmup_steps = 1\n[model]\n{MODEL}'
    )
    commands = [
        (["tokenizer", "train", made.corpus, "--vocab-size", 340, "--out", made.tokenizer], "a vocabulary of 340"),
        (["data", "prepare", made.corpus, "--tokenizer", made.tokenizer, "--out", made.shards, "--val-fraction", 0.2],
         r"40 documents \(0 conversations\), [\d,]+ tokens, [\d,]+ of them for validation"),
        (["train", made.run], r"trained to step 2, loss \d+\.\d{4}, val loss \d+\.\d{4}"),
    ]  # fmt: skip
    for words, said in commands:
        done = spawn(*words)
        assert done.code == 0 and "Traceback" not in done.err, done
        [line] = done.out.strip().splitlines()
        assert re.search(said, line), done
    return made


def test_from_text_to_chat(toy: Toy, rorqual: Run, tmp_path: Path) -> None:
    """The directory that training left chats, completes and is counted; the run kept what it was told and measured."""
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= {p.name for p in toy.model.iterdir()}
    steps = [json.loads(line) for line in (toy.model.parent / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["step"] == 2 and steps[-1]["lm_loss"] > 0 and steps[-1]["mtp_loss"] > 0
    assert (toy.model.parent / "config.toml").is_file()

    chat = rorqual("chat", "hi", "--model", toy.model, "--max-tokens", 5, "--device", "cpu")
    assert chat.code == 0 and chat.out.endswith("\n") and "Traceback" not in chat.err

    lines = [{"prompt": "the whale", "id": 7}, {"messages": [{"role": "user", "content": "sea?"}], "id": "eight"}]
    inputs, outputs = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    inputs.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    ask = ["generate", inputs, "--model", toy.model, "--temperature", 0, "--max-tokens", 6, "--device", "cpu"]
    done = rorqual(*ask)
    assert done.code == 0, done
    answers = [json.loads(line) for line in done.out.splitlines()]
    for line, answer in zip(lines, answers, strict=True):
        assert answer.items() >= line.items(), "a line comes back in its place with what it had"
        assert isinstance(answer["text"], str) and answer["finish_reason"] in ("stop", "length")
        assert 1 <= answer["usage"]["completion_tokens"] <= 6 and answer["usage"]["prompt_tokens"] > 0
    assert rorqual(*ask, "--out", outputs).out == "" and outputs.read_text() == done.out

    counted = json.loads(rorqual("inspect", toy.model, "--json").out)
    assert counted["layers"] == 2 and counted["parameters"]["mtp"] > 0


def test_generate_reads_standard_input(toy: Toy) -> None:
    """As the help's example has it: a pipe in, lines of JSON and nothing else out."""
    words = ["generate", "-", "--model", toy.model, "--max-tokens", 3, "--device", "cpu"]
    done = spawn(*words, stdin='{"prompt": "the whale"}\n')
    assert done.code == 0 and json.loads(done.out)["prompt"] == "the whale", done


def test_a_finished_run_is_not_trained_again(toy: Toy, rorqual: Run) -> None:
    """The same command resumes; of a finished run nothing is left to do and the model stays."""
    before = (toy.model / "model.safetensors.index.json").read_bytes()
    steps = (toy.model.parent / "metrics.jsonl").read_text()
    assert rorqual("train", toy.run).code == 0
    assert (toy.model / "model.safetensors.index.json").read_bytes() == before
    assert (toy.model.parent / "metrics.jsonl").read_text() == steps


# ---- inspect ----------------------------------------------------------------------------------------------------


def test_inspect_counts_deepseek_v3_as_published() -> None:
    """671,026,419,200 parameters, 37.55 B of them active, MTP apart, 70,272 bytes of cache a token; within 15 s."""
    start = time.monotonic()
    done = spawn("inspect", "deepseek-v3", "--json")
    assert time.monotonic() - start < 15
    facts = json.loads(done.out)
    parameters = facts["parameters"]
    assert parameters["total"] == 671_026_419_200
    assert f"{parameters['active'] / 1e9:.2f}" == "37.55"
    assert f"{parameters['mtp'] / 1e9:.1f}" == "11.6", "unique to the module: embedding and head are shared"
    assert parameters["with_mtp"] == parameters["total"] + parameters["mtp"]
    *main_parts, mtp = facts["parts"]
    assert sum(part["total"] for part in main_parts) == parameters["total"]
    assert sum(part["active"] for part in main_parts) == parameters["active"]
    assert mtp["total"] == parameters["mtp"]
    assert facts["cache_bytes_per_token"] == {"bf16": 70_272, "fp32": 2 * 70_272}
    assert facts["weight_bytes"]["bf16"] == 2 * parameters["with_mtp"]
    assert (facts["layers"], facts["vocabulary"], facts["context"]) == (61, 129_280, 163_840)


def test_inspect_shows_a_table(rorqual: Run) -> None:
    shown = rorqual("inspect", "nano").out
    assert "main model" in shown and "MTP modules (apart)" in shown and "bytes a token in bf16" in shown


def test_inspect_takes_presets_directories_and_bundled_names(rorqual: Run) -> None:
    by_name, by_path = (json.loads(rorqual("inspect", name, "--json").out) for name in (DEFAULT_MODEL, resolve_model()))
    assert by_name["parameters"] == by_path["parameters"]


def test_inspect_of_an_unknown_preset_names_the_nearest(rorqual: Run) -> None:
    line = rorqual("inspect", "deepseek-v4").complaint()
    assert "deepseek-v4" in line and "did you mean 'deepseek-v3'?" in line and "presets: " in line


# ---- errors are one line ----------------------------------------------------------------------------------------


def test_debug_shows_the_traceback_and_nothing_else_does() -> None:
    """Before the command or after it; without it one line."""
    missing = ["serve", "--port", "0", "--model", "nowhere"]
    assert "there is no model called 'nowhere'" in spawn(*missing).complaint()
    for words in (["--debug", *missing], [*missing, "--debug"]):
        told = spawn(*words)
        assert told.code == 1 and "Traceback" in told.err and "ConfigError: there is no model called" in told.err


def test_wrong_usage_is_exit_code_2(rorqual: Run) -> None:
    for words in (["inspekt"], ["inspect"], ["serve", "--port", "http"], ["generate", "-", "--max-tokens", "0"]):
        done = rorqual(*words)
        assert done.code == 2 and done.err and "Traceback" not in done.err


def test_version(rorqual: Run) -> None:
    assert re.fullmatch(r"rorqual \d+\.\d+\.\d+\n", rorqual("--version").out)


@pytest.mark.parametrize("verb", ["chat", "generate", "serve"])
def test_an_unknown_model_names_the_bundled_ones(verb: str, rorqual: Run, tmp_path: Path) -> None:
    inputs = tmp_path / "in.jsonl"
    inputs.write_text('{"prompt": "hi"}\n')
    words = {"chat": ["chat", "hi"], "generate": ["generate", inputs], "serve": ["serve", "--port", "0"]}[verb]
    line = rorqual(*words, "--model", "rorqual-giga").complaint()
    assert "'rorqual-giga'" in line and "bundled model: " in line and DEFAULT_MODEL in line


def test_a_damaged_model_is_one_line(toy: Toy, rorqual: Run, tmp_path: Path) -> None:
    """Weights cut short, a config that is no JSON: named, never a traceback."""
    cut = Path(shutil.copytree(toy.model, tmp_path / "cut"))
    [weights] = cut.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    assert weights.name in rorqual("chat", "hi", "--model", cut).complaint()
    (cut / "config.json").write_text("{")
    assert "config.json" in rorqual("chat", "hi", "--model", cut).complaint()


# ---- train ------------------------------------------------------------------------------------------------------


def test_train_says_what_is_missing(toy: Toy, rorqual: Run, tmp_path: Path) -> None:
    """A run file, a key, a directory of shards, one shard of it, a tokenizer: each by name."""
    assert "there is no run file" in rorqual("train", tmp_path / "none.toml").complaint()
    assert "did you mean 'lr'?" in rorqual("train", toy.run, "--set", "optim.lrr=1").complaint()
    assert "expected key=value" in rorqual("train", toy.run, "--set", "steps").complaint()
    assert "model or init_from" in rorqual("train", toy.run, "--set", "model=").complaint()

    away = [f"out={tmp_path / 'run'}", f"data.train=[{{path='{tmp_path / 'shards'}'}}]"]
    told = [word for item in away for word in ("--set", item)]
    assert str(tmp_path / "shards") in rorqual("train", toy.run, *told).complaint()
    shutil.copytree(toy.shards / "train", tmp_path / "shards")
    shard = sorted((tmp_path / "shards").glob("*.tokens"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:-2])
    assert f"{shard} has {len(content) - 2} bytes" in rorqual("train", toy.run, *told).complaint()
    shard.unlink()
    assert f"{shard} is missing" in rorqual("train", toy.run, *told).complaint()


def test_prepare_names_file_and_line_of_what_is_no_json(toy: Toy, rorqual: Run, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": \n')
    words = ["data", "prepare", bad, "--tokenizer", toy.tokenizer, "--out", tmp_path / "out"]
    done = rorqual(*words)
    assert "bad.jsonl" in done.err and "2" in done.err and done.code == 1 and "Traceback" not in done.err


# ---- generate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', r"in\.jsonl:2: not valid JSON"),
        ('{"prompt": "a"}\n\n[1]\n', r"in\.jsonl:3: expected"),
        ('{"prompt": 3}\n', r"in\.jsonl:1: expected"),
        ('{"prompt": "a", "messages": []}\n', r"in\.jsonl:1: expected"),
        ("\n \n", "has no lines"),
    ],
)
def test_generate_names_file_and_line(content: str, said: str, toy: Toy, rorqual: Run, tmp_path: Path) -> None:
    inputs = tmp_path / "in.jsonl"
    inputs.write_text(content)
    assert re.search(said, rorqual("generate", inputs, "--model", toy.model).complaint())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": ""}, "empty"),
        ({"messages": []}, "empty|no messages|message"),
        ({"prompt": "the whale " * 200}, "maximum context length is 128 tokens"),
        ({"messages": [{"role": "user", "content": "the whale " * 200}]}, "maximum context length is 128 tokens"),
        ({"messages": [{"role": "whale", "content": "hi"}]}, "whale"),
    ],
    ids=["no text", "no messages", "long prompt", "long message", "unknown role"],
)
def test_prompts_that_cannot_run_are_clear_errors(
    line: dict[str, object], said: str, toy: Toy, rorqual: Run, tmp_path: Path
) -> None:
    """Before anything is computed, in one line."""
    inputs = tmp_path / "in.jsonl"
    inputs.write_text('{"prompt": "fine"}\n' + json.dumps(line) + "\n")
    words = ["generate", inputs, "--model", toy.model, "--max-tokens", 4, "--device", "cpu"]
    assert re.search(said, rorqual(*words).complaint())


def test_chat_asks_for_a_question(toy: Toy, rorqual: Run) -> None:
    assert "the prompt is empty" in rorqual("chat", " ", "--model", toy.model).complaint()


def test_generate_says_that_a_file_cannot_be_read(toy: Toy, rorqual: Run, tmp_path: Path) -> None:
    assert "none.jsonl" in rorqual("generate", tmp_path / "none.jsonl", "--model", toy.model).complaint()


# ---- serve ------------------------------------------------------------------------------------------------------


def test_serving_others_without_a_key_is_refused(rorqual: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, with the way out, and before a model is loaded."""
    monkeypatch.delenv("RORQUAL_API_KEY", raising=False)
    done = rorqual("serve", "--host", "0.0.0.0", "--port", "0")
    line = Done(done.code, done.out, done.err.replace(f"loading {DEFAULT_MODEL} …\n", "")).complaint()
    assert "0.0.0.0 can be reached from other machines" in line and "keys create" in line and "127.0.0.1" in line


def test_serving_on_a_used_port_is_refused(rorqual: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = rorqual("serve", "--port", port)
    line = Done(done.code, done.out, done.err.replace(f"loading {DEFAULT_MODEL} …\n", "")).complaint()
    assert f"port {port} on 127.0.0.1 is in use" in line and "--port" in line


def test_two_models_of_one_name_are_refused(toy: Toy, rorqual: Run) -> None:
    words = ["serve", "--port", "0", "--model", toy.model, "--model", toy.model]
    assert "two models are called model" in rorqual(*words).complaint()
