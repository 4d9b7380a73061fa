# Every target sets up what it needs in .venv; a fresh machine needs python3 (3.10 or newer, with its
# headers), make and a C++ compiler. `make help` lists the targets.
PYTHON ?= python3
TORCH ?= 2.13.0
VENV ?= .venv
DEMO_OUT ?= build/demo
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
export MAX_JOBS ?= $(JOBS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PY := $(VENV)/bin/python
STAMPS := $(VENV)/stamps
STEP := $(PYTHON) scripts/step.py
# Bound to the torch of the environment: no other one is ever resolved.
PIP := env PIP_CONSTRAINT=$(abspath $(VENV))/constraints.txt $(PY) -m pip install
# A mis-set VENV must not cost a folder that is something else.
OWN_VENV = if [ -n "$$(ls -A '$(VENV)' 2>/dev/null)" ] && [ ! -e '$(VENV)/pyvenv.cfg' ]; then \
	echo 'VENV=$(VENV) is no virtual environment: it is not removed; set another VENV' >&2; exit 1; fi
# Where nvcc is, the CUDA kernels are compiled for the tests also beside a torch without CUDA.
NVCC := $(firstword $(wildcard $(CUDACXX) $(CUDA_HOME)/bin/nvcc $(CUDA_PATH)/bin/nvcc) \
	$(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc))
TEST_CUDA ?= $(if $(NVCC),ON,AUTO)
BUILD_FILES := setup.py pyproject.toml CMakeLists.txt $(shell find cmake csrc -type f)
FORMATTED = $(shell find csrc tests scripts -name '*.c' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help demo test lint compile-gate bench experiments readme wheel check-wheel gpu-check build emulator fuzz fresh-wheels docs clean
.DELETE_ON_ERROR:

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

# ---- the environment ---------------------------------------------------------------------------
$(STAMPS)/environment: scripts/environment.py
	@$(OWN_VENV)
	@rm -rf $(VENV)
	@$(STEP) "environment $(VENV): torch and build tools" -- \
		$(PYTHON) scripts/environment.py --folder $(VENV) --torch $(TORCH)
	@mkdir -p $(STAMPS) && touch $@

# What the package needs at run time, and for development; the package itself is compiled below.
$(STAMPS)/packages-cli $(STAMPS)/packages-dev $(STAMPS)/packages-release: $(STAMPS)/packages-%: $(STAMPS)/environment pyproject.toml
	@$(STEP) "packages [$*]" --quiet -- env ORTHOREG_EXT_NO_BUILD=1 \
		$(PIP) --no-build-isolation -e '.[$*]'
	@touch $@

INSTALL := $(PIP) -v --no-deps --no-build-isolation -e .

# Any build serves the demo; the tests want the one with the CUDA kernels where they can be compiled.
$(STAMPS)/build: $(STAMPS)/packages-cli $(BUILD_FILES)
	@rm -f $(STAMPS)/build-test
	@$(STEP) "compile the package" --quiet -- $(INSTALL)
	@touch $@

$(STAMPS)/build-test: $(STAMPS)/packages-dev $(BUILD_FILES)
	@$(STEP) "compile the package, ORTHOREG_CUDA=$(TEST_CUDA)" --quiet -- \
		env ORTHOREG_CUDA=$(TEST_CUDA) ORTHOREG_WERROR=1 $(INSTALL)
	@touch $(STAMPS)/packages-cli $(STAMPS)/build $@

build: $(STAMPS)/build ## compile the package into .venv (editable)

# ---- what it is for ----------------------------------------------------------------------------
# Run again, it continues one that was interrupted, and prints the table of one that is finished.
demo: $(STAMPS)/build ## train, prune and fine-tune a small network on real images; writes build/demo
	@$(STEP) "orthoreg prune" -- $(VENV)/bin/orthoreg prune --resume --model vgg --data digits --out '$(DEMO_OUT)'
	@echo '==> to start over: make demo DEMO_OUT=ANOTHER_FOLDER, or remove $(DEMO_OUT) first'

lint: $(STAMPS)/packages-dev ## ruff, mypy, clang-format
	@$(STEP) "ruff check" -- $(PY) -m ruff check .
	@$(STEP) "ruff format" -- $(PY) -m ruff format --check .
	@$(STEP) "mypy" -- $(PY) -m mypy
	@$(STEP) "clang-format" -- $(VENV)/bin/clang-format --dry-run -Werror $(FORMATTED)

# What ptxas said while the tests' build compiled each kernel for every architecture.
compile-gate: $(STAMPS)/build-test ## registers and spills of every CUDA kernel
	@$(if $(filter ON on 1,$(TEST_CUDA)),$(STEP) "compile gate" -- $(PY) scripts/compile_gate.py \
		--out build/compile_gate.txt,echo '==> compile gate: left out, TEST_CUDA is $(TEST_CUDA)')

test: $(STAMPS)/build-test lint compile-gate docs ## lint, all tests, the sanitizers, the wheels
	@OMP_NUM_THREADS=1 $(STEP) "pytest" -- $(PY) -m pytest -n $(JOBS) -p no:benchmark $(PYTEST_ARGS)
	@$(MAKE) --no-print-directory -j2 -Oline emulator fuzz fresh-wheels
	@echo "==> make test: all passed"

# What every kernel computes, on the emulator; the same file runs plain, in three schedules, in pytest.
EMULATED ?= tests/test_schedules.py

emulator: emulator-address emulator-thread ## the CUDA kernels on the CPU, under two sanitizers

emulator-%: $(STAMPS)/build-test
	@$(STEP) "emulated kernels for the $* sanitizer: compile" -- \
		$(PY) -m tests.emu.build --sanitize $*
	@OMP_NUM_THREADS=1 $(STEP) "emulated kernels for the $* sanitizer: test" -- \
		$(PY) -m tests.emu.sanitize $* -q $(EMULATED)

fresh-wheels: $(STAMPS)/build-test
	@$(STEP) "wheels, in an environment without a compiler" -- \
		env ORTHOREG_CUDA=$(TEST_CUDA) ORTHOREG_WERROR=1 $(PY) scripts/check_wheel.py $(VENV)/constraints.txt

# ORTHOREG_FUZZ_EXAMPLES: how many, 10 000 if not set; ORTHOREG_FUZZ_SEED=random: others every time.
fuzz: $(STAMPS)/packages-dev ## odd arguments for everything, under the address and UB sanitizers
	@$(STEP) "fuzz: the CPU operators under sanitizers" -- $(PY) -m tests.fuzz.sanitized

# Quick in under 5 minutes; BENCH_ARGS="--budget 60" for less. The table and the files are made of the
# records that were written, also of a run that failed or was stopped.
FULL ?=
BENCH_ARGS ?=

bench: $(STAMPS)/build-test ## the benchmarks, under 5 minutes; FULL=1: every model and baseline
	@rm -f build/bench/records.json
	@$(STEP) "benchmarks$(if $(filter-out 0,$(FULL)), (full))" -- $(PY) -m pytest benchmarks -q \
		-W ignore::DeprecationWarning --benchmark-columns=min,median,rounds \
		$(if $(filter-out 0,$(FULL)),--full) $(BENCH_ARGS); status=$$?; \
	[ ! -e build/bench/records.json ] || $(PY) -m benchmarks.report build/bench/records.json \
		|| exit 1; exit $$status

# Some of experiments/configs by name; images other than the digits are looked for in DATA. Run again,
# it goes on with what was stopped. EXPERIMENT_ARGS="--minutes 30 --jobs 1" for other options.
NAMES ?= $(basename $(notdir $(shell grep -LE '^source *=' experiments/configs/*.toml)))
DATA ?= data
EXPERIMENT_ARGS ?=

experiments: $(STAMPS)/build-test ## the experiments on digits; NAMES="..." DATA=DIR for others
	@OMP_NUM_THREADS=1 $(STEP) "experiments" -- $(PY) -m experiments $(NAMES) --data '$(DATA)' \
		--jobs $(JOBS) $(EXPERIMENT_ARGS)

readme: $(STAMPS)/packages-dev ## README and docs/evidence.md from the results of benchmarks, experiments
	@$(PY) -m benchmarks.readme
	@$(PY) -m experiments.report

# One wheel for each CPython named here, beside the environment's own: PYTHONS="python3.12 python3.13".
PYTHONS ?=

wheel: $(STAMPS)/packages-release ## the sdist and the wheels, in dist/; PYTHONS="python3.12 ..."
	@$(STEP) "wheels" -- env PYTHONS='$(PYTHONS)' $(PY) scripts/wheels.py --out dist

check-wheel: $(STAMPS)/packages-release ## uses what is in dist/ without a compiler
	@$(STEP) "wheels, in an environment without a compiler" -- env PYTHONS='$(PYTHONS)' \
		$(PY) scripts/check_wheel.py $(VENV)/constraints.txt --wheels dist

# Not mkdocs --quiet, which drops the warnings that --strict is to count.
docs: $(STAMPS)/packages-dev ## the documentation as a site, build/site/index.html; warnings are errors
	@$(STEP) "documentation" --quiet -- env NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

gpu-check: ## on a machine with an NVIDIA GPU: tests, compute-sanitizer and benchmarks on it
	@PYTHON=$(PYTHON) bash scripts/gpu_check.sh

clean: ## remove the environment and everything built
	@$(OWN_VENV)
	rm -rf $(VENV) build dist .cache *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find orthoreg_ext -name '*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
