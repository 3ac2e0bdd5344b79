# make demo: a Llama, split over processes by a plan, beside the unsplit one
# make test: every test, from a fresh clone
PYTHON ?= python3
TENSOR ?= 2
DATA ?= 1
PIPE ?= 1
BIN := .venv/bin
STAMP := .venv/installed
# a thread a process: what a laptop has for several of them
QUIET := OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error

.PHONY: demo test lint

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip setuptools
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,dev]' --config-settings editable_mode=strict
	touch $(STAMP)

demo: $(STAMP)
	$(QUIET) PIPE=$(PIPE) TENSOR=$(TENSOR) $(BIN)/torchrun --nproc-per-node $$(($(PIPE) * $(DATA) * $(TENSOR))) examples/train_llama.py

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
