# make demo, make test and make runtime-binary do all their own set-up in .venv, with pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BINDINGS := $(VENV)/tensorrt/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help setup demo test test-long test-all lint runtime-binary clean

help:
	@echo "make demo            build, calibrate and run the embedded pipeline into build/demo"
	@echo "make test            lint, types and the CPU test suite but for its long tests"
	@echo "make test-long       the long tests alone: they rarely break"
	@echo "make test-all        make test, and the long tests"
	@echo "make runtime-binary  freeze tmpdiff-runtime into build/runtime/tmpdiff-runtime"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tmpdiff-export needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

setup: $(STAMP)

# The real TensorRT bindings of several versions, to check our calls against; no TensorRT library.
$(BINDINGS): $(STAMP) tools/release/fetch_bindings.py tools/release/bindings_typing.py
	$(BIN)/python tools/release/fetch_bindings.py --into $(VENV)/tensorrt
	touch $(BINDINGS)

demo: $(STAMP)
	$(BIN)/tmpdiff-export demo --out build/demo

lint: $(STAMP)
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

runtime-binary: $(STAMP)
	$(BIN)/python tools/release/freeze_runtime.py --out build/runtime

clean:
	rm -rf build $(VENV)
