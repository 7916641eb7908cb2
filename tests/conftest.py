"""For all tests: what is compiled here runs for a moment, so it is compiled quickly."""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
