# Everything starts here: `make demo` writes a clip, `make test` runs the tests. Both make .venv on their first run.
# PYTHON=python3.12 picks another interpreter (3.11 or newer), ARGS="-k audio" goes to pytest, PROMPT="..." to the demo.

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
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# A change in any of these means installing again, which also rebuilds the C++ operators.
BUILD_FILES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)
SANITIZED_TESTS := tests/test_noise.py tests/test_pcm.py tests/test_cpu_ops.py tests/test_cpu_networks.py $(wildcard tests/test_codec*.py)
TEST_EXTRAS := dev,train,data,eval,triton

.DEFAULT_GOAL := help
.PHONY: help demo test model test-sanitize lint format typecheck bench bench-gpu wheel clean

help:
	@echo "make demo       a 32 s clip from a prompt, in demo.wav"
	@echo "make test       all tests (with what the trainers and judges need)"
	@echo "make test-sanitize  the C++ operators' tests under address and undefined-behaviour sanitizers"
	@echo "make lint       ruff and clang-format, changing nothing;  make format: changing files"
	@echo "make typecheck  mypy over the public modules"
	@echo "make model      the shipped models again from nothing, in out/ (hours; see docs/training.md)"
	@echo "make bench      the benchmarks in bench/;  make bench-gpu: end to end and the kernels on a CUDA GPU"
	@echo "make wheel      a wheel in dist/"
	@echo "make clean      removes what was built, not .venv"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch goes first and by itself, so that one that is already there (for a certain GPU, say) stays.
$(VENV)/.installed: $(BUILD_FILES) | $(BIN)/python
	@$(BIN)/python -c "import torch" 2>/dev/null || { echo "installing torch $(TORCH)"; $(INSTALL) torch==$(TORCH); }
	@echo "installing presto-rt"
	@$(INSTALL) -e .
	@touch $@

# Some judges and the synthesizer pin packages that are not used here, so they are installed without what they ask for.
$(VENV)/.installed-tests: $(VENV)/.installed requirements/judges-nodeps.txt
	@echo "installing what the tests need"
	@$(INSTALL) -e ".[$(TEST_EXTRAS)]"
	@$(INSTALL) --no-deps -r requirements/judges-nodeps.txt
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/presto-rt generate "$(PROMPT)" --seconds 32 --seed 7 -o demo.wav

test: $(VENV)/.installed-tests
	$(BIN)/python -m pytest -q $(ARGS)

# The C++ tests against a build with sanitizers, in build/sanitize; needs CMake, Ninja and g++.
test-sanitize: $(VENV)/.installed-tests
	cmake -S . -B build/sanitize -G Ninja -DPRESTO_RT_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	    -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	cmake --build build/sanitize
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	    PRESTO_RT_SANITIZED=build/sanitize $(BIN)/python -m pytest -q -p tests.support.sanitized $(SANITIZED_TESTS)

lint: $(VENV)/.installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h

format: $(VENV)/.installed-tests
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h

typecheck: $(VENV)/.installed-tests
	$(BIN)/mypy

$(VENV)/.installed-training: $(VENV)/.installed
	@echo "installing what data and training need"
	@$(INSTALL) -e ".[data,train]"
	@$(INSTALL) --no-deps -r requirements/judges-nodeps.txt
	@touch $@

# Killed and started again, it goes on where it was.
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

# Each writes bench/results/*.json; the last puts their tables into the README. GPU=--gpu for the kernels on a CUDA device.
bench: $(VENV)/.installed-tests
	$(BIN)/python bench/native.py
	$(BIN)/python bench/cpu.py
	$(BIN)/python bench/clips.py
	$(BIN)/python bench/operators.py
	$(BIN)/python bench/fidelity.py
	$(BIN)/python -m bench.kernels $(GPU)
	$(BIN)/python bench/e2e.py
	$(BIN)/python bench/readme.py

# What only a CUDA GPU can tell, in one command of 9 minutes: whether captured graphs are right, the end-to-end ladder, the
# kernels; without a GPU it is a dry run. More time is E2E_MINUTES=14 (the slowest baseline is last) and KERNEL_MINUTES=7. RUN=python3 takes a Python that has torch, Triton and pytest already, and installs nothing.
RUN ?= $(BIN)/python
E2E_MINUTES ?= 5
KERNEL_MINUTES ?= 3.5
bench-gpu: $(if $(filter $(BIN)/python,$(RUN)),$(VENV)/.installed-tests)
	-$(RUN) -m pytest -q tests/test_graph_cuda.py
	-$(RUN) -m bench.e2e_gpu --minutes $(E2E_MINUTES)
	$(RUN) -m bench.e2e_gpu --readme
	$(RUN) -m bench.kernels --gpu --minutes $(KERNEL_MINUTES)

wheel: $(VENV)/.installed
	rm -rf build/lib build/bdist.* dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -w dist .
	@ls -l dist

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f presto_rt/_C.*.so $(VENV)/.installed*
	find presto_rt kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
