# Everything runs in .venv, which is made on first use and again when what it is made from changes; test-oldest in
# .venv-oldest.
# PYTHON: an interpreter, 3.11 or newer. ARGS: arguments for train and test.

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
OLDEST := .venv-oldest/bin

# What test-oldest runs: the tests of what depends on torch's and Triton's versions and runs on a GPU.
OLDEST_TESTS := tests/kernels tests/test_losses.py $(patsubst %,tests/%.py, \
  $(addprefix models/test_,compiling compiled_gradients decoder decoder_layout frozen_layers policy lora recomputing) \
  $(addprefix methods/test_,half_precision out_of_memory nabla_db) \
  distributed/test_sharding objective/test_balance bench/test_whole_step training/test_guards rewards/test_models \
  $(addprefix trajectories/test_,buffer buffer_ops buffer_pinned extension))
SIDE_BY_SIDE := --numprocesses logical --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help train test test-oldest bench lint sanitize clean

help: ## say what the targets do
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

train: .venv/stamp ## finetune; without ARGS the embedded testbed, for others see ARGS=--help
	$(BIN)/python -m fastnabla.train $(ARGS)

test: .venv/stamp ## run the tests, a file to a process
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(ARGS)

test-oldest: .venv-oldest/stamp ## run the tests of what a GPU runs with the oldest torch and Triton that are supported
	FASTNABLA_EXTENSION=build/oldest/fastnabla/_C.so $(OLDEST)/python -m pytest $(SIDE_BY_SIDE) $(OLDEST_TESTS) $(ARGS)

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
	  $(BIN)/python -m pytest tests/trajectories/test_buffer*.py tests/trajectories/test_replay.py tests/trajectories/test_extension.py $(ARGS)

clean: ## remove the environment and all caches; runs stay
	rm -rf .venv .venv-oldest build dist fastnabla/_C.so *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python $(OLDEST)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "fastnabla needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	    "Name another: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(@:/bin/python=) || { \
	  rm -rf $(@:/bin/python=); echo "$(PYTHON) cannot make an environment; Debian and Ubuntu have it in python3-venv." >&2; exit 1; }

SOURCES := pyproject.toml setup.py $(wildcard csrc/*.c* csrc/*.h)

# torch comes first: the extension is built against it, by the setuptools beside it.
.venv/stamp: constraints.txt $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --constraint constraints.txt torch numpy setuptools
	$(BIN)/python -m pip install --constraint constraints.txt --no-build-isolation --editable '.[test]'
	@$(BIN)/python -c 'from fastnabla.trajectories.buffer_ops import WHY_NOT; print(WHY_NOT or "the extension is built for CPU and CUDA")'
	@touch $@

# In an isolated build, which has no torch, pip leaves out the extension; it is built aside: .venv keeps its own.
.venv-oldest/stamp: constraints-oldest.txt constraints.txt $(SOURCES) | $(OLDEST)/python
	awk -F== 'NR == FNR { oldest[$$1] } NR == FNR || !($$1 in oldest)' $(wordlist 1,2,$^) > $(@D)/constraints.txt
	$(OLDEST)/python -m pip install --constraint $(@D)/constraints.txt --editable '.[test]' setuptools
	$(OLDEST)/python setup.py build_ext --build-lib build/oldest --build-temp build/oldest
	@touch $@
