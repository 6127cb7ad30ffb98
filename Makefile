# Each target does its own set-up: `make demo` and `make test` work in a fresh clone.
# torch comes from wherever pip is configured to look; for a build without CUDA see README.md.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Two cores, two workers; each test then runs on one torch thread.
WORKERS ?= 2

.PHONY: demo test lint types format bench repair-bench gallery gpu zoo schema clean

demo: .venv/installed
	$(BIN)/isograd demo

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow and not gpu"

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev
	$(BIN)/pyright

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/installed-dev
	$(BIN)/python -m benchmarks

# Resumable: what was trained is kept in benchmarks/, and stopping costs one training.
repair-bench: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.twins run
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.replay run
	$(BIN)/python -m benchmarks.twins table
	$(BIN)/python -m benchmarks.replay table

gallery: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) -m "slow and not gpu"

gpu: .venv/installed-dev
	$(BIN)/python -m pytest -q -m gpu

zoo: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m gallery.zoo

schema: .venv/installed
	$(BIN)/python -c "from isograd.render.json import schema; print(schema(), end='')" > docs/diagnosis.schema.json

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable .
	touch $@

# Dependency groups need pip 25.1: the constraints pin a newer one.
.venv/installed-dev: .venv/installed
	$(PIP) --upgrade pip
	$(PIP) --group dev
	touch $@
