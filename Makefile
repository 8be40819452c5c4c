# `make help` lists the targets.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard snapshot/kernel/native/*.[ch]) snapshot/kernel/native/build.py setup.py

.PHONY: help build lint types check test demo stress clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: pyproject.toml $(NATIVE) | $(BIN)/python
	@flock $(VENV) $(BIN)/pip install --disable-pip-version-check -q -e '.[dev]'
	@touch $@

build: $(VENV)/.ready ## the virtual environment and the C core
