# Everything runs in .venv, which is created on first use and updated when its requirements or the C++ sources change.
# test-oldest uses .venv-oldest.
# PYTHON: an interpreter, 3.11 or newer. ARGS: extra arguments of train, test, test-oldest, bench and sanitize.

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
OLDEST := .venv-oldest/bin

# The tests of test-oldest: code that depends on the versions of torch and Triton and runs on a GPU.
OLDEST_TESTS := tests/kernels tests/test_losses.py tests/test_table_of.py $(patsubst %,tests/%.py, \
  $(addprefix models/test_,compiling compiled_gradients decoder decoder_layout frozen_layers policy lora quantised_linear recomputing) \
  $(addprefix methods/test_,half_precision out_of_memory nabla_db) \
  distributed/test_sharding objective/test_balance objective/test_reference_target training/test_guards rewards/test_models \
  $(addprefix trajectories/test_,buffer buffer_ops buffer_pinned extension))
SIDE_BY_SIDE := --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# A worker that dies ends the tests: xdist would start another one, which repeats the test, or waits for ever. A test that takes
# 20 minutes, ten times the longest, ends its worker with a traceback. It does so from a thread: SIGALRM and faulthandler's timer are
# fastnabla's own, and the latter's thread is missed in a fork.
SIDE_BY_SIDE += --max-worker-restart 0 --timeout 1200 --timeout-method thread

.DEFAULT_GOAL := help
.PHONY: help train test test-oldest bench lint sanitize clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

train: .venv/stamp ## finetune the embedded testbed, or what ARGS says (ARGS=--help lists the options)
	$(BIN)/python -m fastnabla.train $(ARGS)

test: .venv/stamp ## run the tests in parallel, by file
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(ARGS)

test-oldest: .venv-oldest/stamp ## run the tests of GPU code with the oldest supported torch and Triton
	FASTNABLA_EXTENSION=build/oldest/fastnabla/_C.so $(OLDEST)/python -m pytest $(SIDE_BY_SIDE) $(OLDEST_TESTS) $(ARGS)

bench: .venv/stamp ## run the benchmarks
	$(BIN)/python -m pytest bench --benchmark-only $(ARGS)

lint: .venv/stamp ## check style with ruff
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# The sanitized extension is built in build/, so .venv keeps the ordinary one. LD_PRELOAD loads the sanitizers before Python,
# together with libstdc++, whose exceptions they intercept. Leaks are not reported, because Python leaks by design.
sanitize: .venv/stamp ## run the buffer's tests with the address and undefined behaviour sanitizers
	mkdir -p build
	$(CXX) -std=c++17 -O1 -g -Wall -Wextra -fsanitize=address,undefined -fno-sanitize-recover=all \
	  csrc/check/headers.cpp -o build/headers && build/headers
	FASTNABLA_SANITIZE=1 $(BIN)/python setup.py build_ext --build-lib build/sanitize --build-temp build/sanitize
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 FASTNABLA_EXTENSION=build/sanitize/fastnabla/_C.so \
	  $(BIN)/python -m pytest tests/trajectories/test_buffer*.py tests/trajectories/test_replay.py tests/trajectories/test_extension.py $(ARGS)

clean: ## remove the environments, builds and caches; runs are kept
	rm -rf .venv .venv-oldest build dist fastnabla/_C.so *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python $(OLDEST)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "fastnabla needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	    "Choose another one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(@:/bin/python=) || { \
	  rm -rf $(@:/bin/python=); echo "$(PYTHON) cannot create a virtual environment; on Debian and Ubuntu, install python3-venv." >&2; exit 1; }

SOURCES := pyproject.toml setup.py $(wildcard csrc/*.c* csrc/*.h)

# torch and setuptools come first, because the extension is built with them.
.venv/stamp: constraints.txt $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --constraint constraints.txt torch numpy setuptools
	$(BIN)/python -m pip install --constraint constraints.txt --no-build-isolation --editable '.[test]'
	@$(BIN)/python -c 'from fastnabla.trajectories.buffer_ops import WHY_NOT; print(WHY_NOT or "the extension is built for CPU and CUDA")'
	@touch $@

# An isolated build has no torch, so pip does not build the extension. It is then built in build/, so .venv keeps its own.
.venv-oldest/stamp: constraints-oldest.txt constraints.txt $(SOURCES) | $(OLDEST)/python
	awk -F== 'NR == FNR { oldest[$$1] } NR == FNR || !($$1 in oldest)' $(wordlist 1,2,$^) > $(@D)/constraints.txt
	$(OLDEST)/python -m pip install --no-compile --constraint $(@D)/constraints.txt --editable '.[test]' setuptools
	$(OLDEST)/python setup.py build_ext --build-lib build/oldest --build-temp build/oldest
	@touch $@
