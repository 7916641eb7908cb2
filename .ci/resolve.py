"""Whether every list of requirements and every extra has a solution on PyPI alone, for each Python and system.

uv reads no configuration of pip's, so wheels that lie on this machine's disk do not count.
"""

import concurrent.futures
import os
import subprocess
import sys
from pathlib import Path

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
LINUX, MACOS = "x86_64-manylinux_2_31", "aarch64-apple-darwin"
# The list for development has the other lists in it.
CASES = (
    (LINUX, ["requirements-dev.txt"]),
    (MACOS, ["requirements-dev.txt"]),
    (LINUX, ["pyproject.toml", "--all-extras"]),
)
UV = Path(sys.executable).with_name("uv")


def solve(case: tuple) -> str | None:
    """What has no solution, and why; None where there is one."""
    python, system, arguments = case
    command = [UV, "pip", "compile", "--quiet", "--no-config", "--no-header", "--python-version", python]
    # The oldest macOS that wheels are built for.
    environment = os.environ | {"MACOSX_DEPLOYMENT_TARGET": "14.0"}
    for name in ("UV_FIND_LINKS", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL"):
        environment.pop(name, None)
    command += ["--python-platform", system, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    what = f"Python {python}, {system}, {' '.join(arguments)}"
    return f"{what}: {done.stderr.strip()}" if done.returncode else None


cases = [(python, *case) for python in PYTHONS for case in CASES]
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    failures = [failure for failure in pool.map(solve, cases) if failure]
print("\n".join(failures) or f"every list and extra resolves on PyPI for Python {', '.join(PYTHONS)}")
sys.exit(bool(failures))
