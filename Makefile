# Everything a developer runs, in a virtual environment of its own. POSIX make; `make` alone lists the targets.
.POSIX:

PYTHON ?= python3
VENV ?= .venv
# Extra arguments for pip and pytest, for example: make demo PIP_ARGS="--find-links /path/to/wheels"
PIP_ARGS ?=
PYTEST_ARGS ?=

BIN = $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt

.PHONY: help demo test test-slow lint types bench build clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -e 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.report ## train on synthetic volumes and write an HTML report to output/demo
	$(BIN)/python -m medconstraints demo

test: $(VENV)/.test ## run the default tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(VENV)/.test ## run the slow tests
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(VENV)/.test ## ruff: rules and format
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

# An install puts transforms/ inside the package (package_dir in setup.cfg), which mypy does not know. It gets a tree
# of links in which the package looks as it does once installed.
types: $(VENV)/.test ## mypy on medconstraints and transforms
	@rm -rf build/typecheck
	@mkdir -p build/typecheck/medconstraints
	@ln -s ../../../transforms build/typecheck/medconstraints/transforms
	@for entry in medconstraints/*; do ln -s "../../../$$entry" build/typecheck/medconstraints/; done
	$(BIN)/python -m mypy --cache-dir build/mypy_cache build/typecheck/medconstraints

bench: $(VENV)/.test ## run every script in benchmarks/
	@for script in benchmarks/box_*.py benchmarks/constraint_*.py benchmarks/boundary_*.py benchmarks/*_step.py benchmarks/inference_memory.py; do \
	  if test -f "$$script"; then echo "== $$script"; $(BIN)/python "$$script" || exit 1; fi; \
	done

build: $(VENV)/.test ## source archive and wheel in dist/
	$(BIN)/python -m build --no-isolation

clean: ## remove what the targets above made, except the virtual environment and output/
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: name an interpreter, make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, $(PYTHON) is `$(PYTHON) --version`: try make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments: install venv (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.report: $(VENV)/.created setup.cfg constraints.txt
	@echo "Installing into $(VENV) (minutes; torch alone is 1 GB, several with CUDA: see PIP_ARGS) ..."
	@$(PIP_INSTALL) -e '.[report]'
	@touch $@

$(VENV)/.test: $(VENV)/.created setup.cfg constraints.txt
	@echo "Installing into $(VENV) with the test tools (minutes; torch alone is 1 GB, several with CUDA: see PIP_ARGS) ..."
	@$(PIP_INSTALL) -e '.[report,test,itk,dicom]'
	@touch $@
