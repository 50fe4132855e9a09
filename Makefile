# Two commands do everything on a machine with Python >= 3.10 and git: `make demo`, `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test slow lint format clean

demo: $(VENV)/core
	$(BIN)/slimdown demo

test: $(VENV)/dev
	$(BIN)/python -m pytest -m "not slow"

slow: $(VENV)/dev
	$(BIN)/python -m pytest

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Stamps: an environment is made once, and again when what it is made from changes.
$(VENV)/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "slimdown needs Python >= 3.10: make PYTHON=/path/to/python3.12 ..."; exit 4; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/core: $(VENV)/made pyproject.toml constraints.txt
	@echo "installing slimdown and PyTorch into $(VENV): some gigabytes on the first time"
	$(PIP) -e .
	@touch $@

$(VENV)/dev: $(VENV)/made pyproject.toml constraints.txt
	@echo "installing slimdown, PyTorch and the test tools into $(VENV): some gigabytes on the first time"
	$(PIP) -e '.[dev,openvino,timm,transformers,ultralytics]'
	@touch $@ $(VENV)/core

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
