PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo test lint bench test-gpu bench-gpu
.DEFAULT_GOAL := help

help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## Create .venv and install everything into it

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $(STAMP)

demo: setup ## Find, evaluate and draw a circuit in a real small model (under 90 s)
	$(BIN)/fastcircuit demo

lint: setup ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint ## Style, types and all tests
	$(BIN)/python -m pytest

bench: setup ## Kernels and training step against the baselines (about 5 minutes)
	$(BIN)/python -m pytest bench -q --benchmark-disable-gc --benchmark-columns=median,iqr,rounds

CUDA_CHECK := import sys, torch; torch.cuda.is_available() or sys.exit("no CUDA device here: these need one")

test-gpu: setup ## Tests that need a CUDA device
	@$(BIN)/python -c '$(CUDA_CHECK)'
	$(BIN)/python -m pytest -m gpu

bench-gpu: setup ## Benchmarks on a CUDA device
	@$(BIN)/python -c '$(CUDA_CHECK)'
	$(BIN)/python -m pytest bench -q -m gpu
