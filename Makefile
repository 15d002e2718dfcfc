# `make` runs every sweep, `make test` the tests; both set up .venv first if need be.
SHELL := /bin/bash
.DEFAULT_GOAL := sweep
.DELETE_ON_ERROR:
.PHONY: sweep install phantom peers league browser test test-all update lint clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# One release of each package, the same everywhere. Empty, pip takes the newest that pyproject.toml admits.
LOCK ?= requirements.lock

export PATH := $(CURDIR)/$(BIN):$(PATH)

# Snakemake ends with `make`, however that ends.
sweep: peers  ## Run every cell that has no record yet, then tables, figures and report
	exec python -m harness.processes.tied $$PPID snakemake --cores all
	alst summary

install: $(STAMP)  ## Create .venv and install the project with everything it needs

$(STAMP): pyproject.toml setup.py $(LOCK)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.x")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(addprefix --constraint ,$(LOCK)) --editable '.[dev]'
	touch $@

phantom: $(STAMP)  ## Fetch PyTorch's CUDA build (0.5 GB) for `alst phantom`, without NVIDIA's libraries
	python -m harness.phantom.wheel

peers: $(STAMP)  ## The same, with what the released ALST recipes call: Liger, Triton, ArcticTraining (0.2 GB)
	python -m harness.phantom.wheel --peers

league: peers  ## Install the stacks of others in experiments/peers/, run them, and write results/league/league.md
	python -m harness.league.packages
	snakemake --cores all --config experiments=league

browser:  ## Install Chromium, in which the tests of the report open it
	@command -v chromium || test "$$(id -u)" = 0 || { echo 'make browser: no chromium on the path; install it, or let root do so: sudo make browser' >&2; exit 2; }
	command -v chromium || { apt-get update && apt-get install --yes --no-install-recommends chromium; }

test: $(STAMP)  ## The CPU test suite, without what runs once a week
	mkdir -p results
	pytest -n auto --dist worksteal -m 'not slow' --junitxml=results/tests.xml

test-all: $(STAMP)  ## The whole CPU test suite
	mkdir -p results
	pytest -n auto --dist worksteal --junitxml=results/tests.xml

update: $(STAMP)  ## Renew requirements.lock for Python 3.11 to 3.13, install it and run the tests
	uv pip compile --quiet --upgrade --universal --python-version 3.11 --all-extras --no-emit-index-url --no-annotate \
	  --custom-compile-command 'make update' --output-file requirements.lock pyproject.toml
	$(MAKE) test

lint: $(STAMP)  ## Formatting, lints, types, import contracts, spelling, workflow
	ruff format --check .
	ruff check .
	mypy
	lint-imports
	codespell
	snakefmt --check Snakefile

clean:  ## Remove what runs make; .venv and committed records stay
	rm -rf results/.cache results/cells results/tables results/figures results/logs results/report.html results/tests.xml .snakemake
