# make demo, make test, make lint: each sets up .venv first, once. Python 3.11 or newer and make are enough.
# make test-min: the tests with the oldest versions that setup.cfg allows, in .venv-min.
PYTHON ?= python3
VENV ?= .venv
STAMP := $(VENV)/.installed
VENV_MIN ?= .venv-min
STAMP_MIN := $(VENV_MIN)/.installed
BIN := $(VENV)/bin

.PHONY: demo test test-min lint format clean
.DEFAULT_GOAL := test

$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/quickstart.py

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

$(STAMP_MIN): setup.cfg pyproject.toml constraints-min.txt
	$(PYTHON) -m venv $(VENV_MIN)
	$(VENV_MIN)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-min.txt --editable ".[dev]"
	touch $@

test-min: $(STAMP_MIN)
	OMP_NUM_THREADS=1 $(VENV_MIN)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV_MIN) build *.egg-info .pytest_cache .ruff_cache
