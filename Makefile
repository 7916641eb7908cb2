# `make digits` and `make test` do all the set-up on a machine with Python 3.11 or newer; PYTHON=python3.13 chooses another one.
PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: digits test test-slow lint clean

digits: .venv/.installed
	.venv/bin/python train.py

test: .venv/.installed-dev lint
	.venv/bin/python -m pytest -n 2

test-slow: .venv/.installed-dev
	.venv/bin/python -m pytest -m slow

lint: .venv/.installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/.installed: pyproject.toml requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tnt_jax needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.11 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	@touch $@

.venv/.installed-dev: .venv/.installed requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
