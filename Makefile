# Everything runs from .venv, which `make setup` builds from the pins. Needs Python >= 3.11 and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
PINS := requirements/dev.txt
LOWEST := .venv-lowest
COMPILE = $(UV) pip compile --quiet --universal --python-version 3.11 --upgrade --no-header --no-annotate \
  --no-emit-index-url --no-emit-find-links --no-emit-package vitrail-runtime
STAMP := $(VENV)/.vitrail-setup

.PHONY: setup demo test test-slow test-lowest mutants lint docs format types fast-tests pins hooks clean

setup: $(STAMP)

$(STAMP): $(PINS) pyproject.toml runtime/pyproject.toml | $(UV)
	test -x $(BIN)/python || $(UV) venv --quiet --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(VENV)
	$(UV) pip sync --quiet --compile-bytecode --python $(BIN)/python $(PINS)
	$(UV) pip install --quiet --python $(BIN)/python --no-deps -e runtime -e .
	touch $@

.uv/bin/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vitrail needs Python 3.11 or later; say make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .uv
	.uv/bin/python -m pip install --quiet uv

demo: setup  ## digits -> train -> evaluate -> predict -> report, on a CPU, in about three minutes
	$(BIN)/vitrail demo

test: setup lint types fast-tests  ## format, lint, types, tests

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	$(BIN)/basedpyright --level error

fast-tests: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow and not gpu and not network" -n 2

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "slow and not gpu and not network" -n 2

test-lowest: | $(UV)  ## the fast tests with the lowest versions that pyproject.toml allows
	test -x $(LOWEST)/bin/python || $(UV) venv --quiet --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(LOWEST)
	$(UV) pip sync --quiet --python $(LOWEST)/bin/python requirements/lowest.txt
	$(UV) pip install --quiet --python $(LOWEST)/bin/python --no-deps -e runtime -e .
	PATH="$(CURDIR)/$(LOWEST)/bin:$$PATH" OMP_NUM_THREADS=1 $(LOWEST)/bin/pytest -m "not slow and not gpu and not network" -n 2

mutants: setup  ## one small bug at a time: does a fast test fail? ROOM=train, SAMPLE=200, AGAIN=1; ROOM=table
	$(UV) pip install --quiet --python $(BIN)/python -r requirements/mutants.txt
	OMP_NUM_THREADS=1 $(BIN)/python scripts/mutants.py $(or $(ROOM),table) $(if $(SAMPLE),--sample $(SAMPLE)) $(if $(AGAIN),--again)

docs: setup  ## docs/models.md, with everything counted anew
	$(BIN)/python scripts/models_table.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

pins: | $(UV)  ## refresh the pins from pyproject.toml
	$(COMPILE) --extra deploy --extra track --extra hub --extra dev pyproject.toml -o $(PINS)
	$(COMPILE) --resolution lowest-direct --extra track --extra text pyproject.toml requirements/lowest.in \
	  -o requirements/lowest.txt
	$(COMPILE) -c $(PINS) requirements/mutants.in -o requirements/mutants.txt

hooks: setup  ## run format, lint and types at commit and push
	$(BIN)/pre-commit install --hook-type pre-commit --hook-type pre-push

clean:
	rm -rf $(VENV) $(LOWEST) .uv build dist *.egg-info runtime/*.egg-info
