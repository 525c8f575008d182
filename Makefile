# Everything runs in .venv, which is made on first use and again when what it is made from changes.
# PYTHON: an interpreter, 3.11 or newer. ARGS: arguments for train and test.

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help train test bench lint clean

help: ## say what the targets do
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

train: .venv/stamp ## finetune; without ARGS the embedded testbed, for others see ARGS=--help
	$(BIN)/python -m fastnabla.train $(ARGS)

test: .venv/stamp ## run the tests
	$(BIN)/python -m pytest $(ARGS)

bench: .venv/stamp ## run the benchmarks
	$(BIN)/python -m pytest bench --benchmark-only $(ARGS)

lint: .venv/stamp ## check style
	$(BIN)/ruff check
	$(BIN)/ruff format --check

clean: ## remove the environment and all caches; runs stay
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "fastnabla needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	    "Name another: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv || { \
	  rm -rf .venv; echo "$(PYTHON) cannot make an environment; Debian and Ubuntu have it in python3-venv." >&2; exit 1; }

.venv/stamp: pyproject.toml setup.py constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[test]'
	@touch $@
