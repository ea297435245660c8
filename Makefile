# `make demo` and `make test` work on a fresh machine: they create .venv and install what they need first.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
EXTRAS ?= dev

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built
CUDA := import sys, torch; sys.exit(None if torch.cuda.is_available() else "no CUDA device here: nothing was run")

.PHONY: help setup demo test lint bench test-gpu bench-gpu

help:  ## say what each target does
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(BUILT)  ## create .venv and install the package, editable, with its development tools

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml $(wildcard $(CONSTRAINTS)) | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS:%=-c %) -e ".[$(EXTRAS)]"
	@touch $@

# The compiled kernels again when only they changed: seconds, and no network.
$(BUILT): setup.py $(wildcard csrc/*) $(INSTALLED)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

demo: setup  ## find, evaluate and draw a circuit in a shipped model
	$(BIN)/fastcircuit demo

lint: setup  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## style, types and tests
	$(BIN)/python -m pytest -q

bench: setup  ## benchmarks
	$(BIN)/python -m pytest -q bench

test-gpu: setup  ## the tests that need a CUDA device
	@$(BIN)/python -c '$(CUDA)'
	$(BIN)/python -m pytest -q -m gpu

bench-gpu: setup  ## the benchmarks that need a CUDA device
	@$(BIN)/python -c '$(CUDA)'
	$(BIN)/python -m pytest -q -m gpu bench
