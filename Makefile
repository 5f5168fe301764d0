# The two commands that matter: `make demo` and `make test`. Each sets itself up in $(VENV).
#
#   make demo                       compress a model on synthetic speech, about 5 minutes of work
#   make test                       lint, types and tests; what CI runs
#   make docs                       the documentation, in build/site; a warning is an error
#   make slow                       the tests that take minutes
#   make test-browser               the report and the server's page in Chromium, which must be installed (or
#                                   named: CHROMIUM=...)
#   make test-triton                the kernels for GPUs, in Triton's interpreter where there is none
#   make wheel                      the wheel in dist/, tried in an empty environment without a network
#   make bench                      what compression adds to a training step, what the native kernels save
#   make limits                     what this machine can compute and read at most; needs CMake
#   make sanitize                   the native library under AddressSanitizer and UBSan; needs CMake.
#                                   SANITIZED=600 for ten minutes instead of one
#   make fuzz                       damaged models, and all that the native library is called with, for ten
#                                   minutes each; needs CMake. FUZZED=60 for a minute
#   make test PYTHON=python3.12     with another Python (3.10 to 3.13)
#   make test VENV=/tmp/env         in another virtual environment
#   make test PIP_FLAGS="..."       with extra flags for pip (an index of CPU builds, a cache, ...)

PYTHON    ?= python3
VENV      ?= .venv
PIP_FLAGS ?=
OUT       ?= usmlite-demo
CMAKE     ?= cmake
SANITIZED ?= 60
FUZZED    ?= 600

BIN := $(VENV)/bin
# What a package is built with is pinned as well; older and newer pip read different variables for it.
PINNED := PIP_CONSTRAINT="$(CURDIR)/constraints.txt" PIP_BUILD_CONSTRAINT="$(CURDIR)/constraints.txt"
PIP := $(PINNED) $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)

.DEFAULT_GOAL := help
.PHONY: help demo test lint types unit docs slow test-browser test-triton wheel bench limits sanitize fuzz format clean distclean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/.demo
	$(BIN)/usmlite demo --out $(OUT)

test: lint types docs unit

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.dev
	$(BIN)/mypy

unit: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow and not browser"

# Sphinx needs Python 3.11. Made from nothing each time: pages that did not change would not warn again.
docs: $(VENV)/.dev
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	  $(BIN)/python -m sphinx -qEW --keep-going -c docs -d build/doctrees . build/site && \
	  echo "Documentation: build/site/index.html"; \
	else echo "The documentation is built with Python 3.11 or later: skipped"; fi

slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

test-browser: $(VENV)/.browser
	$(BIN)/python -m pytest -m browser

test-triton: $(VENV)/.triton
	$(BIN)/python -m pytest tests/kernels/test_cuda.py

# As the builders of releases do ([tool.cibuildwheel] in pyproject.toml), for this machine alone.
wheel: $(VENV)/.torch
	rm -rf dist build/try
	$(PIP) build
	$(PINNED) $(BIN)/python -m build --sdist
	$(PINNED) $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist \
	  --config-settings=cmake.define.USMLITE_REQUIRE_NATIVE=ON dist/usmlite-*.tar.gz
	$(PYTHON) -m venv build/try
	build/try/bin/python -m pip install --quiet -c constraints.txt $(PIP_FLAGS) torch==2.13.0
	build/try/bin/python -m pip install --quiet -c constraints.txt $(PIP_FLAGS) dist/usmlite-*.whl
	cd build/try && HF_HUB_OFFLINE=1 bin/usmlite transcribe ../../tests/speech/0.opus

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/step_cost.py
	$(BIN)/python benchmarks/native.py

limits:
	$(CMAKE) -S . -B build/limits -DUSMLITE_LIMITS=ON
	$(CMAKE) --build build/limits --parallel
	build/limits/usmlite_limits 1
	build/limits/usmlite_limits 2

sanitize:
	$(CMAKE) -S . -B build/sanitize -DUSMLITE_SANITIZE=ON
	$(CMAKE) --build build/sanitize --parallel
	build/sanitize/usmlite_driver $(SANITIZED)

fuzz: $(VENV)/.dev
	$(MAKE) sanitize SANITIZED=$(FUZZED)
	PYTHONPATH=tests TRANSFORMERS_VERBOSITY=error $(BIN)/python tests/fuzz.py --seconds $(FUZZED)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# What the native library is made of: changed, it is built again.
NATIVE := CMakeLists.txt $(wildcard csrc/*)

# torch goes first: with it in place, nothing that follows can choose another build of it.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else \
	  "usmlite needs Python 3.10 to 3.13, found %d.%d: try make PYTHON=python3.12" % v)'
	@echo "Setting up $(VENV) (once; the downloads take a few minutes)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml $(NATIVE)
	$(PIP) -e ".[demo]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml $(NATIVE)
	$(PIP) -e ".[dev,demo,docs,weights]"
	@touch $@

$(VENV)/.browser: $(VENV)/.dev
	$(PIP) -e ".[browser]"
	@touch $@

# PyTorch's builds for CUDA have it; the one for CPUs has not.
$(VENV)/.triton: $(VENV)/.dev
	$(PIP) triton
	@touch $@

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis usmlite-demo
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf $(VENV)
