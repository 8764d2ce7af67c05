# Every target does all the set-up it needs in .venv. Python 3.10 or newer, git and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch and torchvision come in matching pairs; this is the pair that the tests run with.
TORCH ?= torch==2.13.0 torchvision==0.28.0
PROMPT ?= a red apple
MODEL ?= weights/emoji

.PHONY: sample test test-slow lint learn clean

$(BIN)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

sample: $(BIN)/.ready
	$(BIN)/python sample.py text "$(PROMPT)" --model $(MODEL) --out out

test: $(BIN)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test-slow: $(BIN)/.ready
	$(BIN)/python -m pytest -m slow

lint: $(BIN)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

learn: $(BIN)/.ready
	$(BIN)/python train/learn.py

clean:
	rm -rf $(VENV) runs out .pytest_cache .ruff_cache .mypy_cache
