"""For all tests: what is compiled here runs for a moment, so it is compiled quickly, and not kept."""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
