# `make demo` and `make test` are all that a fresh machine needs: Python 3.10 or newer and a C++ compiler.
# On a Linux machine without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu makes the download small.

PYTHON ?= python3
PYTEST_ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

ENGINES_RUN_ON := sys_platform == 'linux' and platform_machine == 'x86_64' and python_version >= '3.11'

.DEFAULT_GOAL := help
.PHONY: help demo test lint format types clean

help:
	@echo "make demo     sample images with several cache plans, and compare their speed and error: the table and demo.png"
	@echo "make test     run the tests (PYTEST_ARGS='-k plan' chooses among them)"
	@echo "make lint     ruff: rules and formatting"
	@echo "make format   ruff: apply what it can"
	@echo "make types    mypy --strict on the built wheel"
	@echo "make clean    remove .venv and everything built"
	@echo "Each creates .venv first if it is missing. PYTHON=python3.12 chooses the interpreter."

demo: .venv/installed
	$(BIN)/tcc demo

# `pytest`, never `python -m pytest`: that puts the root on the path, and passes/ becomes importable twice.
# Every test uses one thread; two processes, each with whole files, take half the time.
test: .venv/installed .venv/engines
	$(BIN)/pytest --numprocesses 2 --dist loadfile $(PYTEST_ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: .venv/installed
	.ci/types

clean:
	rm -rf .venv build dist *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache demo.png
	find tcc passes export tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# torch alone first: the pinned version decides which build is taken before another package can ask for one
.venv/installed: pyproject.toml constraints.txt
	@.ci/check-machine $(PYTHON)
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv: some minutes the first time"
	@$(PIP) torch
	@$(PIP) 'setuptools>=77'
	@$(PIP) --no-build-isolation --editable '.[test,diffusers,onnx]'
	@touch $@

# NVIDIA's parser and engine builder, 140 MB: tests build engines with it, without a GPU. Not on Python 3.10,
# whose last ONNX Runtime is too old for it
.venv/engines: .venv/installed
	@$(PIP) "onnxruntime-ep-nv-tensorrt-rtx-cu13; $(ENGINES_RUN_ON)"
	@touch $@
