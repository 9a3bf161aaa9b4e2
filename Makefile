# `make demo` and `make test` work on a fresh clone: they set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
PEERS := .venv-bench/bin
DEMO := runs/digits

.PHONY: setup demo test lint bench bench-peers clean
.DEFAULT_GOAL := help

help:
	@echo "make setup   a virtual environment in .venv with everything"
	@echo "make demo    train on handwritten digits, sample, measure, write a report (about 5 minutes)"
	@echo "make test    every test"
	@echo "make lint    style and types"
	@echo "make bench   the figures of the documentation, measured again (benchmarks/)"
	@echo "make bench-peers   the same samplers in other libraries, side by side (more than an hour)"

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

# k-diffusion without its dependencies: all but torchsde are for training on images, and sampling needs none of them
.venv-bench/ready: pyproject.toml constraints.txt
	@echo "setting up .venv-bench ..."
	@$(PYTHON) -m venv .venv-bench
	@$(PEERS)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@$(PEERS)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[bench]"
	@$(PEERS)/pip install --quiet --disable-pip-version-check --no-deps k-diffusion==0.1.1.post1
	@touch $@

bench-peers: .venv-bench/ready
	OMP_NUM_THREADS=1 $(PEERS)/python benchmarks/accuracy.py
	$(PEERS)/python benchmarks/cost.py

clean:
	rm -rf .venv .venv-bench runs .cache build dist
