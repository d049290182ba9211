#!/usr/bin/env bash
# Makes .venv with everything rorqual needs, or leaves it alone if it is up to date.  usage: setup.sh serve|dev
# torch first and by itself: its build depends on the machine, and any other package would pull the default one.
set -euo pipefail
cd "$(dirname "$0")/.."
want=${1:-dev}
python=${PYTHON:-python3}
venv=.venv
stamp=$venv/.ready-$want
say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "rorqual needs Python 3.11 or newer; $("$python" --version) is $(command -v "$python"). Set PYTHON=…" >&2; exit 1; }
fresh() { [ -f "$1" ] && [ "$1" -nt pyproject.toml ] && [ "$1" -nt constraints.txt ]; }
if fresh "$stamp" || fresh $venv/.ready-dev; then exit 0; fi  # what serves is part of what develops

has_torch() { "$1" -c 'import re, torch; v = re.match(r"(\d+)\.(\d+)", torch.__version__); assert tuple(map(int, v.groups())) >= (2, 11)' 2>/dev/null; }

if [ ! -x $venv/bin/python ]; then
  say "creating $venv"
  # An installed torch is gigabytes that need not be fetched again.
  if has_torch "$python"; then "$python" -m venv --system-site-packages $venv; else "$python" -m venv $venv; fi
fi
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-warn-script-location)
if ! has_torch $venv/bin/python; then
  say "installing torch"
  if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
    # Without a GPU the CPU build is a tenth of the size. Where its index cannot be reached, whatever pip finds serves.
    "${pip[@]}" --retries 0 --timeout 10 --index-url https://download.pytorch.org/whl/cpu torch==2.13.0 2>/dev/null \
      || "${pip[@]}" torch==2.13.0
  else
    "${pip[@]}" 'torch>=2.11'
  fi
fi
extras=serve,search; [ "$want" = dev ] && extras=serve,search,train,data,teacher,dev
say "installing rorqual[$extras]"
"${pip[@]}" -c constraints.txt -e ".[$extras]"
"$venv/bin/python" -m rorqual.ops.native >&2  # compiled now, so that the first start does not wait for it
touch "$stamp"
