# Every target does all the set-up it needs in .venv. Python 3.10 or newer, git and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch and torchvision come in matching pairs; this is the pair that the tests run with.
TORCH ?= torch==2.13.0 torchvision==0.28.0
PROMPT ?= a red apple
MODEL ?= weights/emoji

.PHONY: sample test test-avx2 test-slow test-web test-docs docs lint learn paper clean

$(BIN)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

sample: $(BIN)/.ready
	$(BIN)/python sample.py text "$(PROMPT)" --model $(MODEL) --out out

# In as many processes as there are cores, one thread each.
test: $(BIN)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

# What computes in bf16, on a CPU that has no units for it, or is told so.
test-avx2: $(BIN)/.ready
	OMP_NUM_THREADS=1 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 \
	$(BIN)/python -m pytest -n auto -m "bf16 and not slow"

test-slow: $(BIN)/.ready
	$(BIN)/python -m pytest -m slow

# The pages build without a warning, plans are as shown, the notebooks run on the shipped model.
test-docs: $(BIN)/.docs
	$(BIN)/python -m pytest -m docs

docs: $(BIN)/.docs
	$(BIN)/python -m sphinx -qW --keep-going docs docs/_build

$(BIN)/.docs: $(BIN)/.ready
	$(BIN)/pip install --quiet --editable ".[docs]"
	touch $@

# The web page in a real Chromium (`apt-get install chromium`, or any Chrome); without one it is
# skipped. With SCREENSHOTS=docs the pictures of the docs are made anew.
test-web: $(BIN)/.ready
	$(BIN)/pip install --quiet "playwright>=1.50"
	$(BIN)/python -m pytest -n 0 -rs -m web tests/test_web.py

lint: $(BIN)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

learn: $(BIN)/.ready
	$(BIN)/python train/learn.py

# docs/paper.md's commands, those that the present weights have not run yet; one core, half an hour.
paper: $(BIN)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/paper.py

clean:
	rm -rf $(VENV) runs out docs/_build .pytest_cache .ruff_cache .mypy_cache
