# Everything runs in .venv, which is made on first use and again when what it is made from changes.
# PYTHON: an interpreter, 3.11 or newer. ARGS: arguments for train and test.

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help train test bench lint sanitize clean

help: ## say what the targets do
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

train: .venv/stamp ## finetune; without ARGS the embedded testbed, for others see ARGS=--help
	$(BIN)/python -m fastnabla.train $(ARGS)

test: .venv/stamp ## run the tests, a file to a process
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile $(ARGS)

bench: .venv/stamp ## run the benchmarks
	$(BIN)/python -m pytest bench --benchmark-only $(ARGS)

lint: .venv/stamp ## check style
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# Built aside: .venv keeps the ordinary extension. The sanitizers must come before Python, and C++'s library with them,
# whose exceptions they watch. Python itself leaks by design, and is not what is looked at.
sanitize: .venv/stamp ## run the buffer's tests with its C++ under the address and undefined behaviour sanitizers
	mkdir -p build
	$(CXX) -std=c++17 -O1 -g -Wall -Wextra -fsanitize=address,undefined -fno-sanitize-recover=all \
	  csrc/check/headers.cpp -o build/headers && build/headers
	FASTNABLA_SANITIZE=1 $(BIN)/python setup.py build_ext --build-lib build/sanitize --build-temp build/sanitize
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 FASTNABLA_EXTENSION=build/sanitize/fastnabla/_C.so \
	  $(BIN)/python -m pytest tests/test_buffer*.py tests/test_replay.py tests/test_extension.py $(ARGS)

clean: ## remove the environment and all caches; runs stay
	rm -rf .venv build dist fastnabla/_C.so *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "fastnabla needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	    "Name another: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv || { \
	  rm -rf .venv; echo "$(PYTHON) cannot make an environment; Debian and Ubuntu have it in python3-venv." >&2; exit 1; }

# torch comes first: the extension is built against it, by the setuptools beside it.
.venv/stamp: pyproject.toml setup.py constraints.txt $(wildcard csrc/*.c* csrc/*.h) | $(BIN)/python
	$(BIN)/python -m pip install --constraint constraints.txt torch numpy setuptools
	$(BIN)/python -m pip install --constraint constraints.txt --no-build-isolation --editable '.[test]'
	@$(BIN)/python -c 'from fastnabla.buffer_ops import WHY_NOT; print(WHY_NOT or "the extension is built for CPU and CUDA")'
	@touch $@
