"""The long tests of the API: a storm of streams over an engine that is killed, malformed requests, fuzzing by the published
document, and the clients. `make test` has a short sample of each. The record goes to benchmarks/soak-server.json.

    python scripts/soak_server.py [--seconds 300] [--requests 10000] [--examples 2000] [storm malformed openapi clients]
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rorqual.cli.bench_report import environment
from rorqual.cli.http_load import answers
from rorqual.cli.scripted_server import scripted_server
from rorqual.config import DEFAULT_MODEL, resolve_model
from tests.net.malformed import send_all
from tests.net.storm import storm
from tests.net.test_bundled import SERVE, serving

Record = dict[str, Any]


def weather(options: argparse.Namespace) -> Record:
    """64 streams. An engine that dies within a minute of its start five times in a row is given up, so it is killed less
    often than that."""
    with serving([*SERVE, "--log-format", "json"]) as server:
        return storm(server, seconds=options.seconds, streams=64, kill_every_s=62, seed=options.seed)


def nonsense(options: argparse.Namespace) -> Record:
    """Memory is compared from a fifth of the requests on, when caches are full."""
    with scripted_server(resolve_model(DEFAULT_MODEL), partial(answers, period_s=0.0, tokens=3)) as server:
        first = options.requests // 5
        statuses, faults = send_all(server.url, first, options.seed)
        before = server.memory_bytes()
        more, found = send_all(server.url, options.requests - first, options.seed + 1)
        grown, live = server.memory_bytes() - before, server.live()
    faults += found
    if grown > 16 << 20:
        faults.append(f"memory grew by {grown} bytes")
    if live:
        faults.append(f"{live} requests are left")
    megabytes = {"MB": before / 1e6, "MB more at the end": grown / 1e6}
    return {
        "requests": options.requests,
        "seed": options.seed,
        **dict(sorted((statuses + more).items())),
        **megabytes,
        "faults": faults,
    }


def fuzz(options: argparse.Namespace) -> Record:
    tests = ["tests/net/test_openapi.py", "--examples", str(options.examples), "--timeout", "3600"]
    return {"requests a route": 2 * options.examples, **run("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)}


def clients(options: argparse.Namespace) -> Record:
    return run("scripts/clients.py")


def run(*command: str) -> Record:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    print(done.stdout[-6000:])
    last = [line for line in done.stdout.splitlines() if line.strip()][-1:]
    return {"result": "; ".join(last), "faults": [done.stdout[-3000:] + done.stderr[-1000:]] if done.returncode else []}


PARTS: dict[str, Callable[[argparse.Namespace], Record]] = {
    "storm": weather, "malformed": nonsense, "openapi": fuzz, "clients": clients,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--note", default="", help="what else the machine did")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/soak-server.json"))
    options = parser.parse_args()
    result: Record = (
        json.loads(options.json.read_text()) if options.json.exists() else {"kind": "server soak", "parts": {}}
    )
    failed = False
    for name in options.parts or PARTS:
        began = time.monotonic()
        part = PARTS[name](options)
        failed = failed or bool(part["faults"])
        result["parts"][name] = {"took_s": round(time.monotonic() - began), **part, "faults": part["faults"][:20]}
        result |= {"note": options.note, "environment": environment("cpu")}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        print(name, json.dumps(result["parts"][name], indent=1)[:3000], flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
