# Two commands, each of which sets up what it needs in .venv. Set PYTHON for another interpreter (3.11 or newer).
#   make train [ARGS="key=value ..."]     trains on the built-in text
#   make test  [ARGS="..."]               runs the tests
PYTHON ?= python3
VENV := $(CURDIR)/.venv
SHELL := /bin/bash
export PATH := $(VENV)/bin:$(PATH)

.PHONY: train test

train: $(VENV)/train.installed
	@echo "+ python launch.py deepspeed run_pretrain.py args.json $(ARGS)"
	@python launch.py deepspeed run_pretrain.py args.json $(ARGS) ; exit $$?

test: $(VENV)/test.installed
	@echo "+ pytest $(ARGS)"
	@pytest $(ARGS) ; exit $$?

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/train.installed: setup.cfg pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "+ pip install -c constraints.txt -e ."
	@pip install -c constraints.txt -e . && touch $@

$(VENV)/test.installed: setup.cfg pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "+ pip install -c constraints.txt -e '.[test]'"
	@pip install -c constraints.txt -e '.[test]' && touch $@
