# Two commands set everything up on a machine with Python 3.11+ and make:
#   make demo    environment, then a demonstration with a report
#   make test    environment, then the whole test suite
# Variables:
#   PYTHON=python3.12   the interpreter that creates the environment
#   TORCH='torch==...'  what is installed as PyTorch, with any options of pip (another build, another index)
#   VENV=.venv          where the environment is
#   WORKERS=2           processes of the test suite, one thread each
#   ARGS='-k npo'       passed on to the command behind the target

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
WORKERS ?= 2
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help env demo test check lint fix docs docs-generate bench clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do printf '  make %-14s %s\n' "$$name" "$$text"; done

demo: $(VENV)/.installed ## set up, then train, unlearn, audit and report on generated people (minutes, two CPU cores)
	$(BIN)/expunge demo $(ARGS)

test: $(VENV)/.installed ## set up, then run the whole test suite
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

check: $(VENV)/.installed ## linter, formatter, types, import floors, freshness of the generated documentation
	$(BIN)/python scripts/check_files.py
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(ONE_THREAD) $(BIN)/python scripts/generate_docs.py --check

lint: check ## the same as check

fix: $(VENV)/.installed ## repair what the linter and the formatter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs-generate: $(VENV)/.installed ## rewrite the generated pages of the documentation
	$(BIN)/python scripts/generate_docs.py

docs: $(VENV)/.docs docs-generate ## build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

bench: $(VENV)/.installed ## measure speed and memory against textbook implementations, print the ratios
	@found=0; for file in benchmarks/*.py; do \
	  [ -f "$$file" ] || continue; found=1; echo "== $$file"; $(BIN)/python "$$file" $(ARGS); \
	done; [ "$$found" = 1 ] || { echo "There are no benchmarks/*.py."; exit 1; }

clean: ## remove the environment, caches and everything built (runs and reports stay)
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis src/*.egg-info
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

env: $(VENV)/.installed ## create or update the environment only

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: '$(PYTHON)' was not found. Install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: Expunge needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name another one: make PYTHON=python3.11 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "make: '$(PYTHON)' cannot create environments. Install its venv package (Debian: apt install python3-venv) or name another Python: make PYTHON=... ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# PyTorch comes first and by itself: which build is right depends on the machine, and nothing that follows may replace it.
$(VENV)/.torch: | $(BIN)/python
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(PIP) install -c $(VENV)/constraints.txt $(TORCH)
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/.torch
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(PIP) install -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.docs: pyproject.toml constraints.txt $(VENV)/.installed
	$(PIP) install -c $(VENV)/constraints.txt -e '.[docs]'
	@touch $@
