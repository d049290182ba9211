"""Every record of a GPU in benchmarks/, by one command on a machine with an H100 or H200 (with two of them in about half the
time: what is timed has the first for itself).

    python scripts/gpu_records.py OUT                       # all of it
    python scripts/gpu_records.py OUT engine train          # some groups or parts
    python scripts/gpu_records.py OUT engine --within 560   # what still fits; the same command goes on with the rest
    python scripts/gpu_records.py OUT --list                # parts, expected seconds, command lines
    python scripts/gpu_records.py OUT --rehearse            # the same in miniature on a CPU: shows that they run
    python scripts/gpu_records.py OUT --collect             # the finished records into benchmarks/ and its table

OUT gets the records under the names they have in benchmarks/, and logs/PART.txt, which for a profile is the report. A part
whose log is there is done and skipped; what failed or was cut short is logs/PART.failed.txt and runs again. Records name
the commit of this checkout; where only the files were copied, `--commit` says which.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from gpu_parts import PARTS, Part, miniature  # noqa: E402


def main() -> None:
    options = arguments().parse_args()
    parts = chosen(options.parts)
    if options.list:
        listed(parts)
        return
    out = options.out.resolve()
    if options.collect:
        collect(out, ROOT / "benchmarks")
        return
    if options.rehearse != (out / "REHEARSAL").exists() and out.exists() and any(out.iterdir()):
        sys.exit(f"{out} holds {'records' if options.rehearse else 'a rehearsal'}: name another folder")
    (out / "logs").mkdir(parents=True, exist_ok=True)
    if options.rehearse:
        (out / "REHEARSAL").touch()
    if options.commit:
        os.environ["RORQUAL_COMMIT"] = options.commit
    sys.exit(not Run(out, options.rehearse, options.within, gpus(), options.jobs).all(parts))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__ and __doc__.split("\n\n")[0], epilog=__doc__ and __doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("out", type=Path, help="folder for records and logs")
    parser.add_argument("parts", nargs="*", help="groups (engine, training, tests) or parts; default: all")
    parser.add_argument("--within", type=float, default=float("inf"), help="seconds that all of it may take")
    parser.add_argument("--jobs", type=int, default=4, help="parts at once among those that are not timed")
    parser.add_argument("--commit", default="", help="of a copy that is no checkout, for the records")
    parser.add_argument("--list", action="store_true", help="show the parts and run nothing")
    parser.add_argument("--rehearse", action="store_true", help="in miniature on a CPU")
    parser.add_argument("--collect", action="store_true", help="copy finished records to benchmarks/")
    return parser


def chosen(names: Sequence[str]) -> list[Part]:
    known = {p.name for p in PARTS} | {p.group for p in PARTS}
    if unknown := sorted(set(names) - known):
        sys.exit(f"no part or group is called {', '.join(unknown)}; --list shows them")
    return [p for p in PARTS if not names or p.name in names or p.group in names]


def listed(parts: Sequence[Part]) -> None:
    for part in parts:
        lane = "" if part.lane == "alone" else f", {part.lane}"
        print(f"{part.group:9} {part.name} ({part.seconds} s{lane}){f' -> {part.record}' if part.record else ''}")
        print(f"          {part.command}")
    for lane in ("alone", "beside", "cpu", "all"):
        print(f"{lane}: {sum(p.seconds for p in parts if p.lane == lane)} s")


def gpus() -> list[str]:
    """Those that are ours, as CUDA_VISIBLE_DEVICES names them, without loading torch; none where the driver's tool is
    missing."""
    if chosen := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return chosen.split(",")
    try:
        told = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in told.stdout.splitlines()))]


@dataclass
class Run:
    """within: seconds for everything. What is timed ("alone") has the first GPU for itself; the rest ("beside") runs `jobs`
    at once on the last one, at the same time if that is another and afterwards if not; "cpu" from the start, "all" at the
    end."""

    out: Path
    rehearse: bool
    within: float
    gpus: list[str]
    jobs: int

    def __post_init__(self) -> None:
        self.begin = time.monotonic()
        self.ended: dict[str, threading.Event] = {}
        self.results: dict[str, str] = {}

    def all(self, parts: Sequence[Part]) -> bool:
        """Whether each of them is done."""
        self.ended = {p.name: threading.Event() for p in parts}
        lanes = {lane: [p for p in parts if p.lane == lane] for lane in ("alone", "beside", "cpu", "all")}
        with ThreadPoolExecutor(2) as helpers, ThreadPoolExecutor(self.jobs) as pool:
            side = [helpers.submit(self.one, p) for p in lanes["cpu"]]
            if len(self.gpus) > 1:
                side += [pool.submit(self.one, p) for p in lanes["beside"]]
            for part in lanes["alone"]:
                self.one(part)
            if len(self.gpus) <= 1:
                side += [pool.submit(self.one, p) for p in lanes["beside"]]
            for job in side:
                job.result()
            for part in lanes["all"]:
                self.one(part)
        width = max(map(len, self.results), default=0)
        print(f"\n{time.monotonic() - self.begin:.0f} s in all, {len(self.gpus)} GPU(s), records in {self.out}")
        for part in parts:
            print(f"{part.name:{width}}  {self.results[part.name].splitlines()[0]}")
        return all(self.log(p).exists() for p in parts)

    def log(self, part: Part) -> Path:
        return self.out / "logs" / f"{part.name}.txt"

    @property
    def left(self) -> float:
        return self.within - (time.monotonic() - self.begin)

    def one(self, part: Part) -> None:
        try:
            self.results[part.name] = self.outcome(part)
        except Exception as error:  # the others go on
            self.results[part.name] = f"FAILED: {type(error).__name__}: {error}"
        finally:
            self.ended[part.name].set()
        self.say(part, self.results[part.name])

    def say(self, part: Part, text: str) -> None:
        print(f"[{time.monotonic() - self.begin:4.0f} s] {part.name}: {text}", flush=True)

    def outcome(self, part: Part) -> str:
        if self.log(part).exists():
            return "done before"
        if part.after:
            if part.after in self.ended:
                self.ended[part.after].wait()
            if not (self.out / "logs" / f"{part.after}.txt").exists():
                return f"left out: it needs {part.after}"
        needed = part.least or part.seconds
        if not self.rehearse and needed > self.left:
            return f"left out: {needed} s do not fit into the {max(0, self.left):.0f} s left"
        words = command(part, self.out, self.rehearse)
        self.say(part, f"about {part.seconds} s: {shlex.join(words[1:])}")
        start, failed = time.monotonic(), self.log(part).with_suffix(".failed.txt")
        code = run(words, failed, min(self.left, 60 + 2.5 * part.seconds), self.surroundings(part), self.cores(part))
        took = f"{time.monotonic() - start:.0f} s, expected {part.seconds}"
        lines = failed.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if code:
            return f"FAILED with {'time' if code == CUT else code} after {took}\n    " + "\n    ".join(lines[-8:])
        failed.rename(self.log(part))
        return f"{took}{f': {lines[-1].strip()}' if part.group == 'tests' and lines else ''}"

    def surroundings(self, part: Part) -> dict[str, str]:
        env = {**os.environ, "COLUMNS": "150", "PYTHONUNBUFFERED": "1"}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH", "")]))
        if len(self.gpus) > 1 and part.lane != "all":
            env["CUDA_VISIBLE_DEVICES"] = self.gpus[-1 if part.lane == "beside" else 0]
        if self.rehearse:
            env["CUDA_VISIBLE_DEVICES"] = ""
            env |= {"TRITON_INTERPRET": "1"} if part.name == "attention" else {}  # a kernel and nothing else
        return env

    def cores(self, part: Part) -> set[int]:
        """What is timed shares its cores with nothing, where there are enough."""
        every = sorted(os.sched_getaffinity(0))
        if len(every) < 8 or part.lane == "all" or (len(self.gpus) <= 1 and part.lane == "beside"):
            return set(every)
        border = len(every) // 2 if len(self.gpus) > 1 else len(every) * 3 // 4
        return set(every[:border] if part.lane == "alone" else every[border:])


CUT = 124


def command(part: Part, out: Path, rehearse: bool) -> list[str]:
    """Its words, the first of them this Python; {out} and {json} filled in."""
    words = miniature(part) if rehearse else shlex.split(part.command)
    words = [w.format(out=out, json=out / part.record) for w in words]
    if words[0] == "rorqual":
        return [sys.executable, "-m", *words, *(["--json", str(out / part.record)] if part.record else [])]
    return [sys.executable, *words[1:]]


def run(words: list[str], log: Path, limit: float, env: dict[str, str], cores: set[int]) -> int:
    """The exit code, CUT where the limit ended it; its output goes to the log. Nothing that it started outlives it."""
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            words, cwd=ROOT, env=env, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )  # fmt: skip
        try:
            return process.wait(None if limit == float("inf") else max(1.0, limit))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            return CUT
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def collect(out: Path, benchmarks: Path) -> None:
    """Copy the records of finished parts, pictures beside them, and write the table anew."""
    if (out / "REHEARSAL").exists():
        sys.exit(f"{out} is a rehearsal: nothing in it was measured")
    for part in PARTS:
        if part.record and (out / "logs" / f"{part.name}.txt").exists():
            for file in (out / part.record, (out / part.record).with_suffix(".png")):
                if file.exists():
                    shutil.copy(file, benchmarks / file.name)
                    print(f"{file.name} <- {part.name}")
    subprocess.run([sys.executable, str(ROOT / "scripts" / "benchmarks.py")], check=True)


if __name__ == "__main__":
    main()
