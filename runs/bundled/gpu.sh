#!/usr/bin/env bash
# The recipe on the GPU machine: gpu.sh STEP [options of its command]. README.md here has the order.
set -euo pipefail
cd "$(dirname "$0")/../.."
step=$1; shift
python=${PYTHON:-python3} data=${DATA:-data/bundled} out=${OUT_DIR:-out/bundled}
export PYTHONPATH=.:$data/site OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
rorqual() { "$python" -m rorqual "$@"; }
train() { # with the attention that the rehearsal found fastest
  if [ -f "$kept/attention" ]; then "$python" runs/bundled/attention.py with "$(cat "$kept/attention")" "$@"; else rorqual "$@"; fi
}
say() { printf '== %4d s  %s\n' "$SECONDS" "$*"; }
mkdir -p "$out"
kept=$(dirname "$out") # what a rehearsal leaves for the runs after it
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
show() { # what matters of a run's metrics
  "$python" -c "import json,sys
for r in map(json.loads, open(sys.argv[1])): print({k: r[k] for k in ('step','lm_loss','mtp_loss','tokens_per_s','elapsed_s','memory_bytes')})" \
    "$out/$1/metrics.jsonl"
}
notes() { # small files as one archive beside the weights
  local back=${OUT:-$out/back}
  mv "$back/side.json.xz" "$out/"
  tar -C "$out" -cJf "$back/notes.tar.xz" --ignore-failed-read side.json.xz "$@"
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
  convert) # as soon as the first conversations are there: they are part of the calibration
    for _ in $(seq 120); do [ "$(ls "$out"/written/chat/*.jsonl 2> /dev/null | wc -l)" -ge 1 ] && break; sleep 1; done
    "$python" runs/bundled/calibration.py "$data/text" "$out/written/chat" --out "$out/calibration.txt" --characters 200000
    rorqual upcycle "$source" "$out/converted" --text "$out/calibration.txt" --tokens 12288 --mtp --dtype float32 \
      --shared 13 --routed 8 --width 64 --top-k 6 --drop 192 "$@" ;;
  lessons) "$python" runs/bundled/lessons.py --text "$data/text" --out "$out/lessons.jsonl" "$@" ;;
  prepare)
    prepare text "$data/text" --val-fraction "${VAL:-0.005}"
    prepare lessons "$out/lessons.jsonl" --val-fraction 0.01
    prepare chat "$out/written/chat" --val-fraction 0.01
    prepare written "$out/written/text" --val-fraction 0.01
    [ ! -f "$data/books.txt" ] || prepare books "$data/books.txt" ;;
  heal) train distill runs/bundled/heal.toml "$@" ;;
  mtp) train distill runs/bundled/mtp.toml --set init_from="$(newest heal)" "$@" ;;
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
  first) # SECONDS GENERATE [options of heal]: from the source to healed int4 weights in that time; results to $OUT
    total=$1 writing=$2; shift 2
    "$0" source; "$0" text; say "source and text are there"
    ("$0" lessons > "$out/lessons.log" 2>&1 & lessons=$!
     "$0" convert > "$out/convert.log" 2>&1; wait $lessons
     prepare text "$data/text" --val-fraction "${VAL:-0.005}"; prepare lessons "$out/lessons.jsonl" --val-fraction 0.01
     [ ! -f "$data/books.txt" ] || prepare books "$data/books.txt") > "$out/prepare.log" 2>&1 & beside=$!
    "$0" generate --seconds "$writing"
    say "written"; wait $beside || { cat "$out/convert.log" "$out/prepare.log"; exit 1; }
    say "converted, text and lessons prepared"
    prepare written "$out/written/text" --val-fraction 0.01 & other=$!
    prepare chat "$out/written/chat" --val-fraction 0.01; wait $other
    speed=${RATE:-150000}; [ ! -f "$kept/rate" ] || speed=$(cat "$kept/rate")
    left=$((total - SECONDS - ${RESERVE:-65}))
    steps=$((left * speed / 65536))
    say "healing: $steps steps in $left s at $speed tokens/s"
    timeout -s TERM $((total - SECONDS - 35)) "$0" heal --set steps=$steps "$@" 2>&1 | tail -n 40 || true
    say "healed"; "$0" ship heal | tail -n 1
    "$0" pack "${OUT:-$out/back}" --part trunk; "$0" pack "${OUT:-$out/back}" --part mtp
    notes heal/metrics.jsonl heal/config.toml convert.log prepare.log written/generate.json converted/config.json; say "done" ;;
  second) # SECONDS: the MTP module alone, the teacher's answers, the table; results to $OUT
    total=$1; shift
    "$0" answer > "$out/answer.log" 2>&1 & answering=$!
    left=$((total - SECONDS - ${RESERVE:-55}))
    steps=$((left * ${MTP_RATE:-250000} / 65536)); [ $steps -ge 20 ] || steps=20
    say "MTP: $steps steps in $left s"
    timeout -s TERM $((left + 20)) "$0" mtp --set steps=$steps "$@" 2>&1 | tail -n 20 || true
    say "trained"; "$0" ship mtp | tail -n 1; "$0" pack "${OUT:-$out/back}" --part mtp
    wait $answering || cat "$out/answer.log"
    notes mtp/metrics.jsonl mtp/config.toml teacher-answers.jsonl; say "shipped"
    "$0" evaluate --rows 40 --dtype bfloat16; cp "$out/evaluation.json" "${OUT:-$out/back}/"; say "done" ;;
  rehearse) # every step with a stand-in source and a few updates; leaves out/rate and the compiler's cache
    xz -dkf "$data/source/part-a.xz" "$data/source/part-b.xz"
    "$python" runs/bundled/rehearsal.py "$source" "$data/source/part-a" "$data/source/part-b"
    "$0" text; say "stand-in"
    "$0" lessons --count 20000 > "$out/lessons.log" 2>&1 & lessons=$!
    (time "$0" convert --tokens 2048 --length 256) > "$out/convert.log" 2>&1 & beside=$!
    "$0" generate --waves 2
    wait $lessons; wait $beside || { cat "$out/convert.log"; exit 1; }
    say "written, converted"; tail -n 9 "$out/convert.log"
    mkdir -p "$out/some"; cp "$data"/text/python-django-doc.jsonl "$out/some/"
    # The stand-in hardly ever ends a turn, so the lessons serve as its conversations.
    (time prepare text "$out/some" --val-fraction 0.05); prepare written "$out/some" --val-fraction 0.05
    prepare chat "$out/lessons.jsonl" --val-fraction 0.05; prepare lessons "$out/lessons.jsonl" --val-fraction 0.05
    "$python" runs/bundled/attention.py choose > "$kept/attention" || rm "$kept/attention"
    say "prepared; attention: $(cat "$kept/attention" 2> /dev/null || echo default)"
    "$0" heal --set steps=24 --set optim.warmup_steps=4 --set eval_every=20 --set eval_rows=32 --set checkpoint_seconds=9999 \
      --set quantise.fraction=0.5 --set report=false 2>&1 | tail -n 30
    rate "$out/heal/metrics.jsonl" > "$kept/rate"; say "healed at $(cat "$kept/rate") tokens/s in the quantised half"
    show heal
    "$0" mtp --set steps=6 --set eval_rows=32 --set report=false 2>&1 | tail -n 8; say "MTP"; show mtp
    "$0" ship mtp | tail -n 1; "$0" pack "$out/back" --part trunk; ls -l "$out/back"; say "shipped"
    "$0" evaluate --rows 2 --dtype bfloat16; say "evaluated"
    rm -rf "$kept/rehearsal"; mv "$out" "$kept/rehearsal" ;;
  *) echo "unknown step $step; see runs/bundled/README.md" >&2; exit 2 ;;
esac
