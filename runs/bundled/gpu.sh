#!/usr/bin/env bash
# One step of the recipe on the GPU machine: gpu.sh STEP [options of its command]. README.md here has the order.
set -euo pipefail
cd "$(dirname "$0")/../.."
step=$1; shift
python=${PYTHON:-python3} data=${DATA:-data/bundled} out=${OUT_DIR:-out/bundled}
export PYTHONPATH=.:$data/site
rorqual() { "$python" -m rorqual "$@"; }
mkdir -p "$out"
source=$out/smollm2.gguf
[ -f "$source" ] || { cat "$data"/source/part-? > "$source.part" && mv "$source.part" "$source"; }
case $step in
  generate)
    "$python" runs/nano/dialogues.py --gguf "$source" --prompts "$data/prompts.jsonl.xz" --out "$out/dialogues" \
      --seconds 300 --temperature 0.8 --penalty 1.05 "$@" ;;
  convert)
    [ -d "$data/text" ] || tar -C "$data" -xJf "$data/text.tar.xz"
    "$python" runs/bundled/calibration.py "$data/text" "$out/dialogues" --out "$out/calibration.txt"
    rorqual upcycle "$source" "$out/converted" --text "$out/calibration.txt" --tokens 49152 --mtp --dtype float32 "$@" ;;
  prepare)
    [ -d "$data/text" ] || tar -C "$data" -xJf "$data/text.tar.xz"
    rorqual data prepare "$data/text" --tokenizer "$out/converted" --out "$out/shards/text" --val-fraction 0.005 "$@"
    rorqual data prepare "$out/dialogues" --tokenizer "$out/converted" --out "$out/shards/chat" --val-fraction 0.01 "$@"
    rorqual data prepare "$data/lessons.jsonl.xz" --tokenizer "$out/converted" --out "$out/shards/lessons" \
      --val-fraction 0.01 "$@" ;;
  heal) rorqual distill runs/bundled/heal.toml "$@" ;;
  mtp) rorqual distill runs/bundled/mtp.toml "$@" ;;
  ship) rorqual convert "$out/mtp/model" "$out/shipped" --to int4 --max-shard-gb 0.014 "$@" ;;
  evaluate)
    "$python" runs/bundled/evaluate.py --teacher "$source" --model converted="$out/converted" healed="$out/mtp/model" \
      shipped="$out/shipped" --shards text="$out/shards/text/val" chat="$out/shards/chat/val" \
      lessons="$out/shards/lessons/val" --run runs/bundled/heal.toml --out "$out/evaluation.json" "$@" ;;
  back)
    part=$1 target=$2
    mapfile -t files < <(cd "$out/shipped" && ls)
    # Four files of at most 14 MB a trip stay under 60 MB; everything small goes with the first.
    big=() small=()
    for f in "${files[@]}"; do case $f in model-*) big+=("$f") ;; *) small+=("$f") ;; esac; done
    mkdir -p "$target"
    if [ "$part" = 1 ]; then
      tar -C "$out" -cJf "$target/rest.tar.xz" "${small[@]/#/shipped/}" evaluation.json heal/metrics.jsonl mtp/metrics.jsonl
    fi
    for f in "${big[@]:$((4 * (part - 1))):4}"; do cp "$out/shipped/$f" "$target/"; done ;;
  *) echo "unknown step $step; see runs/bundled/README.md" >&2; exit 2 ;;
esac
