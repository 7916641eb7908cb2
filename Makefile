# `make digits` and `make test` do all the set-up on a machine with Python 3.11 or newer; PYTHON=python3.13 chooses another one.
PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: digits test test-slow test-gpu smoke shapes test-demo notebooks docs lint clean

digits: .venv/.installed
	.venv/bin/python train.py

test: .venv/.installed-dev lint
	.venv/bin/python -m pytest -n 2

# What a pod relies on: several processes, kernels at published size and on a mesh, exports of every family, 8 chips
# against 256, every configuration shrunk, the notebooks, the wheel.
test-slow: .venv/.installed-dev
	.venv/bin/python -m pytest -n 2 -m slow --durations=15 --ignore tests/test_notebooks.py

# Programs for NVIDIA GPUs that are not there. Their compiler is 257 MB, and its plugin for JAX complains in every process
# that may look for GPUs, so it has an environment of its own, which borrows the rest.
test-gpu: .venv-gpu/.installed
	JAX_PLATFORMS=cpu .venv-gpu/bin/python -m pytest -m gpu --durations=0 tests/planning/test_gpus.py

smoke: .venv/.installed-dev
	.venv/bin/python -m pytest -n 2 -m slow --durations=0 tests/test_configs.py

notebooks: .venv/.installed-dev
	.venv/bin/python -m pytest -m slow --durations=4 tests/test_notebooks.py

# The annotated shapes of models, data and training, checked in every call.
shapes: .venv/.installed-dev
	CHECK_SHAPES=1 .venv/bin/python -m pytest -n 2 tests/models tests/data tests/training/test_optimizer.py \
		tests/training/test_batch_norm.py tests/training/test_golden_training.py

# The documentation as a site, with warnings as errors.
docs: .venv/.installed-dev
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --quiet --strict --site-dir build/site

# Needs chromium, chromedriver (Debian: chromium-driver) and npm. Gradio asks for an older Pillow and works with ours, which comes after it.
test-demo: .venv-demo/.installed .venv/.installed-dev
	.venv/bin/python -m pytest -m demo tests/test_web_page.py
	.venv-demo/bin/python -m pytest -m demo tests/test_demo.py

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
	$(PIP) --no-deps jax2onnx==0.17.1
	@touch $@

.venv-gpu/.installed: .venv/.installed-dev
	$(PYTHON) -m venv .venv-gpu
	.venv/bin/python -c 'import site; print(site.getsitepackages()[0])' > \
		$$(.venv-gpu/bin/python -c 'import site; print(site.getsitepackages()[0])')/lent.pth
	.venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check -e '.[plan-gpu]'
	@touch $@

.venv-demo/.installed: pyproject.toml requirements.txt
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/python -m pip install --quiet --disable-pip-version-check gradio==6.31.0 'pytest>=9.2,<10' 'selenium>=4.30,<4.52'
	.venv-demo/bin/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

clean:
	rm -rf .venv .venv-gpu .venv-demo build *.egg-info .pytest_cache .ruff_cache
