# `make digits` and `make test` do all the set-up on a machine with Python 3.11 or newer; PYTHON=python3.13 chooses another one.
PYTHON ?= python3
# The Python of the newest JAX; `make install PYTHON=$(NEWEST)` is `make digits test` on it, in a folder of its own.
NEWEST ?= python3.13
# Modules are compiled when they are first imported, of PyTorch and transformers few; so Python has to keep what it compiles.
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE
# Three for two cores: tests of several processes and of servers wait half of their time.
PYTEST = .venv/bin/python -m pytest -n 3 --dist loadfile

.PHONY: digits test check nightly mutants resolve install test-gpu test-page test-demo docs lint clean

digits: .venv/.installed
	.venv/bin/python train.py

# What everybody runs: no PyTorch, no libtpu, no CUDA.
test: .venv/.installed-test lint
	$(PYTEST)

# All that protects a promise: also what compares with PyTorch, timm and transformers, several processes, kills, exports,
# recipes, notebooks; and of models and the published training the annotated shapes in every call.
CHECKED = tests/models/test_tnt.py tests/models/test_pyramid_tnt.py tests/models/test_layers.py \
	tests/data/test_mixing.py tests/training/test_optimizer.py tests/training/test_golden_training.py
CIRCLE = --peers -m "not nightly and not gpu and not demo"
check: .venv/.installed-dev lint
	$(PYTEST) $(CIRCLE) --durations=25 $(CHECKED:%=--ignore=%)
	CHECK_SHAPES=1 $(PYTEST) $(CIRCLE) $(CHECKED)

# What takes long and breaks rarely: every size of every kernel, whole recipes, the table of mutants, a second number of
# devices, Flax's coming default, programs for GPUs, and an installation from PyPI alone, of the oldest and newest JAX.
nightly: .venv/.installed-dev
	$(PYTEST) --peers -m nightly --durations=25
	DEVICES=3 $(PYTEST) tests/evaluation tests/visualize tests/test_inference.py
	NNX_GRAPH_MODE=false NNX_GRAPH_UPDATES=false $(PYTEST)
	$(MAKE) mutants test-gpu install
	$(MAKE) install PYTHON=$(NEWEST)

# Bugs of one line, planted one at a time: which do the tests of `make check` miss?
mutants: .venv/.installed-dev
	.venv/bin/python .ci/mutants.py

# Whether every list of requirements has a solution on PyPI alone, for each Python and system.
resolve: .venv/.installed-dev
	.venv/bin/python .ci/resolve.py

# Both commands of the README in an empty folder, whatever the machine's own pip is told.
install:
	rm -rf build/fresh && git clone --quiet . build/fresh
	cd build/fresh && time env -u PIP_FIND_LINKS -u PIP_CONSTRAINT PIP_CONFIG_FILE=/dev/null make digits test

# Programs for NVIDIA GPUs that are not there. Their compiler is 257 MB, and its plugin for JAX complains in every process
# that may look for GPUs, so it has an environment of its own, which borrows the rest.
test-gpu: .venv-gpu/.installed
	JAX_PLATFORMS=cpu .venv-gpu/bin/python -m pytest -m gpu --durations=0 tests/planning/test_gpus.py

# The documentation as a site, with warnings as errors.
docs: .venv/.installed-dev
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --quiet --strict --site-dir build/site

# Both need chromium and chromedriver (Debian: chromium-driver), the page of export.py npm as well.
test-page: .venv/.installed-dev
	.venv/bin/python -m pytest -m demo tests/test_web_page.py
test-demo: .venv-demo/.installed
	.venv-demo/bin/python -m pytest -m demo tests/test_demo.py

lint: .venv/.installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/.installed: pyproject.toml requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tnt_jax needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.11 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	@touch $@

.venv/.installed-test: .venv/.installed requirements-test.txt
	$(PIP) -r requirements-test.txt
	$(PIP) --no-deps jax2onnx==0.17.1
	@touch $@

.venv/.installed-dev: .venv/.installed-test requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	@touch $@

# Environments of their own borrow the rest.
LEND = $(PYTHON) -m venv $(@D) && .venv/bin/python -c 'import site; print(site.getsitepackages()[0])' > \
	$$($(@D)/bin/python -c 'import site; print(site.getsitepackages()[0])')/lent.pth
.venv-gpu/.installed: .venv/.installed-dev
	$(LEND)
	$(PIP:.venv/%=$(@D)/%) -e '.[plan-gpu]'
	@touch $@

# The package last: gradio asks for an older Pillow and works with ours.
.venv-demo/.installed: .venv/.installed-dev
	$(LEND)
	$(PIP:.venv/%=$(@D)/%) gradio==6.31.0
	$(PIP:.venv/%=$(@D)/%) -e .
	@touch $@

clean:
	rm -rf .venv .venv-gpu .venv-demo build *.egg-info .pytest_cache .ruff_cache
