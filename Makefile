# Two commands for a newcomer: `make train` and `make test`. Both set up .venv first, and again only when pyproject.toml changed.
PYTHON ?= python3
VENV := .venv
ARGS ?=
ITEM ?=

.PHONY: train test lint table reproduce clean

train: $(VENV)/.ready
	$(VENV)/bin/lba-train $(ARGS)

test: $(VENV)/.ready-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest -n auto --dist loadfile $(ARGS)

lint: $(VENV)/.ready-test
	$(VENV)/bin/ruff check .

# A table of the paper's index (experiments/PAPER_INDEX.md) out of committed records, and its runs from scratch: make table ITEM=digits_small
table: $(VENV)/.ready
	@$(VENV)/bin/lba-item table "$(ITEM)"

reproduce: $(VENV)/.ready
	$(VENV)/bin/lba-item reproduce "$(ITEM)" $(ARGS)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.ready-test: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/.ready

clean:
	rm -rf $(VENV) build dist
