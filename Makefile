# Every target sets up what it needs and is quick when nothing changed.
#   make demo     the main job: a small Qwen3-MoE trained with and without moe_ext, with a plot
#   make test     the tests, under transformers 5 and under transformers 4
#   make lint     ruff, clang-format, mypy          make format   the first two, applied
#   make docs     the site of docs/, into build/site: warnings are errors
#   make build    the libraries, in place           make bench    forward and backward against transformers
#   make build-all  CUDA's too wherever nvcc is: demo and build leave them out on a machine without an NVIDIA driver
#   make gpu      tests, speed and profile on the GPU of this machine, into benchmarks/results; GPU_FLAGS, as --only speed
#   make gpu-status  what has run on a GPU, and whether it was today's CUDA sources
#   make gpu-counters  what the CUDA kernels move, counted on the simulated GPU (needs nvcc)
#   make gpusim-full   the kernels' tests on the simulated GPU in every mode: slow (needs nvcc)
#   make clean    removes what was built; make distclean also the environments
# Variables: PYTHON (the interpreter environments are made from), VENVS (where they go), MOE_EXT_CUDA, MAX_JOBS, and the others of setup.py.

PYTHON ?= python3
VENVS ?= .
VENV := $(VENVS)/.venv
VENV_TF4 := $(VENVS)/.venv-tf4
VENV_LINT := $(VENVS)/.venv-lint
VENV_DOCS := $(VENVS)/.venv-docs
ENVIRONMENT := $(PYTHON) -m build_tools.environment
CXX_SOURCES = $(shell find csrc examples tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
TESTS ?= tests
PYTEST_FLAGS ?= --timeout=900

.PHONY: demo test test-tf5 test-tf4 smoke lint format docs build build-all bench gpu gpu-status gpu-counters gpusim-full clean distclean lint-environment

# They share environments and build folders.
.NOTPARALLEL:

build:
	@$(ENVIRONMENT) $(VENV) --torch -r requirements/test.txt --build

build-all:
	@$(ENVIRONMENT) $(VENV) --torch -r requirements/test.txt --build --cuda

demo: build
	$(VENV)/bin/python -m moe_ext demo

test: test-tf5 test-tf4

test-tf5: build-all
	$(VENV)/bin/python -m pytest $(TESTS) $(PYTEST_FLAGS)

test-tf4: build-all
	@$(ENVIRONMENT) $(VENV_TF4) --torch -r requirements/test-tf4.txt --source-path
	$(VENV_TF4)/bin/python -m pytest $(TESTS) -m tf4 $(PYTEST_FLAGS)

smoke: build
	$(VENV)/bin/python -m tools.release_smoke $(VENVS)/.venv-releases --json docs/release-smoke.json --markdown docs/release-smoke.md

lint-environment:
	@$(ENVIRONMENT) $(VENV_LINT) -r requirements/lint.txt

lint: lint-environment
	$(VENV_LINT)/bin/ruff check .
	$(VENV_LINT)/bin/ruff format --check .
	$(VENV_LINT)/bin/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(VENV_LINT)/bin/mypy

format: lint-environment
	$(VENV_LINT)/bin/ruff check --fix .
	$(VENV_LINT)/bin/ruff format .
	$(VENV_LINT)/bin/clang-format -i $(CXX_SOURCES)

docs:
	@$(ENVIRONMENT) $(VENV_DOCS) -r requirements/docs.txt
	@NO_MKDOCS_2_WARNING=1 $(VENV_DOCS)/bin/mkdocs build --strict --quiet  # what the notice says is in docs/design.md
	@echo "wrote the site: build/site/index.html"

bench: build
	$(VENV)/bin/python -m benchmarks.bench_grouped_forward

gpu: build
	$(VENV)/bin/python -m benchmarks.gpu.run $(GPU_FLAGS)

gpu-status:
	@$(PYTHON) -m benchmarks.gpu.status

gpu-counters: build-all
	$(VENV)/bin/python -m tools.gpu_counters

gpusim-full: build-all
	GPUSIM_FULL=1 $(VENV)/bin/python -m pytest tests/gpusim $(PYTEST_FLAGS)

clean:
	rm -rf build dist *.egg-info moe_ext/*.so .mypy_cache .ruff_cache .pytest_cache

distclean: clean
	rm -rf $(VENV) $(VENV_TF4) $(VENV_LINT) $(VENV_DOCS)
