# `make demo` and `make test` work on a fresh clone: they set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/digits

.PHONY: setup demo test lint bench clean
.DEFAULT_GOAL := help

help:
	@echo "make setup   a virtual environment in .venv with everything"
	@echo "make demo    train on handwritten digits, sample, measure, write a report (about 5 minutes)"
	@echo "make test    every test"
	@echo "make lint    style and types"
	@echo "make bench   the figures of the documentation, measured again (benchmarks/)"

setup: .venv/ready

# torch first and pinned: an unpinned one would bring gigabytes of CUDA along
.venv/ready: pyproject.toml constraints.txt
	@echo "setting up .venv ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,tensorboard,diffusers]"
	@touch $@

demo: setup
	$(BIN)/kuosan train digits --out $(DEMO)
	$(BIN)/kuosan sample $(DEMO) --count 100
	$(BIN)/kuosan evaluate $(DEMO)
	$(BIN)/kuosan report $(DEMO)

test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/recipe.py
	$(BIN)/python benchmarks/start_up.py
	$(BIN)/python benchmarks/attention.py

clean:
	rm -rf .venv runs .cache build dist
