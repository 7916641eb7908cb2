"""For all tests: four devices, and one folder of compiled programs that worker processes and commands share."""

import atexit
import ctypes
import gc
import importlib.metadata
import os
import pathlib
import re
import shutil
import tempfile
import types

import pytest

# Three workers share two cores, which the threads of a library would burn by waiting for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Users run on several devices; DEVICES=3 is the second leg. What is compiled here runs for a moment: it is compiled
# quickly.
flags = os.environ.get("XLA_FLAGS", "")
if "xla_backend_optimization_level" not in flags:
    devices = os.environ.get("DEVICES", "4")
    flags += f" --xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}"
    flags += " --xla_cpu_multi_thread_eigen=false"
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # JAX 0.12 does not know the flag, and ends
        flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = flags
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="tnt_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

if os.environ.get("CHECK_SHAPES"):  # `make check`: every annotated shape is checked in every call
    from jaxtyping import install_import_hook

    # What reads images is given anything, and says itself what is none.
    data = [path.stem for path in (pathlib.Path(__file__).parent.parent / "tnt_jax/data").rglob("*.py")]
    checked = [f"tnt_jax.data.{name}" for name in data if name not in ("__init__", "crop", "decode")]
    install_import_hook(["tnt_jax.models", "tnt_jax.tasks", "tnt_jax.training", *checked], "shapes.checked")


PEERS = re.compile(r"^(import|from) (torch|torch_files|others|mutations|state_dicts|cuda_in_c)\b", re.M)


def pytest_addoption(parser):
    parser.addoption(
        "--peers",
        action="store_true",
        help="also what compares with PyTorch, timm, transformers, or compiles for GPUs",
    )


def pytest_ignore_collect(collection_path, config):
    """Files that need PyTorch or NVRTC, whose builds are gigabytes. `.ci/run` runs all; golden records stay."""
    if collection_path.suffix == ".py" and not config.getoption("--peers"):
        return True if PEERS.search(collection_path.read_text()) else None
    return None


OVER_DEVICES = (
    "tests/evaluation/",
    "tests/visualize/",
    "tests/training/",
    "tests/test_inference.py",
    "tests/test_demo.py",
)
"""What runs on all devices without a word of the user's. The others are on one, where kernels need no mesh."""


def pytest_runtest_setup(item):
    import jax

    alone = not item.nodeid.startswith(OVER_DEVICES)
    jax.config.update("jax_default_device", jax.devices()[0] if alone else None)


MEMORY = 2 * 10**9
"""Bytes from which on a worker forgets the programs that it has loaded, which are more than all else."""


@pytest.hookimpl(trylast=True)  # after what a test has patched is as it was
def pytest_runtest_teardown(item, nextitem):
    if resident() > MEMORY:
        import jax

        jax.clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what glibc keeps of it is half of all


def resident() -> int:
    """Bytes in memory, where Linux says it."""
    statm = pathlib.Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


@pytest.fixture
def on_platform(monkeypatch):
    """A function after which programs are traced for a device of another platform, which is not here."""
    from tnt_jax.models.formulations import devices

    def trace_for(platform, device_kind="a kind", **properties):
        device = types.SimpleNamespace(platform=platform, device_kind=device_kind, **properties)
        monkeypatch.setattr(devices, "traced_device", lambda: device)

    return trace_for


def pytest_collection_modifyitems(items):
    """The longest first: of two workers, none is left with a test of a minute at the end."""
    items.sort(key=lambda item: "tests/training" not in item.nodeid)


CHROMIUM = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--window-size=1400,1500",
)  # fmt: skip


@pytest.fixture
def browser(tmp_path):
    """Chromium without a screen, and without what it asks the network for by itself."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*CHROMIUM, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()
