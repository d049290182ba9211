#!/usr/bin/env bash
# From data/nano (see README.md here) to out/nano/sft/model: tokenizer, shards, pretraining, fine-tuning.
# Killed at any point, the same command goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/../.."
rorqual() { if [ -x .venv/bin/rorqual ]; then .venv/bin/rorqual "$@"; else PYTHONPATH=. python3 -m rorqual "$@"; fi; }
data=data/nano out=out/nano
[ -f $out/tokenizer/tokenizer.json ] ||
  rorqual tokenizer train $data/dialogues $data/exact.jsonl.xz $data/text --vocab-size 6144 --max-mb 120 --out $out/tokenizer
rorqual data prepare $data/text --tokenizer $out/tokenizer --out $out/shards/text --val-fraction 0.004
rorqual data prepare $data/dialogues --tokenizer $out/tokenizer --out $out/shards/dialogues --val-fraction 0.01
rorqual data prepare $data/exact.jsonl.xz --tokenizer $out/tokenizer --out $out/shards/exact --val-fraction 0.01
rorqual train runs/nano/pretrain.toml "$@"
rorqual sft runs/nano/sft.toml
