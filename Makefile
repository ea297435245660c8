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

.PHONY: help setup demo test lint bench sweep bench-check bench-record bench-plot test-gpu bench-gpu

help:  ## say what each target does
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 16

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

# The compiled kernels again when only they changed since they were installed: seconds, and no network.
$(BUILT): setup.py $(wildcard csrc/*) $(TOOLS)
	@if [ -n "$$(find setup.py csrc -newer $(TOOLS))" ]; then $(BIN)/python setup.py --quiet build_ext --inplace; fi
	@touch $@

demo: $(if $(wildcard $(TOOLS)),setup,$(PACKAGE))  ## find, evaluate and draw a circuit in a shipped model
	$(BIN)/fastcircuit demo

lint: setup  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## style, types and tests
	$(BIN)/python -m pytest -q -n auto --dist worksteal

bench: setup  ## benchmarks, quick: every suite in about a minute; rows in runs/bench
	$(BIN)/fastcircuit bench --quick

bench-check: setup  ## ratios against the committed floors; fails when one surely dropped by more than 20 %
	$(BIN)/fastcircuit bench check

bench-record: setup  ## benchmarks in full, rows appended to bench/results (commit first; a quiet machine)
	$(BIN)/fastcircuit bench --results bench/results

bench-plot: setup  ## draw the rows of bench/results: the pictures of the README
	$(BIN)/fastcircuit bench plot --results bench/results --out bench/pictures

# Every method on both shipped models with three seeds; what is finished is not run again.
SWEEPS := bench/results/sweeps
SWEEP_SEEDS ?= 0,1,2
SWEEP_WORKERS ?= 2
sweep: setup  ## compare all methods on the shipped models: tables and plots in bench/results/sweeps
	$(BIN)/fastcircuit sweep stories260K --task pronoun --train-size 150 --test-size 150 --steps 400 --batch-size 8 \
	  --sparsities 0.9,0.95,0.97,0.98 --thresholds 0.001,0.003,0.01,0.03 --seeds $(SWEEP_SEEDS) \
	  --workers $(SWEEP_WORKERS) --out $(SWEEPS)/pronoun
	$(BIN)/fastcircuit sweep induction-gpt2 --task induction --train-size 150 --test-size 150 --steps 400 --batch-size 8 \
	  --sparsities 0.5,0.65,0.75,0.85 --thresholds 0.003,0.01,0.03,0.1,0.3 --seeds $(SWEEP_SEEDS) \
	  --truth bench/cases/induction_circuit.json --workers $(SWEEP_WORKERS) --out $(SWEEPS)/induction

test-gpu: setup  ## the tests that need a CUDA device
	@$(BIN)/python -c '$(CUDA)'
	$(BIN)/python -m pytest -q -m gpu -n 6 tests/test_gpu.py

bench-gpu: setup  ## the benchmarks that need a CUDA device, rows appended to bench/results (commit first)
	@$(BIN)/python -c '$(CUDA)'
	$(BIN)/python -m pytest -q -m gpu bench --record
	$(BIN)/fastcircuit bench --device cuda --quick --results bench/results
