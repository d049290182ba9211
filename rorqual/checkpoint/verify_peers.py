"""Peers of `rorqual verify` that run on this machine: transformers, and llama.cpp behind a pipe."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rorqual.checkpoint import verify_worker
from rorqual.checkpoint.verify import Scores
from rorqual.checkpoint.verify_plain import is_quantised, write_config, write_plain
from rorqual.checkpoint.verify_prompts import Prompt
from rorqual.config import ModelConfig
from rorqual.errors import BackendUnavailable, CheckpointError

REREAD = "quantised weights were read for the peer by a second reader, not by rorqual's"


class TransformersPeer:
    """transformers in fp32 with eager attention and experts, from the same directory."""

    kind = "transformers"

    def __init__(self, directory: Path, device: str = "cpu") -> None:
        """Raises BackendUnavailable without transformers, CheckpointError where it finds no value for a weight."""
        try:
            import transformers
        except ImportError:
            raise BackendUnavailable(
                "comparing with transformers needs the transformers package", remedy="pip install 'transformers>=5.17'"
            ) from None
        self.name = f"transformers {transformers.__version__}, float32, eager"
        self.notes: list[str] = []
        self._device = device
        with _silent(transformers.logging), tempfile.TemporaryDirectory(prefix="rorqual-verify-") as folder:
            place = self._readable(directory, Path(folder))
            load: Any = transformers.AutoModelForCausalLM.from_pretrained
            model, info = load(
                place, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager",
                trust_remote_code=False, output_loading_info=True,
            )  # fmt: skip
        if absent := sorted([*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])]):
            raise CheckpointError(
                f"transformers found no value for {len(absent)} weights, among them {absent[0]}",
                remedy="config.json and weights must be of one model",
            )
        self._model = model.to(device).eval()

    def _readable(self, directory: Path, folder: Path) -> Path:
        """The directory itself, or one made for transformers."""
        if is_quantised(directory):
            write_plain(directory, folder)
            self.notes.append(REREAD)
            return folder
        config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if config.get("model_type") == "deepseek_v3":
            return directory
        write_config(config, folder)
        for file in directory.resolve().iterdir():
            if file.name != "config.json":
                (folder / file.name).symlink_to(file)
        return folder

    @torch.inference_mode()
    def score(self, prompt: Prompt) -> Scores:
        ids = torch.tensor([prompt.ids], device=self._device)
        return Scores(prompt.ids, logits=self._model(ids, use_cache=False).logits[0].float().cpu().numpy())

    def tokenise(self, text: str) -> list[int] | None:
        """It reads the same tokenizer.json with the same library: nothing to learn."""
        return None

    def close(self) -> None:
        """Nothing is held beside memory."""


class LlamaCppPeer:
    """llama.cpp through llama-cpp-python, in a process of its own (`verify_worker`)."""

    kind = "llama.cpp"

    def __init__(
        self, directory: Path, gguf: Path | None, longest: int, python: Path | None = None, timeout_s: float = 600
    ) -> None:
        """gguf: the file to run; None writes an fp32 one into a temporary place. longest: tokens of the longest prompt;
        python: an interpreter that has llama-cpp-python, this one if None; timeout_s: for each answer.

        Raises BackendUnavailable without llama-cpp-python or where llama.cpp refuses the file, CheckpointError where
        the directory cannot be written as GGUF.
        """
        self.notes: list[str] = []
        self._timeout_s = timeout_s
        self._folder = tempfile.TemporaryDirectory(prefix="rorqual-verify-")
        self._errors = Path(self._folder.name) / "stderr.txt"
        self._process: subprocess.Popen[str] | None = None
        try:
            command = [_interpreter(python), str(Path(verify_worker.__file__).resolve())]
            file = gguf or self._export(directory)
            if not file.is_file():
                raise CheckpointError(f"there is no file {file}", remedy="name a GGUF file of this model")
            arguments = [str(file), str(longest + 1), str(torch.get_num_threads())]
            self._process = _start([*command, *arguments], self._errors)
            loaded, rows = self._receive(), ModelConfig.load(directory).vocab_size
            self.name = f"llama.cpp (llama-cpp-python {loaded['version']}), {file.name}"
            if loaded["vocabulary"] != rows:
                raise CheckpointError(
                    f"{file.name} has a vocabulary of {loaded['vocabulary']}, {directory} of {rows}",
                    remedy="both sides must run one model",
                )
        except BaseException:
            self.close()
            raise

    def _export(self, directory: Path) -> Path:
        from rorqual.checkpoint.gguf import export_gguf
        from rorqual.checkpoint.source import Source

        folder = Path(self._folder.name)
        if is_quantised(directory):
            (folder / "plain").mkdir()
            write_plain(directory, folder / "plain")
            self.notes.append(REREAD)
            directory = folder / "plain"
        file = folder / "f32.gguf"
        self.notes += export_gguf(Source.open(directory), file, kind="f32")
        return file

    def score(self, prompt: Prompt) -> Scores:
        file = Path(self._folder.name) / "logits.npy"
        self._ask({"ids": list(prompt.ids), "to": str(file)})
        try:
            logits = np.load(file).astype(np.float32)
        except (OSError, ValueError) as error:
            raise BackendUnavailable(f"llama.cpp's logits cannot be read: {error}") from None
        file.unlink()
        return Scores(prompt.ids, logits=logits)

    def tokenise(self, text: str) -> list[int] | None:
        ids: list[int] | None = self._ask({"text": text}).get("ids")
        return ids

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # told below, with the reason
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        """The next line. Raises BackendUnavailable for an error, for silence, and for a process that ended."""
        assert self._process is not None and self._process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            if self._process is not None:
                self._process.kill()

        timer = threading.Timer(self._timeout_s, stop)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if late.is_set():
            raise BackendUnavailable(f"llama.cpp did not answer within {self._timeout_s:g} s")
        if not line:
            code = self._process.wait()
            raise BackendUnavailable(f"llama.cpp ended with status {code}{self._last_words()}")
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise BackendUnavailable(f"the llama.cpp process answered {line[:80]!r}, which is no JSON") from None
        if "error" in answer:
            raise BackendUnavailable(f"llama.cpp: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        lines = [line for line in self._errors.read_text("utf-8", "replace").splitlines() if line.strip()]
        return f": {lines[-1][:200]}" if lines else ""

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()  # it holds nothing worth a farewell
            self._process.communicate()
            self._process = None
        self._folder.cleanup()


@contextlib.contextmanager
def _silent(logging: Any) -> Iterator[None]:
    """transformers warns about weights of prediction modules, which it does not run, and draws a bar of its own."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _interpreter(python: Path | None) -> str:
    """Raises BackendUnavailable where there is no interpreter with llama-cpp-python."""
    if python is not None:
        return str(python)
    if importlib.util.find_spec("llama_cpp") is None:
        raise BackendUnavailable(
            "comparing with llama.cpp needs the llama-cpp-python package",
            remedy="pip install llama-cpp-python, or give an interpreter that has it with --peer-python",
        )
    return sys.executable


def _start(command: list[str], errors: Path) -> subprocess.Popen[str]:
    """Its standard error goes into a file, so that it never waits for a reader."""
    try:
        with errors.open("wb") as file:
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, encoding="utf-8"
            )
    except OSError as error:
        raise BackendUnavailable(
            f"{command[0]} cannot be run: {os.strerror(error.errno or 0)}", remedy="name a Python with --peer-python"
        ) from None
