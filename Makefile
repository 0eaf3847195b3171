# make demo, make test and make runtime-binary do all their own set-up in .venv, with pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEV_INSTALLED := $(VENV)/.installed-dev
BINDINGS := $(VENV)/tensorrt/.installed
INSTALL := $(BIN)/python -m pip --disable-pip-version-check --no-input install --quiet --root-user-action=ignore \
	--constraint constraints.txt --editable

.PHONY: help setup demo test test-long test-all lint runtime-binary clean

help:
	@echo "make demo            build, calibrate and run the embedded pipeline into build/demo"
	@echo "make test            lint, types and the CPU test suite but for its long tests"
	@echo "make test-long       the long tests alone: they rarely break"
	@echo "make test-all        make test, and the long tests"
	@echo "make runtime-binary  freeze tmpdiff-runtime into build/runtime/tmpdiff-runtime"

# What building, calibrating and reporting need; a changed pyproject.toml or constraints.txt updates it.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tmpdiff-export needs Python 3.11 or newer")'
	@echo "installing pinned packages into $(VENV): 1.7 GB and a few minutes, less if it is there and only updated"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) '.[export]'
	@touch $@

$(DEV_INSTALLED): $(INSTALLED)
	@echo "installing pinned tools for development into $(VENV): about a minute"
	@$(INSTALL) '.[dev]'
	@touch $@

setup: $(DEV_INSTALLED)

# The real TensorRT bindings of several versions, to check our calls against; no TensorRT library.
$(BINDINGS): $(DEV_INSTALLED) tools/release/fetch_bindings.py tools/release/bindings_typing.py
	$(BIN)/python tools/release/fetch_bindings.py --into $(VENV)/tensorrt
	touch $(BINDINGS)

demo: $(INSTALLED)
	$(BIN)/tmpdiff-export demo --out build/demo

lint: $(DEV_INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# What is slow to make is made once for both workers; so tests go to whichever is free.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

test: lint $(BINDINGS)
	$(PYTEST) -m "not long"
	@echo "The long tests were left out; make test-all runs them too, make test-long them alone."

test-long: $(BINDINGS)
	$(PYTEST) -m long

test-all: lint $(BINDINGS)
	$(PYTEST)

runtime-binary: $(DEV_INSTALLED)
	$(BIN)/python tools/release/freeze_runtime.py --out build/runtime

clean:
	rm -rf build $(VENV)
