# `make` or `make help` lists the targets. As root, what is missing is installed through apt.
.DEFAULT_GOAL := help
SHELL := /bin/bash
MAKEFLAGS += --no-print-directory
PYTHON ?= python3
export PYTHON
VENV := .venv
BIN := $(VENV)/bin
NATIVE := snapshot/kernel/native
SOURCES := $(wildcard $(NATIVE)/*.[ch]) $(NATIVE)/build.py setup.py
CORE := snapshot/kernel/_native.abi3.so
LOCK := flock $(VENV)
PYTEST := $(BIN)/python -m pytest -q
NATIVE_ROUNDS ?= 5
SANITIZE := -std=gnu11 -g -O1 -Wall -Wextra -Werror -pthread -fno-omit-frame-pointer \
	-fsanitize=address,undefined -fno-sanitize-recover=all -DSNAP_LOOK_THREADS=3 -DSNAP_DENSE_BLOCK=8

.PHONY: help build demo bench bench-quick test check stress lint types native-test dist clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(VENV)/.ready: pyproject.toml
	@scripts/setup build
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check -q setuptools wheel
	@PYTHONWARNINGS=ignore $(LOCK) $(BIN)/python -m pip install --disable-pip-version-check -q -e '.[dev]'
	@touch $@

$(CORE): $(SOURCES) | $(VENV)/.ready
	@PYTHONWARNINGS=ignore $(LOCK) $(BIN)/python setup.py -q build_ext --inplace
	@touch $@

build: $(VENV)/.ready $(CORE) ## the virtual environment, the `snap` command and its C core
	@$(BIN)/python -m compileall -q cli.py snapshot # else a command compiles it all, each time, where it may not write

demo: build ## a redis-server under load: snapshot it, kill it, bring it back
	@scripts/setup demo
	@$(BIN)/python bench/demo.py

$(VENV)/.bench: $(VENV)/.ready
	@PYTHONWARNINGS=ignore $(LOCK) $(BIN)/python -m pip install --disable-pip-version-check -q -e '.[bench]'
	@touch $@

bench: build $(VENV)/.bench ## snap and its peers measured, in 25 minutes: docs/benchmarks.md is written
	@scripts/setup bench
	@$(BIN)/python -m bench run --out docs/benchmarks/run.jsonl; code=$$?; \
	$(BIN)/python -m bench report docs/benchmarks/run.jsonl && exit $$code

bench-quick: build ## the same, small, in two minutes: tables on stdout
	@scripts/setup bench
	@$(BIN)/python -m bench run --quick

test: lint types ## lint, types and all tests (those that lack something say what, and skip)
	@scripts/setup test
	@$(PYTEST)

check: native-test test ## what CI runs: the above, and the C core under sanitizers

stress: build ## the long proofs: hundreds of takes that must each be one instant
	@scripts/setup test
	@SNAP_STRESS=1 $(PYTEST) tests/stress

lint: build ## ruff
	@$(BIN)/ruff check

types: build ## mypy, strict
	@$(BIN)/mypy

native-test: build ## the C core under AddressSanitizer and UndefinedBehaviorSanitizer
	@mkdir -p build/native
	@for test in $(wildcard tests/native/*.c); do \
		out=build/native/$$(basename $$test .c) && echo "$$test" && \
		gcc $(SANITIZE) -I$(NATIVE) -o $$out $$test $(wildcard $(NATIVE)/*.c) && \
		$$out $(NATIVE_ROUNDS) 1 || exit 1; \
	done
	@echo "tests/native/pump_test.c, huge pages" && build/native/pump_test $(NATIVE_ROUNDS) 1 wdmh
	@echo "tests/native/pump_test.c, writers pass" && build/native/pump_test $(NATIVE_ROUNDS) 1 wdmp
	@echo "tests/native/pump_test.c, writers pass, listed" && build/native/pump_test $(NATIVE_ROUNDS) 1 wp
	@echo "tests/native/pump_test.c, writers pass, and fork" && build/native/pump_test $(NATIVE_ROUNDS) 1 wpf
	@echo "tests/native/pump_test.c, written from outside" && build/native/pump_test $(NATIVE_ROUNDS) 1 wpg

dist: build ## wheel and sdist, in dist/
	@$(BIN)/python -m build -q

clean: ## what was built, but for the virtual environment (.venv)
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	rm -f snapshot/kernel/_native.* tests/targets/bin/* bench/targets/bin/*
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
