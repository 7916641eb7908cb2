"""For all tests: what is compiled here runs for a moment, so it is compiled quickly, and not kept."""

import os

flags = os.environ.get("XLA_FLAGS", "")
if "xla_backend_optimization_level" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

if os.environ.get("CHECK_SHAPES"):  # `make shapes`: every annotated shape is checked in every call
    from jaxtyping import install_import_hook

    install_import_hook(["tnt_jax.models", "tnt_jax.data", "tnt_jax.training"], "shapes.checked")


def pytest_collection_modifyitems(items):
    """The longest first: of two workers, none is left with a test of a minute at the end."""
    items.sort(key=lambda item: "tests/training" not in item.nodeid)
