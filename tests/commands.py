"""Runs a command of the project in this process, as a shell would."""

import contextlib
import io
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(script, *arguments):
    """Exit code, standard output and standard error of `python SCRIPT ARGUMENTS`."""
    out, err, code, argv = io.StringIO(), io.StringIO(), 0, sys.argv
    sys.argv = [script, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as exit_:
        code = exit_.code
    finally:
        sys.argv = argv
    return code, out.getvalue(), err.getvalue()
