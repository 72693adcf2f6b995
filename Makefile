# Everything runs from .venv at the root, which `make` sets up by itself on first use. Needs Python 3.12, git and make.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_OUT ?= demo-out
PYTEST_ARGS ?=

# Several, because a `python3.12` on PATH may be a version manager's shim that does not run. Override with PYTHON=...
PYTHON_CANDIDATES := $(if $(PYTHON),$(PYTHON),python3.12 $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python3.12) python3)

# The pinned set decides alone what is installed. Bytecode saves 10 s of every process that imports Megatron Bridge.
unexport PIP_CONSTRAINT PIP_REQUIREMENT PIP_TARGET PIP_USER PYTHONDONTWRITEBYTECODE PYTHONHOME
unexport UV_BUILD_CONSTRAINT UV_CONSTRAINT UV_OVERRIDE UV_PROJECT_ENVIRONMENT UV_SYSTEM_PYTHON UV_TARGET VIRTUAL_ENV

UV := $(BIN)/uv --quiet
INSTALL := $(UV) pip install --python $(BIN)/python --no-deps
COMPILE := $(UV) pip compile --no-header --no-emit-index-url --no-emit-find-links --no-annotate --python-version 3.12 \
	pyproject.toml --override requirements/overrides.txt

.PHONY: help setup demo test lint format requirements clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo          set up, then train, resume, export and verify a small Falcon-H1 on this CPU'
	@echo 'make test          set up, then run the tests (PYTEST_ARGS="tests/unit -k name")'
	@echo 'make lint          set up, then check lint and format'
	@echo 'make format        set up, then fix lint and format'
	@echo 'make requirements  resolve requirements/*.txt anew (UPGRADE=--upgrade for newer versions)'
	@echo 'make clean         remove .venv and everything else that make wrote'
	@echo 'PYTHON=/path/to/python3.12 chooses the Python of .venv'

setup: $(STAMP)

$(STAMP): requirements/uv.txt requirements/dev.txt pyproject.toml
	@if ! { $(BIN)/python -c '' && $(BIN)/uv --version; } >/dev/null 2>&1; then \
		found=; \
		for python in $(PYTHON_CANDIDATES); do \
			"$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null || continue; \
			found="$$python"; break; \
		done; \
		if [ -z "$$found" ]; then \
			echo "falcon_bridge needs Python 3.12 with its venv module, and none of these is one that runs:" \
				"$(PYTHON_CANDIDATES). Install it, or name one: make PYTHON=/path/to/python3.12" >&2; \
			exit 1; \
		fi; \
		echo "Setting up $(VENV) with $$found"; \
		"$$found" -m venv --clear $(VENV); \
	fi
	@$(BIN)/uv --version >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/uv.txt
	@echo 'Installing the pinned requirements and falcon_bridge into $(VENV)'
	@$(INSTALL) -r requirements/uv.txt -r requirements/dev.txt
	@$(INSTALL) --no-build-isolation -e .
	@touch $@

demo: $(STAMP)
	$(BIN)/falcon-bridge demo --out $(DEMO_OUT) --force

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# dev.txt first: the others take its versions.
requirements: $(STAMP)
	$(COMPILE) --override requirements/overrides-cpu.txt $(UPGRADE) --extra recipes --extra dev -o requirements/dev.txt
	$(COMPILE) --override requirements/overrides-cpu.txt -c requirements/dev.txt -o requirements/cpu.txt
	$(COMPILE) -c requirements/dev.txt --extra recipes --extra gpu -o requirements/gpu.txt

clean:
	rm -rf $(VENV) $(DEMO_OUT) build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
