# Everything runs from .venv in this folder (and stock TensorFlow from .venv-parity); nothing else is installed or changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STOCK := .venv-parity
FAST := not slow and not ray and not browser and not gpu and not parity
SLOW := (slow or ray or browser) and not gpu and not parity
export OMP_NUM_THREADS ?= 1

.PHONY: help demo install test test-slow test-parity lint format clean

help:
	@echo "make demo       install, then run the whole flow on a phantom cohort (DEMO=folder to choose where)"
	@echo "make test       install the test extras and run the quick tests"
	@echo "make test-slow  run the tests that start Ray, drive a browser or take longer"
	@echo "make test-parity  install stock StarDist on TensorFlow in .venv-parity and compare our label images with its own"
	@echo "make lint       ruff, mypy --strict, import-linter"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip

$(VENV)/.installed: $(BIN)/python pyproject.toml
	@echo "Installing ctc_ray into $(VENV): about 7 GB of packages, two to five minutes ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

install: $(VENV)/.installed

DEMO ?= demo
demo: $(VENV)/.installed
	$(BIN)/ctc-ray demo $(DEMO)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m "$(FAST)"

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m "$(SLOW)"

# TensorFlow stays out of .venv, so that the other tests show that nothing needs it.
$(STOCK)/.installed: pyproject.toml
	$(PYTHON) -m venv $(STOCK)
	$(STOCK)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(STOCK)/bin/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['parity'], sep='\n')" > $(STOCK)/requirements.txt
	$(STOCK)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -r $(STOCK)/requirements.txt
	@touch $@

test-parity: $(VENV)/.installed-dev $(STOCK)/.installed
	CTC_RAY_STOCK_PYTHON=$(CURDIR)/$(STOCK)/bin/python $(BIN)/python -m pytest -q -m parity

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(STOCK) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
