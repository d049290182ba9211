#!/usr/bin/env bash
# The recipe on the GPU machine: gpu.sh STEP [options of its command]. README.md here has the order.
set -euo pipefail
cd "$(dirname "$0")/../.."
step=$1; shift
python=${PYTHON:-python3} data=${DATA:-data/bundled} out=${OUT_DIR:-out/bundled} gpus=${GPUS:-1}
ours=${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((gpus - 1)))}
me="bash runs/bundled/gpu.sh" # by its path from here, and whether or not the copy kept its mode
export PYTHONPATH=.:$data/site OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
rorqual() { "$python" -m rorqual "$@"; }
train() { # in place of this shell, so that a signal reaches it; on $GPUS of them, as `rehearse` or `measure` says
  local more=() run=("$python"); [ ! -f "$kept/options" ] || read -ra more < "$kept/options"
  [ "$gpus" -eq 1 ] || run+=(-m torch.distributed.run --standalone --nproc-per-node "$gpus")
  if [ -f "$kept/attention" ]; then exec "${run[@]}" runs/bundled/attention.py with "$(cat "$kept/attention")" "$@" "${more[@]}"; fi
  exec "${run[@]}" -m rorqual "$@" "${more[@]}"
}
say() { printf '== %4d s  %s\n' "$SECONDS" "$*"; }
mkdir -p "$out"
kept=$(dirname "$out") # what a rehearsal leaves for the runs after it
source=$out/smollm2.gguf
[ -d "$data/site" ] || [ ! -f "$data/site.tar.xz" ] || tar -C "$data" -xJf "$data/site.tar.xz"

prepare() { # NAME INPUT [options]
  local name=$1 input=$2; shift 2
  rorqual data prepare "$input" --tokenizer "$out/converted" --out "$out/shards/$name" "$@" | tail -n 1
}
prose() { # what of the texts is literature, once more by itself
  mkdir -p "$out/prose"; cp -p "$data"/text/prose-*.jsonl "$out/prose/"; prepare prose "$out/prose" --val-fraction "${VAL:-0.02}"
}
newest() { # RUN...: of the first of these runs that has any, the finished model or the newest checkpoint
  local run state
  for run in "$@"; do
    if [ -f "$out/$run/model/config.json" ]; then echo "$out/$run/model"; return; fi
    state=$(ls -d "$out/$run"/checkpoints/step-*/trainer.json 2> /dev/null | sort -V | tail -n 1) || true
    if [ -n "$state" ]; then dirname "$state"; return; fi
  done
  echo "there are no weights of $* in $out" >&2; return 1
}
steps() { # RUN SECONDS RATE LEAST: as many as fit; a run that has begun keeps its number
  local n=$(($2 * $3 / 65536))
  [ -f "$out/$1/config.toml" ] && [ -f "$out/$1.steps" ] || echo $((n > $4 ? n : $4)) > "$out/$1.steps"
  cat "$out/$1.steps"
}
limited() { # SECONDS COMMAND...: SIGTERM after that time (a run saves and ends), SIGKILL if that does not help
  local limit=$(($1 > 20 ? $1 : 20)); shift
  timeout -k 45 -s TERM "$limit" "$@" 2>&1 | tail -n 30 || true
}
figure() { # NAME DEFAULT: a number that a rehearsal left, or the default
  if [ -f "$kept/$1" ]; then cat "$kept/$1"; else echo "$2"; fi
}
rate() { # METRICS SHARE: tokens/s where SHARE of a run's steps are as the last quarter of these, the others as the second
  "$python" -c "import json,statistics,sys; x=[json.loads(l)['tokens_per_s'] for l in open(sys.argv[1])]
share, n = float(sys.argv[2]), len(x)
slow, fast = statistics.median(x[-max(1, n // 4):]), statistics.median(x[n // 4:max(n // 2, n // 4 + 1)])
print(int(1 / (share / slow + (1 - share) / fast)))" "$@"
}
rates() { # RUN: what `first` and `second` plan by
  rate "$out/$1/metrics.jsonl" 0.35 > "$kept/rate"; rate "$out/$1/metrics.jsonl" 1 > "$kept/rate-rounded"
}
metered() { # notes the GPU's power each second until this step ends
  command -v nvidia-smi > /dev/null && [ -z "${METERED:-}" ] || return 0
  export METERED=1 # so that a step within this one does not note it again
  nvidia-smi -i "$ours" --query-gpu=power.draw --format=csv,noheader,nounits -l 1 >> "$out/power.csv" 2> /dev/null &
  trap "kill $! 2> /dev/null || true" EXIT
}
show() { # what matters of a run's metrics
  "$python" -c "import json,sys
for r in map(json.loads, open(sys.argv[1])):
  if r['step'] % 5 == 0: print({k: r[k] for k in ('step','lm_loss','mtp_loss','tokens_per_s','elapsed_s','memory_bytes')})" \
    "$out/$1/metrics.jsonl"
}
notes() { # small files as one archive beside the weights; the held-out shards too, so that the table can be made elsewhere
  local back=${OUT:-$out/back} f some=()
  mv "$back/side.json.xz" "$out/"
  for f in side.json.xz {heal,again,apart,apart-again,mtp}/{metrics.jsonl,config.toml} {convert,prepare,lessons,answer}.log power.csv \
    converted/config.json teacher-answers.jsonl shards/{chat,text}/val; do [ ! -e "$out/$f" ] || some+=("$f"); done
  for f in "$out"/written/generate-*.json; do [ ! -e "$f" ] || some+=("${f#"$out"/}"); done
  tar -C "$out" -cJf "$back/notes.tar.xz" "${some[@]}"
}

case $step in
  source) # joins the four parts
    [ -f "$source" ] || { for p in a b c d; do xz -dc "$data/source/part-$p.xz"; done > "$source.part" && mv "$source.part" "$source"; } ;;
  text) # one folder out of the two archives; once, because a preparation that was cut short asks whether its input changed
    [ ! -f "$data/text/.joined" ] || exit 0
    for half in a b; do [ ! -f "$data/text-$half.tar.xz" ] || tar -C "$data" -xJf "$data/text-$half.tar.xz"; done
    mkdir -p "$data/text"
    for f in "$data"/text-a/*.jsonl; do cat "$data"/text-?/"$(basename "$f")" > "$data/text/$(basename "$f")"; done
    ls "$data"/text/prose-*.jsonl > /dev/null # an older fetch has no literature: better now than after the writing
    touch "$data/text/.joined" ;;
  generate)
    "$python" runs/bundled/generate.py --gguf "$source" --asks "$data/asks.jsonl.xz" --text "$data/text" --out "$out/written" "$@" ;;
  convert) # as soon as the first conversations are there: they are part of the calibration
    [ ! -f "$out/converted/tokenizer_config.json" ] || exit 0
    for _ in $(seq "${WAIT:-120}"); do [ "$(ls "$out"/written/chat/*.jsonl 2> /dev/null | wc -l)" -ge 1 ] && break; sleep 1; done
    mkdir -p "$out/written/chat"
    "$python" runs/bundled/calibration.py "$data/text" "$out/written/chat" --out "$out/calibration.txt" --characters 200000
    rorqual upcycle "$source" "$out/converted" --text "$out/calibration.txt" --tokens 12288 --mtp --dtype float32 \
      --shared 13 --routed 8 --width 64 --top-k 6 --drop 192 "$@" ;;
  lessons)
    [ -f "$out/lessons.jsonl" ] || "$python" runs/bundled/lessons.py --text "$data/text" --out "$out/lessons.jsonl" "$@" ;;
  prepare)
    prepare text "$data/text" --val-fraction "${VAL:-0.005}"; prose
    prepare lessons "$out/lessons.jsonl" --val-fraction 0.01
    prepare chat "$out/written/chat" --val-fraction 0.01
    prepare written "$out/written/text" --val-fraction 0.01
    [ ! -f "$data/books.txt" ] || prepare books "$data/books.txt" ;;
  heal) train distill runs/bundled/heal.toml "$@" ;;
  again) # the healed weights once more, rounded from the first step on
    from=$(newest heal) # apart, so that a failure ends the step
    train distill runs/bundled/heal.toml --set out="$out/again" --set init_from="$from" --set optim.lr=5e-4 \
      --set quantise.fraction=1.0 --set seed=3 "$@" ;;
  apart) train distill runs/bundled/apart.toml "$@" ;; # from $out/start, one file of the weights alone
  apart-again) # and these once more
    from=$(newest apart)
    train distill runs/bundled/apart.toml --set out="$out/apart-again" --set init_from="$from" --set optim.lr=5e-4 --set seed=5 "$@" ;;
  mtp) from=$(newest apart-again apart again heal); train distill runs/bundled/mtp.toml --set init_from="$from" "$@" ;;
  measure) # after `ready`: what `first` plans by, from some steps of healing on its own data
    "$python" runs/bundled/attention.py choose > "$kept/attention" || rm "$kept/attention"
    echo "--set compile=true" > "$kept/options"; rm -rf "$out/trial"
    $me heal --set out="$out/trial" --set steps=40 --set optim.warmup_steps=4 --set eval_every=99 --set eval_rows=32 \
      --set checkpoint_seconds=9999 --set quantise.fraction=0.5 --set report=false "$@" | tail -n 4
    rates trial; show trial; rm -rf "$out/trial"; say "healing: $(cat "$kept/rate") tokens/s" ;;
  answer)
    [ -f "$out/teacher-answers.jsonl" ] || "$python" runs/bundled/generate.py --gguf "$source" \
      --answer runs/bundled/{held-out,fixed,exam}.jsonl --rows 640 --length 768 --out "$out/teacher-answers.jsonl" "$@" ;;
  ship) # the newest weights as int4
    from=$(newest mtp apart-again apart again heal)
    rm -rf "$out/shipped" "$out/.shipped.converting"
    rorqual convert "$from" "$out/shipped" --to int4 --max-shard-gb 0.014 "$@" ;;
  evaluate)
    from=$(newest mtp apart-again apart again heal)
    sets=(text="$out/shards/text/val" chat="$out/shards/chat/val")
    [ ! -d "$out/shards/books" ] || sets+=(books="$out/shards/books/train")
    before=(); [ ! -d "$out/start" ] || before=(before="$out/start")
    "$python" runs/bundled/evaluate.py --teacher "$source" --model converted="$out/converted" "${before[@]}" healed="$from" \
      shipped="$out/shipped" --shards "${sets[@]}" --run runs/bundled/heal.toml --out "$out/evaluation.json" "$@" ;;
  pack) "$python" runs/bundled/carry.py pack "$out/shipped" "$@" ;; # TARGET
  back) # the newest weights in pieces and the notes, to $OUT
    $me ship | tail -n 1; $me pack "${OUT:-$out/back}"; notes ;;
  ready) # SECONDS: the source, its writing of that time (SEED=N, beyond the GPUs' number: other texts), the conversion, everything tokenised
    metered; $me source; $me text; say "source and text are there"
    ($me lessons > "$out/lessons.log" 2>&1 & lessons=$!
     $me convert > "$out/convert.log" 2>&1; wait $lessons
     prepare text "$data/text" --val-fraction "${VAL:-0.005}"; prose; prepare lessons "$out/lessons.jsonl" --val-fraction 0.01
     [ ! -f "$data/books.txt" ] || prepare books "$data/books.txt") > "$out/prepare.log" 2>&1 & beside=$!
    writers=(); IFS=, read -ra shown <<< "$ours"
    for i in $(seq "$gpus"); do # each GPU writes
      (export CUDA_VISIBLE_DEVICES=${shown[i - 1]}
       exec $me generate --seconds "$1" --seed $((${SEED:-0} + i))) & writers+=($!)
    done
    for writer in "${writers[@]}"; do wait "$writer"; done
    say "written"; wait $beside || { cat "$out"/{lessons,convert,prepare}.log; exit 1; }
    say "converted, text and lessons prepared"
    prepare written "$out/written/text" --val-fraction 0.01 --overwrite & other=$!
    prepare chat "$out/written/chat" --val-fraction 0.01 --overwrite; wait $other; touch "$out/ready" ;;
  first) # SECONDS WRITING [options of heal]: from the source to healed int4 weights in that time; results to $OUT. HEALING=S
    # plans for S seconds of healing instead: what does not fit goes on when `first` is given again.
    total=$1 writing=$2; shift 2
    if [ -f "$out/stand-in" ]; then rm -rf "$out"; mkdir -p "$out"; fi # of a rehearsal that did not end
    metered; [ -f "$out/ready" ] || $me ready "$writing"
    speed=$(figure rate "${RATE:-150000}") left=${HEALING:-$((total - SECONDS - ${RESERVE:-65}))}
    count=$(steps heal "$left" "$speed" 60)
    say "healing: $count steps in $left s at $speed tokens/s"
    limited $((total - SECONDS - 40)) $me heal --set steps="$count" "$@"
    if [ -z "${HEALING:-}" ] || [ -f "$out/heal/model/config.json" ]; then say "healed"; $me back; say "done"
    else say "healing is to go on"; fi ;;
  second) # SECONDS HEALING: healing goes on for HEALING s (0: not), then the MTP module alone; the teacher's answers, the table
    total=$1 healing=$2; shift 2; metered
    $me answer > "$out/answer.log" 2>&1 & answering=$!
    if [ "$healing" -gt 0 ]; then
      count=$(steps again "$healing" "$(figure rate-rounded "${RATE:-150000}")" 60)
      say "healing again: $count steps"; limited $((healing + 40)) $me again --set steps="$count"
    fi
    left=$((total - SECONDS - ${RESERVE:-80}))
    count=$(steps mtp $left "$(figure mtp-rate "${MTP_RATE:-250000}")" 20)
    say "MTP: $count steps in $left s"
    limited $((left + 20)) $me mtp --set steps="$count" "$@"
    say "trained"; wait $answering || cat "$out/answer.log"
    $me back; say "shipped"
    $me evaluate --rows 40 --dtype bfloat16; cp "$out/evaluation.json" "${OUT:-$out/back}/"; say "done" ;;
  rehearse) # every step with a stand-in source and a few updates; leaves out/rate and the like, and the compiler's cache
    if [ -f "$source" ] && [ ! -f "$out/stand-in" ]; then echo "$out holds a run of the real source: move it away" >&2; exit 2; fi
    rm -rf "$out" "$kept"/{rehearsal,rate,rate-rounded,mtp-rate,attention,options}; mkdir -p "$out"; touch "$out/stand-in"
    xz -dkf "$data/source/part-a.xz" "$data/source/part-b.xz"
    "$python" runs/bundled/rehearsal.py "$source" "$data/source/part-a" "$data/source/part-b"
    $me text; say "stand-in"
    $me lessons --count 20000 > "$out/lessons.log" 2>&1 & lessons=$!
    (time $me convert --tokens 2048 --length 256) > "$out/convert.log" 2>&1 & beside=$!
    $me generate --waves 2
    wait $lessons; wait $beside || { cat "$out/convert.log"; exit 1; }
    say "written, converted"; tail -n 9 "$out/convert.log"
    mkdir -p "$out/some"; cp "$data"/text/python-django-doc.jsonl "$out/some/"
    # The stand-in hardly ever ends a turn, so the lessons serve as its conversations.
    (time prepare text "$out/some" --val-fraction 0.05); prose; prepare written "$out/some" --val-fraction 0.05
    prepare chat "$out/lessons.jsonl" --val-fraction 0.05; prepare lessons "$out/lessons.jsonl" --val-fraction 0.05
    "$python" runs/bundled/attention.py choose > "$kept/attention" || rm "$kept/attention"
    say "prepared; attention: $(figure attention default)"
    few=(--set steps=40 --set optim.warmup_steps=4 --set eval_every=40 --set eval_rows=32 --set checkpoint_seconds=9999
      --set quantise.fraction=0.5 --set report=false)
    limited 150 $me heal "${few[@]}"
    rates heal; say "healed at $(cat "$kept/rate") tokens/s, $(cat "$kept/rate-rounded") while rounded"; show heal
    limited 120 $me heal "${few[@]}" --set out="$out/compiled" --set compile=true
    quick=0; [ ! -f "$out/compiled/model/config.json" ] || quick=$(rate "$out/compiled/metrics.jsonl" 0.35)
    say "compiled: $quick tokens/s"
    if [ "$quick" -gt "$(($(cat "$kept/rate") * 105 / 100))" ]; then
      show compiled; rates compiled; echo "--set compile=true" > "$kept/options"
    fi
    limited 100 $me mtp --set steps=20 --set eval_every=20 --set eval_rows=32 --set report=false
    rate "$out/mtp/metrics.jsonl" 1 > "$kept/mtp-rate"; say "MTP at $(cat "$kept/mtp-rate") tokens/s"; show mtp
    $me answer; say "answered"
    OUT="$out/back" $me back; ls -l "$out/back"; say "shipped"
    $me evaluate --rows 2 --dtype bfloat16; say "evaluated"
    mv "$out" "$kept/rehearsal" ;;
  *) echo "unknown step $step; see runs/bundled/README.md" >&2; exit 2 ;;
esac
