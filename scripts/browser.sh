#!/usr/bin/env bash
# Makes sure that there is a Chromium for the browser tests.
set -euo pipefail
for name in chromium chromium-browser google-chrome; do command -v $name >/dev/null && exit 0; done
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  echo "installing chromium for the browser tests" >&2
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null
else
  echo "the browser tests need chromium: install it (Debian: apt-get install chromium) and run make test again" >&2
  exit 1
fi
