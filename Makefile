# make figures: run every notebook on the embedded demo and write the figures; make test: lint, types, tests;
# make check: the same without the slow tests, for every change.
# Each target sets up .venv first; a stamp file remembers that this was done.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup figures notebooks bench check test lint types tests-fast tests-all

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python3 >= 3.11 is needed, this is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[notebooks,captum,batch,test]'
	@touch $@

figures: setup
	$(BIN)/opticam run
	@echo "figures are in figures/, tables and executed notebooks in data/results/"

notebooks: setup
	$(BIN)/opticam render

bench: setup
	$(BIN)/python benchmarks/published.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/precision.py
	$(BIN)/python benchmarks/schedules.py
	$(BIN)/python benchmarks/methods.py
	$(BIN)/python benchmarks/curves.py
	$(BIN)/python benchmarks/batches.py
	$(BIN)/python benchmarks/allocator.py

check:
	@$(MAKE) --no-print-directory -j 2 lint types tests-fast

test:
	@$(MAKE) --no-print-directory -j 2 lint types tests-all

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

tests-fast: lint
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow and not browser and not gpu"

tests-all: lint
	$(BIN)/pytest -n 2 --dist worksteal
