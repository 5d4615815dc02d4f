# make train   a rank-learned adapter on a pretrained encoder and embedded data
# make test    the default test suite
# make check   style, types, and who may import whom
# The first call of any of them builds .venv with the tested versions of everything.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: train test check clean
.DELETE_ON_ERROR:

train: $(STAMP)
	$(BIN)/python -m autolora.train strategy=autolora task=mnli data.source=mini

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Builds run without isolation, on pinned tools: hatchling builds this package, setuptools Hydra's parser (no wheel exists).
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed, this is " + sys.version.split()[0] + \
		": make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt hatchling editables setuptools
	$(BIN)/python -m pip install --quiet --no-build-isolation --constraint constraints.txt --editable '.[minilm,dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find autolora tests experiments -name __pycache__ -prune -exec rm -rf {} +
