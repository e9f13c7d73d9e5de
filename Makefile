# Two set-up commands: `make quickstart` trains on embedded data, `make test` passes the tests.
# Both make their own environment in $(VENV); nothing else is needed but Python 3.10 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# what an installation depends on: kernels that are built in it, too
SOURCES := pyproject.toml setup.py $(wildcard src/sequencer2d/native/kernels/*)
RUN := runs/quickstart-$(shell date +%Y%m%d-%H%M%S)

.PHONY: quickstart test test-all lint wheel check

quickstart: $(VENV)/installed
	$(BIN)/sequencer2d train --run-dir $(RUN)
	$(BIN)/sequencer2d predict $(RUN) $(RUN)/samples --top-k 3
	@echo "curves, confusion matrix and sample predictions: $(RUN)/report.html"

test: $(VENV)/installed-dev
	$(BIN)/pytest -m "not slow"

test-all: $(VENV)/installed-dev
	$(BIN)/pytest

lint: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

# build/ first: what is left there of an earlier build would be in the wheel
wheel: $(VENV)/bin/python
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

check: lint wheel test # which installs the wheel and tries it

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
