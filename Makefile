# Everything a newcomer needs. Each target sets up what it needs by itself: a new machine has Python >= 3.11 and no more.
#   make serve      chat and API with the bundled model on http://127.0.0.1:8000   (ARGS="--port 9000" passes options)
#   make test       everything that runs without a GPU; what CI runs
#   make check      lint, types, import directions, generated docs up to date
#   make speedrun   train a tiny model from text to chat on two cores in under ten minutes, with a report
#   make bench      the CPU benchmark table, pairwise against installed peers
#   make interop    builds llama.cpp and compares our exports with it and with transformers
#   make clients    installs the API's clients, each by itself, and runs their guides' snippets
#   make soak       the long tests: kills, load, fuzzing
#   make pictures   the chat's screenshots in docs/, and what the page measures (benchmarks/page.json)
.PHONY: serve test check setup setup-dev page docs speedrun bench clients soak parity interop pictures clean
SHELL := /bin/bash
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -q

serve: setup page
	$(BIN)/rorqual serve $(ARGS)

test: check page
	$(PYTEST) -n 2 tests/unit $(ARGS)
	$(PYTEST) -n 2 tests/net $(ARGS)
	$(BIN)/python scripts/clients.py --quick
	./scripts/page.sh test
	./scripts/browser.sh
	$(PYTEST) -n 2 tests/web $(ARGS)

check: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --config pyproject.toml
	$(BIN)/python scripts/docs.py --check

setup:
	./scripts/setup.sh serve

setup-dev:
	./scripts/setup.sh dev

PAGE := rorqual/serve/page/index.html
page: $(PAGE)
$(PAGE): $(shell find web -type f -not -path '*/node_modules/*' 2>/dev/null) | setup
	./scripts/page.sh build
	@touch $@

docs: setup-dev
	$(BIN)/python scripts/docs.py

speedrun: setup-dev
	$(BIN)/python runs/tiny-cpu/speedrun.py $(ARGS)

bench: setup-dev
	for dtype in float32 int8; do $(BIN)/rorqual bench prefill --dtype $$dtype --json benchmarks/cpu-prefill-$$dtype.json; done
	for dtype in float32 bfloat16 int8; do \
	  $(BIN)/rorqual bench decode --dtype $$dtype --json benchmarks/cpu-decode-512-$$dtype.json; \
	  for prompt in 16 3072; do \
	    $(BIN)/rorqual bench decode --dtype $$dtype --prompt $$prompt --json benchmarks/cpu-decode-$$prompt-$$dtype.json; done; \
	  $(BIN)/rorqual bench decode --dtype $$dtype --prompt 64 --batch 8 --json benchmarks/cpu-decode-batch8-$$dtype.json; done
	$(BIN)/rorqual bench serve --dtype int8 --json benchmarks/cpu-serve-int8.json
	$(BIN)/rorqual bench ready --json benchmarks/cpu-ready.json
	$(BIN)/rorqual bench mtp --dtype auto --json benchmarks/cpu-mtp.json
	$(BIN)/rorqual bench train --model bench-cpu --batch 8 --seq-len 512 --rounds 3 --json benchmarks/cpu-train.json
	$(BIN)/rorqual bench http --json benchmarks/http.json
	for dtype in float32 bfloat16 int8; do \
	  $(BIN)/rorqual bench grammar --dtype $$dtype --rounds 15 --json benchmarks/grammar-$$dtype.json; done
	$(BIN)/rorqual bench load --model bench-gpu --json benchmarks/load.json
	$(BIN)/python scripts/benchmarks.py

parity: setup-dev
	$(BIN)/python -m tests.parity --json benchmarks/parity.json
	$(BIN)/python scripts/benchmarks.py

interop: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python scripts/interop.py $(ARGS)
	$(BIN)/python scripts/benchmarks.py

clients: setup-dev
	$(BIN)/python scripts/clients.py $(ARGS)

soak: setup-dev page
	$(BIN)/python scripts/soak_server.py
	$(BIN)/python scripts/soak.py $(ARGS)

pictures: setup-dev page
	./scripts/browser.sh
	$(BIN)/python scripts/screenshots.py
	$(BIN)/python scripts/page_bench.py --json benchmarks/page.json
	$(BIN)/python scripts/benchmarks.py

clean:
	rm -rf .venv web/node_modules rorqual/serve/page out
