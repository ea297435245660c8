# `make demo` and `make test` work on a fresh machine: they create .venv and install what they need first.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
EXTRAS ?= dev

BIN := $(VENV)/bin
PACKAGE := $(VENV)/.package
TOOLS := $(VENV)/.tools
BUILT := $(VENV)/.built
# Compiling every module of torch and transformers takes longer than importing those that are used.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile $(CONSTRAINTS:%=-c %)
CUDA := import sys, torch; sys.exit(None if torch.cuda.is_available() else "no CUDA device here: nothing was run")

.PHONY: help setup demo test lint bench test-gpu bench-gpu

help:  ## say what each target does
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(BUILT)  ## create .venv and install the package, editable, with its development tools

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# What the demo needs: the package alone, which builds its kernels.
$(PACKAGE): pyproject.toml setup.py $(wildcard csrc/*) $(wildcard $(CONSTRAINTS)) | $(BIN)/python
	$(INSTALL) -e .
	@touch $@

$(TOOLS): pyproject.toml $(wildcard $(CONSTRAINTS)) | $(BIN)/python
	$(INSTALL) -e ".[$(EXTRAS)]"
	@touch $@

# The compiled kernels again when only they changed: seconds, and no network.
$(BUILT): setup.py $(wildcard csrc/*) $(TOOLS)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

demo: $(if $(wildcard $(TOOLS)),setup,$(PACKAGE))  ## find, evaluate and draw a circuit in a shipped model
	$(BIN)/fastcircuit demo

lint: setup  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## style, types and tests
	$(BIN)/python -m pytest -q -n auto

bench: setup  ## benchmarks
	$(BIN)/python -m pytest -q bench

test-gpu: setup  ## the tests that need a CUDA device
	@$(BIN)/python -c '$(CUDA)'
	$(BIN)/python -m pytest -q -m gpu

bench-gpu: setup  ## the benchmarks that need a CUDA device
	@$(BIN)/python -c '$(CUDA)'
	$(BIN)/python -m pytest -q -m gpu bench
