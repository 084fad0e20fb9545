# make demo     set up, then pre-train, fuse and load the result on built-in images (minutes on two cores)
# make test     all tests;  make fast  those that take less than about two seconds each;  make slow  the others
# make docs     the documentation site, warnings are errors
# make oldest   the core tests with the oldest libraries that pyproject.toml allows;  make newest  with the newest
# make truth    draw 200 tiny runs and compare what they say with what they leave (nightly)
# make faults   kill a very small run 60 times and compare what comes out (ten minutes)
# make style    format and mend the code;  make quality  check it
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= outputs

.PHONY: demo test truth fast slow docs oldest newest faults style quality install
install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,docs]"
	touch $@

demo: install
	$(BIN)/hf-dbp demo $(OUT)
	$(BIN)/python -c "from transformers import ViTModel; \
	  print('stock:', type(ViTModel.from_pretrained('$(OUT)/demo-fused', add_pooling_layer=False)))"

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

fast: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow"

slow: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m slow

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir $(OUT)/site

oldest newest:
	.ci/versions $@

SEED ?= $(shell date +%s)
truth: install
	@echo "to draw the same runs again: make truth SEED=$(SEED)"
	OMP_NUM_THREADS=1 TRUTH_RUNS=200 TRUTH_SEED=$(SEED) $(BIN)/python -m pytest -q -n 0 tests/training/test_matrix.py

faults: install
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/faults.py --output $(OUT)/faults.json

style: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

quality: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini
