"""`make soak`: the tests of kills, resuming, random traffic and disconnects, again and again with fresh random inputs.

`make test` runs each once. Here they go on for --minutes; the first failure ends it. The result goes to benchmarks/.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from rorqual.cli.bench_report import environment

TESTS = {
    "training killed and resumed": ["tests/unit/train", "-k", "killed", "--kills", "50"],
    "shards killed and resumed": ["tests/unit/data", "-k", "kill or interrupt"],
    "engine under random traffic": ["tests/unit/engine/test_scheduler.py", "tests/unit/engine/test_pages.py"],
    "engine process killed": ["tests/unit/engine/test_process.py", "tests/unit/engine/test_supervisor.py"],
    "chat server killed in answers": ["tests/net/test_chat_kills.py", "--chat-kills", "100", "--timeout", "1800"],
    "server under disconnects and load": [
        "tests/net",
        "-k",
        "disconnect or concurrent or streams or outlives or leaves",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/soak.json"))
    options = parser.parse_args()
    begin = time.monotonic()
    end = begin + options.minutes * 60
    rounds = dict.fromkeys(TESTS, 0)
    failed = ""
    while time.monotonic() < end and not failed:
        for name, selection in TESTS.items():
            done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *selection])
            if done.returncode:
                failed = name
                break
            rounds[name] += 1
            print(f"{name}: round {rounds[name]} passed", flush=True)
    result = {
        "kind": "soak",
        "minutes": round((time.monotonic() - begin) / 60, 1),  # it ends with a whole round
        "rounds": rounds,
        "failed": failed,
        "environment": environment("cpu"),
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
