# Each target works alone on a fresh clone: the first one builds .venv (Python 3.11 or newer).

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help demo test thorough check bench clean

help:
	@echo "make demo   train on a real data set, on all cores, and see the digest of the weights"
	@echo "make test   run the test suite"
	@echo "make thorough  let workers die at every moment, of which the suite takes a few (an hour)"
	@echo "make check  check formatting, lint and types"
	@echo "make bench  compare whole epochs and step times with DistributedDataParallel on this machine"
	@echo "make clean  remove .venv and caches"

demo: $(STAMP)
	@$(BIN)/unisono demo digits

# Two at a time, each in the order of its files: more would crowd tests that start several workers.
test: $(STAMP)
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal

thorough: $(STAMP)
	@UNISONO_THOROUGH=1 $(BIN)/python -m pytest -q -n 2 --timeout 3600 tests/training/test_recovery.py tests/training/test_records.py tests/replica/test_keras_replica.py

check: $(STAMP)
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy

bench: $(STAMP)
	@$(BIN)/python benchmarks/end_to_end.py
	@$(BIN)/python benchmarks/one_machine.py

clean:
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(STAMP): pyproject.toml constraints.txt
	@echo "Installing into .venv (minutes the first time: PyTorch is large) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev,demo,bench]'
	@touch $@
