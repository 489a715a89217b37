# make figures: run every notebook on the embedded demo and write the figures; make test: lint, types, tests;
# make check: the same without the slow tests, for every change; make docs: the pages as a site, in docs/_build/html.
# Each target but bench-gpu sets up .venv first; a stamp file remembers that this was done.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup figures notebooks docs bench bench-gpu soak check lint fast test

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python3 >= 3.11 is needed, this is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[lab,batch,captum,test]'
	@touch $@

figures: setup
	$(BIN)/opticam run
	@echo "figures are in figures/, tables and executed notebooks in data/results/"

notebooks: setup
	$(BIN)/opticam render

docs: .venv/.docs
	$(BIN)/python -m sphinx -q -W --keep-going -c docs -d docs/_build/doctrees . docs/_build/html
	@echo "the site begins at docs/_build/html/index.html"

.venv/.docs: .venv/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

bench: setup
	$(BIN)/python benchmarks/published.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/precision.py
	$(BIN)/python benchmarks/schedules.py
	$(BIN)/python benchmarks/methods.py
	$(BIN)/python benchmarks/curves.py
	$(BIN)/python benchmarks/batches.py
	$(BIN)/python benchmarks/allocator.py
	$(BIN)/python benchmarks/busy.py
	$(BIN)/python benchmarks/coverage.py
	$(BIN)/python benchmarks/soak.py

soak: setup
	$(BIN)/python benchmarks/soak.py

# no set-up: a machine with a GPU may have no network, and packages of its own
bench-gpu:
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py

TESTS := $(BIN)/pytest -n logical --maxprocesses 4 --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fast: setup
	$(TESTS) -m "not slow and not browser and not gpu"

check: setup
	$(MAKE) --no-print-directory -j2 lint fast

test: lint
	$(TESTS)
