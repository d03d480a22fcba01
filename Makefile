# make train [ARGS="--config.train.steps=200"]   sets up .venv and trains MNIST
# make test | make test-fast                     all tests | without the slow ones
# make lint                                      ruff
# make bench [ARGS=--quick]                      mptrain beside its peers, into benchmarks/RESULTS.md, in an hour (6 minutes)
# make bench-torch                               PyTorch and Lightning for it, in a Python of their own
PYTHON ?= python3
CONFIG ?= configs/mnist.py
ARGS ?=
BIN = .venv/bin
THREE = -n 3 --dist worksteal  # on two cores: a third of a test's time it waits for a process

.PHONY: train test test-fast lint setup bench bench-torch

train: .venv/.installed
	$(BIN)/python -m mptrain.main --config=$(CONFIG) $(ARGS)

test: .venv/.installed-test
	$(BIN)/python -m pytest $(THREE) $(ARGS)

test-fast: .venv/.installed-test
	$(BIN)/python -m pytest -m "not slow" $(THREE) $(ARGS)

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/.installed
	$(BIN)/python -m benchmarks $(ARGS)

bench-torch: .venv-bench/.installed

setup: .venv/.installed-test

.venv/.installed: requirements.txt requirements-orbit.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else f"Python {v[0]}.{v[1]} is not supported: add PYTHON=python3.12, or any from 3.10 to 3.13")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-orbit.txt
	touch $@

.venv/.installed-test: .venv/.installed requirements-test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

.venv-bench/.installed: benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
	touch $@
