# Each command sets up what it needs in .venv. Set PYTHON for another interpreter (3.11 or newer).
#   make train [ARGS="key=value ..."]     trains on the built-in text
#   make test  [ARGS="..."]               runs the tests, two files at a time: many wait more than they compute
#   make fast  [ARGS="..."]               runs those that launch no real training, on all cores: about two minutes on two
#   make types                            checks types
#   make docs                             builds the site into build/site
PYTHON ?= python3
# Relative, because a name with a space in it is two names to make. PATH has it whole: recipes run this environment's.
VENV := .venv
SHELL := /bin/bash
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: train test fast types docs

train: $(VENV)/train.installed
	@echo "+ python launch.py deepspeed run_pretrain.py args.json $(ARGS)"
	@python launch.py deepspeed run_pretrain.py args.json $(ARGS) ; exit $$?

test: $(VENV)/test.installed
	@echo "+ pytest -n 2 --dist loadfile $(ARGS)"
	@python -m pytest -n 2 --dist loadfile $(ARGS) ; exit $$?

fast: $(VENV)/test.installed
	@echo "+ pytest -m 'not slow' -n auto --dist loadfile $(ARGS)"
	@python -m pytest -m 'not slow' -n auto --dist loadfile $(ARGS) ; exit $$?

types: $(VENV)/types.installed
	@mkdir -p $(VENV)/types && ln -sfn ../.. $(VENV)/types/smolpretrain
	@echo "+ pyright"
	@pyright --pythonpath "$$(command -v $(PYTHON))"

docs: $(VENV)/docs.installed
	@echo "+ mkdocs build --strict"
	@python -m mkdocs build --strict

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/train.installed: setup.cfg pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "+ pip install -c constraints.txt -e ."
	@python -m pip install -c constraints.txt -e . && touch $@

$(VENV)/test.installed: setup.cfg pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "+ pip install -c constraints.txt -e '.[test]'"
	@python -m pip install -c constraints.txt -e '.[test]' && touch $@

$(VENV)/docs.installed: setup.cfg pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "+ pip install -c constraints.txt mkdocs-material"
	@python -m pip install -c constraints.txt mkdocs-material && touch $@

$(VENV)/types.installed: setup.cfg pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "+ pip install -c constraints.txt pyright"
	@python -m pip install -c constraints.txt pyright && touch $@
