# `make` runs every sweep, `make test` the tests; both set up .venv first if need be.
SHELL := /bin/bash
.DEFAULT_GOAL := sweep
.DELETE_ON_ERROR:
.PHONY: sweep install test lint clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

export PATH := $(CURDIR)/$(BIN):$(PATH)

sweep: $(STAMP)  ## Run every cell that has no record yet, then tables, figures and report
	exec python -m harness.tied $$PPID snakemake --cores all
	alst summary

install: $(STAMP)  ## Create .venv and install the project with everything it needs

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.x")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --editable '.[dev]'
	touch $@

test: $(STAMP)  ## The whole CPU test suite
	mkdir -p results
	pytest -n auto --junitxml=results/tests.xml

lint: $(STAMP)  ## Formatting, lints, types, import contracts, spelling, workflow
	ruff format --check .
	ruff check .
	mypy
	lint-imports
	codespell
	snakefmt --check Snakefile

clean:  ## Remove what runs make; .venv and committed records stay
	rm -rf results/.cache results/cells results/tables results/figures results/logs results/report.html results/tests.xml .snakemake
