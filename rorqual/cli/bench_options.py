"""Options that several `rorqual bench` commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the result as JSON.", metavar="FILE")]
Model = Annotated[str, typer.Option(help="A preset (random weights by seed), a model directory or a bundled model.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Rounds = Annotated[int, typer.Option(help="Rounds; the engines take turns in each, medians are reported.", min=1)]
Peer = Annotated[bool, typer.Option("--peer/--no-peer", help="Measure transformers in the same run, where installed.")]

Dtype = Annotated[
    str, typer.Option(help="Our weights: float32, bfloat16, int8 or int4; default float32 on CPU, bfloat16 on GPU.")
]
Deterministic = Annotated[bool, typer.Option("--deterministic", help="On a GPU too, the same bits in every batch.")]
AlsoDeterministic = Annotated[
    bool, typer.Option("--deterministic", help="Measure `--deterministic` too: the ratio is what it costs.")
]
AlsoOverlapping = Annotated[
    bool, typer.Option("--overlap", help="Measure kernels that never overlap too: what overlapping gains (on a GPU).")
]
AlsoPromptGraphs = Annotated[
    bool, typer.Option("--prompt-graphs", help="Measure captured prompts too (`engine.prompts`; on a GPU).")
]
Threads = Annotated[
    int,
    typer.Option(help="CPU threads of every engine; 0: all physical cores, in serve and mtp what is fastest.", min=0),
]
Llama = Annotated[
    bool, typer.Option("--llama/--no-llama", help="Measure llama.cpp at the same bits, where llama-cpp-python is.")
]
