# make figures: run every notebook on the embedded demo and write the figures; make test: lint, types, tests.
# Each target sets up .venv first; a stamp file remembers that this was done.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup figures notebooks bench test

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

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest
