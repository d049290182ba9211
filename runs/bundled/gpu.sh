#!/usr/bin/env bash
# The recipe on the GPU machine: gpu.sh STEP [options of its command]. README.md here has the order.
set -euo pipefail
cd "$(dirname "$0")/../.."
step=$1; shift
python=${PYTHON:-python3} data=${DATA:-data/bundled} out=${OUT_DIR:-out/bundled}
export PYTHONPATH=.:$data/site OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
rorqual() { "$python" -m rorqual "$@"; }
say() { printf '== %4d s  %s\n' "$SECONDS" "$*"; }
mkdir -p "$out"
source=$out/smollm2.gguf

prepare() { # NAME INPUT [options]
  local name=$1 input=$2; shift 2
  rorqual data prepare "$input" --tokenizer "$out/converted" --out "$out/shards/$name" "$@" | tail -n 1
}
newest() { # the finished model of a run, or its newest checkpoint
  if [ -d "$out/$1/model" ]; then echo "$out/$1/model"; else ls -d "$out/$1"/checkpoints/step-* | sort -V | tail -n 1; fi
}
rate() { # median tokens/s of a run's last steps
  "$python" -c "import json,statistics,sys; x=[json.loads(l) for l in open(sys.argv[1])]
print(int(statistics.median(r['tokens_per_s'] for r in x[-min(8, max(1, len(x) // 2)):])))" "$1"
}

case $step in
  source) # joins the four parts
    [ -f "$source" ] || { for p in a b c d; do xz -dc "$data/source/part-$p.xz"; done > "$source.part" && mv "$source.part" "$source"; } ;;
  text) # one folder out of the two archives
    for half in a b; do [ -f "$data/text-$half.tar.xz" ] && tar -C "$data" -xJf "$data/text-$half.tar.xz"; done
    mkdir -p "$data/text"
    for f in "$data"/text-a/*.jsonl; do cat "$data"/text-?/"$(basename "$f")" > "$data/text/$(basename "$f")"; done ;;
  generate)
    "$python" runs/bundled/generate.py --gguf "$source" --asks "$data/asks.jsonl.xz" --text "$data/text" --out "$out/written" "$@" ;;
  convert)
    rorqual upcycle "$source" "$out/converted" --text "$data/calibration.txt" --tokens 24576 --mtp --dtype float32 \
      --shared 12 --routed 12 --width 64 --top-k 8 "$@" ;;
  lessons) "$python" runs/bundled/lessons.py --text "$data/text" --out "$out/lessons.jsonl" "$@" ;;
  prepare)
    prepare text "$data/text" --val-fraction "${VAL:-0.005}"
    prepare lessons "$out/lessons.jsonl" --val-fraction 0.01
    prepare chat "$out/written/chat" --val-fraction 0.01
    prepare written "$out/written/text" --val-fraction 0.01
    [ ! -f "$data/books.txt" ] || prepare books "$data/books.txt" ;;
  heal) rorqual distill runs/bundled/heal.toml "$@" ;;
  mtp) rorqual distill runs/bundled/mtp.toml --set init_from="$(newest heal)" "$@" ;;
  answer)
    "$python" runs/bundled/generate.py --gguf "$source" --answer runs/bundled/{held-out,fixed,exam}.jsonl --rows 640 --length 768 \
      --out "$out/teacher-answers.jsonl" "$@" ;;
  ship) # NAME: heal or mtp
    name=$1; shift
    rm -rf "$out/shipped"
    rorqual convert "$(newest "$name")" "$out/shipped" --to int4 --max-shard-gb 0.014 "$@" ;;
  evaluate)
    sets=(text="$out/shards/text/val" chat="$out/shards/chat/val")
    [ ! -d "$out/shards/books" ] || sets+=(books="$out/shards/books/train")
    "$python" runs/bundled/evaluate.py --teacher "$source" --model converted="$out/converted" healed="$(newest "${HEALED:-mtp}")" \
      shipped="$out/shipped" --shards "${sets[@]}" --run runs/bundled/heal.toml --out "$out/evaluation.json" "$@" ;;
  pack) "$python" runs/bundled/carry.py pack "$out/shipped" "$@" ;; # TARGET --part trunk|mtp
  first) # SECONDS GENERATE: source to healed int4 weights, in that time; logs and weights to $OUT
    total=$1 writing=$2; shift 2
    "$0" source; "$0" text; say "source and text are there"
    ("$0" convert > "$out/convert.log" 2>&1; "$0" lessons > "$out/lessons.log" 2>&1
     prepare text "$data/text" --val-fraction "${VAL:-0.005}"; prepare lessons "$out/lessons.jsonl" --val-fraction 0.01
     [ ! -f "$data/books.txt" ] || prepare books "$data/books.txt") > "$out/prepare.log" 2>&1 &
    beside=$!
    "$0" generate --seconds "$writing"
    say "written"; wait $beside || { cat "$out/convert.log" "$out/prepare.log"; exit 1; }
    say "converted, text and lessons prepared"
    prepare written "$out/written/text" --val-fraction 0.01 & other=$!
    prepare chat "$out/written/chat" --val-fraction 0.01; wait $other
    speed=${RATE:-150000}; [ ! -f out/rate ] || speed=$(cat out/rate)
    left=$((total - SECONDS - ${RESERVE:-60}))
    steps=$((left * speed / 65536))
    say "healing: $steps steps in $left s at $speed tokens/s"
    timeout -s TERM $((total - SECONDS - 35)) "$0" heal --set steps=$steps "$@" 2>&1 | tail -n 40 || true
    say "healed"; "$0" ship heal
    cp -r "$out"/heal/metrics.jsonl "$out"/heal/config.toml "$out"/convert.log "$out"/prepare.log "$out"/written/generate.json "${OUT:-$out}/"
    "$0" pack "${OUT:-$out}" --part trunk; say "done" ;;
  second) # SECONDS: the MTP module alone, then the table
    total=$1; shift
    left=$((total - SECONDS - ${RESERVE:-55}))
    steps=$((left * ${MTP_RATE:-250000} / 65536)); [ $steps -ge 20 ] || steps=20
    say "MTP: $steps steps in $left s"
    "$0" answer > "$out/answer.log" 2>&1 & answering=$!
    timeout -s TERM $((left + 15)) "$0" mtp --set steps=$steps "$@" 2>&1 | tail -n 20 || true
    "$0" ship mtp; "$0" pack "${OUT:-$out}" --part mtp
    cp "$out/mtp/metrics.jsonl" "${OUT:-$out}/mtp-metrics.jsonl"; say "shipped"
    wait $answering && cp "$out/teacher-answers.jsonl" "${OUT:-$out}/" || cat "$out/answer.log"
    "$0" evaluate --rows 40 --dtype bfloat16; cp "$out/evaluation.json" "${OUT:-$out}/"; say "done" ;;
  rehearse) # every step with a stand-in source and a few updates; leaves out/rate and the compiler's cache
    xz -dk "$data/source/part-a.xz" "$data/source/part-b.xz"
    "$python" runs/bundled/rehearsal.py "$source" "$data/source/part-a" "$data/source/part-b"
    "$0" text; say "stand-in"
    ("$0" convert --tokens 6144; "$0" lessons --count 20000) > "$out/convert.log" 2>&1 & beside=$!
    "$0" generate --waves 2
    wait $beside || { cat "$out/convert.log"; exit 1; }
    say "written, converted"; tail -n 6 "$out/convert.log"
    mkdir -p "$out/some"; head -n 3000 "$data/text/python-django-doc.jsonl" > "$out/some/a.jsonl"
    prepare text "$out/some" --val-fraction 0.02; prepare lessons "$out/lessons.jsonl" --val-fraction 0.01
    prepare chat "$out/written/chat" --val-fraction 0.05; prepare written "$out/written/text" --val-fraction 0.05
    say "prepared"
    "$0" heal --set steps=24 --set optim.warmup_steps=4 --set eval_every=20 --set eval_rows=8 --set checkpoint_every=1000 \
      --set quantise.fraction=0.5 2>&1 | tail -n 30
    rate "$out/heal/metrics.jsonl" > out/rate; say "healed at $(cat out/rate) tokens/s in the quantised half"
    "$python" -c "import json; [print({k: r[k] for k in ('step','lm_loss','mtp_loss','tokens_per_s','elapsed_s','memory_bytes')}) for r in map(json.loads, open('$out/heal/metrics.jsonl'))]"
    "$0" mtp --set steps=6 --set eval_rows=8 2>&1 | tail -n 8; say "MTP"
    "$python" -c "import json; print([int(json.loads(l)['tokens_per_s']) for l in open('$out/mtp/metrics.jsonl')])"
    "$0" ship mtp; "$0" pack "$out/back" --part trunk; ls -l "$out/back"; say "shipped"
    "$0" evaluate --rows 2 --dtype bfloat16; say "evaluated"
    rm -rf out/rehearsal; mv "$out" out/rehearsal ;;
  *) echo "unknown step $step; see runs/bundled/README.md" >&2; exit 2 ;;
esac
