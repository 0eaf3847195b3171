# make demo, make test and make runtime-binary do all their own set-up in .venv, with pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BINDINGS := $(VENV)/tensorrt/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help setup demo test lint runtime-binary clean

help:
	@echo "make demo            build, calibrate and run the embedded pipeline into build/demo"
	@echo "make test            lint, types and the CPU test suite"
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

test: lint $(BINDINGS)
	$(BIN)/python -m pytest -n 2 --dist loadfile

runtime-binary: $(STAMP)
	$(BIN)/python tools/release/freeze_runtime.py --out build/runtime

clean:
	rm -rf build $(VENV)
