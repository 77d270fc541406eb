# Presto-RT's commands. `make demo` writes a clip, `make test` runs the tests, `make check` does what CI does besides.
# All of them create .venv on their first run. Variables: PYTHON=python3.12 (3.11 or newer) creates .venv with another
# interpreter, ARGS="-k audio" goes to pytest, PROMPT="..." to the demo.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
PROMPT ?= calm piano with warm strings, 84 bpm
ARGS ?=
GPU ?=

# The budgets of `make model`: hours of music, minutes of training.
HOURS ?= 25
CODEC_MINUTES ?= 50
BASE_MINUTES ?= 110
STEP_MINUTES ?= 60
LAYER_MINUTES ?= 20

BIN := $(VENV)/bin
PIP := -m pip install --quiet --disable-pip-version-check
INSTALL := $(BIN)/python $(PIP)
# The C++ operators are rebuilt, by installing again, after a change of any of these.
BUILD_FILES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)
CPP_FILES = $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h)
SANITIZED_TESTS := $(wildcard tests/test_noise.py tests/test_overlap.py tests/test_pcm.py tests/test_cpu_*.py tests/test_codec*.py)
TEST_EXTRAS := dev,lab,triton
# A wheel is installed into this environment and used from this folder, outside the repository's own.
CLEAN := $(abspath build/clean)
MAX_WHEEL_MB := 100

.DEFAULT_GOAL := help
.PHONY: help demo test check lint format typecheck check-cpp check-wheel model bench bench-gpu wheel clean

help:
	@echo "make demo         write a 32 s clip from a prompt to demo.wav"
	@echo "make test         run all tests, with the packages that the trainers and judges need"
	@echo "make check        run lint, typecheck, check-cpp and check-wheel"
	@echo "make lint         check style and format with ruff and clang-format;  make format: correct them"
	@echo "make typecheck    run mypy --strict on presto_rt and kernels"
	@echo "make check-cpp    run the tests of the C++ operators under the address and undefined-behavior sanitizers"
	@echo "make check-wheel  build a wheel, install it into a clean environment and generate a clip with it"
	@echo "make model        make the shipped models from nothing, in out/ (hours; see docs/training.md)"
	@echo "make bench        run the benchmarks in bench/;  make bench-gpu: those of a CUDA GPU"
	@echo "make wheel        build a wheel in dist/"
	@echo "make clean        remove everything that was built, except .venv"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone, so that a torch that is already installed (for a certain GPU, say) is kept.
$(VENV)/.installed: $(BUILD_FILES) | $(BIN)/python
	@$(BIN)/python -c "import torch" 2>/dev/null || { echo "installing torch $(TORCH)"; $(INSTALL) torch==$(TORCH); }
	@echo "installing presto-rt"
	@$(INSTALL) -e .
	@touch $@

# Some judges and the synthesizer pin packages that are not used here, so they are installed without dependencies.
$(VENV)/.installed-tests: $(VENV)/.installed requirements/judges-nodeps.txt
	@echo "installing the packages of the tests"
	@$(INSTALL) -e ".[$(TEST_EXTRAS)]"
	@$(INSTALL) --no-deps -r requirements/judges-nodeps.txt
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/presto-rt generate "$(PROMPT)" --seconds 32 --seed 7 -o demo.wav

test: $(VENV)/.installed-tests
	$(BIN)/python -m pytest -q $(ARGS)

check: lint typecheck check-cpp check-wheel

lint: $(VENV)/.installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

format: $(VENV)/.installed-tests
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

typecheck: $(VENV)/.installed-tests
	$(BIN)/mypy

# Tests of the C++ operators against a build with sanitizers, in build/sanitize; needs g++.
check-cpp: export PATH := $(abspath $(BIN)):$(PATH)
check-cpp: $(VENV)/.installed-tests
	cmake -S . -B build/sanitize -G Ninja -DPRESTO_RT_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	    -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	cmake --build build/sanitize
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	    PRESTO_RT_SANITIZED=build/sanitize $(BIN)/python -m pytest -q -p tests.support.sanitized $(SANITIZED_TESTS)

wheel: $(VENV)/.installed
	rm -rf build/lib* build/bdist.* dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -w dist .
	@ls -l dist

# The clean environment holds the wheel and its dependencies, and nothing of the repository.
check-wheel: wheel
	@bytes=$$(stat -c %s dist/*.whl); test $$bytes -lt $(MAX_WHEEL_MB)000000 \
	    || { echo "the wheel has $$bytes bytes; the limit is $(MAX_WHEEL_MB) MB"; exit 1; }
	rm -rf $(CLEAN)
	$(PYTHON) -m venv $(CLEAN)
	$(CLEAN)/bin/python $(PIP) torch==$(TORCH)
	$(CLEAN)/bin/python $(PIP) dist/*.whl
	cd $(CLEAN) && bin/presto-rt generate "$(PROMPT)" --seconds 2 --seed 7 -o clip.wav && test -s clip.wav
	cd $(CLEAN) && bin/python -c "import presto_rt; from presto_rt import native; \
	    assert presto_rt.__file__.startswith('$(CLEAN)'); assert native.lib is not None, native.why"
	cd $(CLEAN) && ! bin/presto-rt generate "$(PROMPT)" --model nano-base --seconds 1 2>message.txt
	grep "clone" $(CLEAN)/message.txt

$(VENV)/.installed-training: $(VENV)/.installed
	@echo "installing the packages of data and training"
	@$(INSTALL) -e ".[data,train]"
	@$(INSTALL) --no-deps -r requirements/judges-nodeps.txt
	@touch $@

# A killed run continues where it stopped when it is started again.
model: $(VENV)/.installed-training
	$(BIN)/presto-rt lab data build --hours $(HOURS)
	$(BIN)/presto-rt lab train codec --minutes $(CODEC_MINUTES) $$(test ! -e runs/codec/last.safetensors || echo --resume)
	$(BIN)/presto-rt lab train encode
	$(BIN)/presto-rt lab train base --minutes $(BASE_MINUTES) --resume
	$(BIN)/presto-rt lab distill steps --teacher runs/base --minutes $(STEP_MINUTES) --run runs/presto-s --resume
	$(BIN)/presto-rt lab distill layers --method generator --teacher runs/presto-s --minutes $(LAYER_MINUTES) --run runs/presto-sl --resume \
	    --set learning_rate=2e-4 --set tokens=1024
	$(BIN)/presto-rt lab train pack out/nano --base runs/presto-sl
	$(BIN)/presto-rt lab train pack out/nano-base --codec out/nano --share-codec --defaults '{"steps": 32, "sampler": "dpmpp_2m", "guidance": 2.0, "guidance_interval": [0.0, 3.0]}'

# Each writes bench/results/*.json; bench.readme puts their tables into README.md and docs/. GPU=--gpu times the kernels
# on a CUDA device.
bench: $(VENV)/.installed-tests
	$(BIN)/python -m bench.native
	$(BIN)/python -m bench.cpu
	$(BIN)/python -m bench.clips
	$(BIN)/python -m bench.operators
	$(BIN)/python -m bench.fidelity
	$(BIN)/python -m bench.kernels $(GPU)
	$(BIN)/python -m bench.e2e
	$(BIN)/python -m bench.readme

# Everything that needs a CUDA GPU, in one command of 9 minutes: tests of captured graphs, the end-to-end ladder, the
# kernels. Without a GPU it is a dry run. E2E_MINUTES=14 and KERNEL_MINUTES=7 give more time (the slowest baseline is
# last). RUN=python3 takes a Python that has torch, Triton and pytest already, and installs nothing.
RUN ?= $(BIN)/python
E2E_MINUTES ?= 5
KERNEL_MINUTES ?= 3.5
bench-gpu: $(if $(filter $(BIN)/python,$(RUN)),$(VENV)/.installed-tests)
	-$(RUN) -m pytest -q tests/test_graph_cuda.py
	-$(RUN) -m bench.e2e_gpu --minutes $(E2E_MINUTES)
	$(RUN) -m bench.e2e_gpu --document
	$(RUN) -m bench.kernels --gpu --minutes $(KERNEL_MINUTES)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f presto_rt/_C.*.so $(VENV)/.installed*
	find presto_rt kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
