# SPDX-License-Identifier: Apache-2.0
# Front door: each target sets up what is missing, builds and runs. The build itself is CMake's.

CACHE   := $(if $(TQKV_CACHE),$(TQKV_CACHE),$(HOME)/.cache/turboquant)
PYTHON  := $(CACHE)/venv/bin/python
JOBS    := $(shell nproc 2>/dev/null || echo 2)
# LLAMA=none leaves llama.cpp out: no calibrate and eval, no tests against the real host.
LLAMA   ?= pinned
PRESET  ?= dev
ARGS    ?=

.DEFAULT_GOAL := help
.PHONY: help setup llama build demo test test-arm64 test-full bench format clean

help: ## this list
	@echo "turboquant: compresses the KV cache of language models"
	@echo
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  make \1@\2/' | column -t -s @
	@echo
	@echo "  Variables: PRESET=dev|release|asan|tsan  LLAMA=pinned|none  ARGS='...'"
	@echo "  Downloads and the llama.cpp build are kept in $(CACHE)"

setup: ## install or name missing Debian packages, make the Python environment
	@scripts/setup.sh

llama: setup ## build the pinned, unmodified llama.cpp (five minutes on two cores, once)
	@python3 scripts/build_llama.py api3

build: setup ## configure and build $(PRESET)
	@set -e; \
	case "$(LLAMA)" in none) llama= ;; *) llama=$$(python3 scripts/build_llama.py api3) ;; esac; \
	cmake --preset $(PRESET) -DTQKV_LLAMA="$$llama" --log-level=WARNING; \
	cmake --build --preset $(PRESET) -j $(JOBS)

demo: setup ## run a real model with and without compression and compare
	@$(PYTHON) scripts/demo.py $(ARGS)

test: build ## build and run all tests, real models under real llama.cpp included (40 minutes on two cores)
	@scripts/setup.sh test
	@set -e; \
	if [ "$(LLAMA)" != none ]; then \
	    for name in smollm2 qwen gemma texts; do python3 scripts/fetch.py $$name >/dev/null; done; \
	    export TQKV_TEST_LLAMA_API3=$$(python3 scripts/build_llama.py api3); \
	    export TQKV_TEST_LLAMA_API2=$$(python3 scripts/build_llama.py api2); \
	    export TQKV_TEST_MODELS=$(CACHE)/models TQKV_TEST_PLUGIN=build/$(PRESET)/lib/libggml-turboquant.so; \
	fi; \
	cmake --preset asan -DTQKV_LLAMA= --log-level=WARNING && cmake --build --preset asan -j $(JOBS); \
	failed=0; \
	ctest --preset asan -j $(JOBS) || failed=1; \
	ctest --preset $(PRESET) -j $(JOBS) $(ARGS) || failed=1; \
	$(MAKE) --no-print-directory test-arm64 || failed=1; \
	TQKV_BUILD_DIR=build/$(PRESET) $(PYTHON) -m pytest || failed=1; \
	exit $$failed

# Two CPUs: one with the dot products of ARMv8.2, and one without, for the kernels that it takes.
test-arm64: setup ## build for aarch64 and run the C tests by qemu (four minutes on two cores)
	@set -e; \
	if ! command -v qemu-aarch64 >/dev/null || ! command -v aarch64-linux-gnu-gcc >/dev/null; then \
	    echo "test-arm64: left out, needs qemu-user and gcc-aarch64-linux-gnu"; exit 0; \
	fi; \
	root=$$(python3 scripts/fetch.py cmocka-arm64); \
	cmake --preset arm64 -DTQKV_ARM64_ROOT="$$root" --log-level=WARNING; \
	cmake --build --preset arm64 -j $(JOBS); \
	ctest --preset arm64 -j $(JOBS); \
	ctest --preset arm64-base -j $(JOBS)

test-full: setup ## the same at 8192 tokens, in vLLM, with the thread sanitizer as well (two hours)
	TQKV_TEST_VLLM=$$(python3 scripts/vllm_env.py) TQKV_TEST_FULL=1 $(MAKE) test
	$(MAKE) build PRESET=tsan LLAMA=none
	ctest --preset tsan -j $(JOBS)

bench: ## time kernels, a layer and models side by side with llama.cpp (an hour on two cores; ARGS='--only layer')
	@$(MAKE) --no-print-directory build PRESET=release
	@$(PYTHON) bench/cpu.py build/release $(ARGS)

format: ## apply .clang-format to all C files
	@git ls-files '*.c' '*.h' | xargs clang-format -i

clean: ## remove build/ (downloads and llama.cpp stay in the cache)
	rm -rf build
