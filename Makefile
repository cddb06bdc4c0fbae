# make quickstart    environment, model, data, then a short fine-tuning run
# make test          environment, then the tests that take up to some five seconds; make test-slow runs the others
# make lint          ruff and mypy
#
# PYTHON=python3.12            another interpreter, 3.10 or newer
# PIP_ARGS="..."               options for `pip install`. On Linux a plain install may bring torch with CUDA, several GB;
#                              pass --index-url or --find-links here to take another build of torch 2.13.0.
# CONSTRAINTS=                 install the newest versions pyproject.toml allows instead of the tested set
# WORKERS=2                    processes that run tests beside each other; 0: none but pytest's own, as a debugger needs it
# PYTEST_ARGS="..."            more options for pytest

PYTHON ?= python3
PIP_ARGS ?=
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2
PYTEST_ARGS ?=
QUICKSTART_DIR := quickstart_output

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

# The tests run several processes on few cores; one thread each keeps them from getting in each other's way.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

.DEFAULT_GOAL := help
.PHONY: help venv install quickstart test test-slow lint clean

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

venv install: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "error: $(PYTHON) is not Python 3.10 or newer; run: make PYTHON=/path/to/python3" >&2; exit 2; }
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS)) $(PIP_ARGS) -e '.[dev]'
	@touch $@

quickstart: $(STAMP)
	$(BIN)/python -m lrdint_tune.quickstart.prepare --output-dir $(QUICKSTART_DIR)
	$(BIN)/tune run lrdint_tune/full_finetune_distributed --config configs/quickstart.yaml
	@echo
	@echo "Curves: $(BIN)/tensorboard --logdir $(QUICKSTART_DIR)   then open http://localhost:6006"

test: $(STAMP)
	$(PYTEST) -m "not slow"

test-slow: $(STAMP)
	$(PYTEST) -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy $(wildcard lrdint_tune benchmarks)

# The quickstart's output stays: it holds a trained model.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
