"""Runs that differ in a few fields, one after the other: `python train.py --sweep seed=0,1`."""

import itertools
import subprocess
import sys
from collections.abc import Callable, Sequence

from tnt_jax.config import InputError, TrainConfig, check

TRAIN = "from tnt_jax.commands.train import main; main()"


def sweep(arguments: Sequence[str], fields: Sequence[str], configure: Callable[[Sequence[str]], TrainConfig]) -> int:
    """Trains every combination in a folder of its own below the run's, and lists them.

    What is finished is not trained again, so the same command goes on where it stopped.

    Args:
        arguments: of train.py, without the sweep.
        fields: such as `seed=0,1`.
        configure: the configuration of some arguments.

    Returns:
        The exit code of the first run that failed, after which no other is started; 0 where none did.

    Raises:
        InputError: a field or a value means nothing. No run was started.
    """
    from tnt_jax.commands.runs import list_runs

    base = configure(arguments).run_dir
    runs = {}
    for chosen in itertools.product(*map(_choices, fields)):
        name = ",".join(f"{field}={value}" for field, value in chosen)
        flags = [part for field, value in chosen for part in (f"--{field.replace('_', '-')}", value)]
        runs[name] = [*arguments, *flags, "--run-dir", f"{base}/{name}"]
    for given in runs.values():
        check(configure(given))
    for number, (name, given) in enumerate(runs.items(), 1):
        print(f"Run {number} of {len(runs)}: {name}", flush=True)
        done = subprocess.run([sys.executable, "-c", TRAIN, *given])
        if done.returncode:
            print(f"error: {name} ended with {done.returncode}; the same command goes on from here", file=sys.stderr)
            return done.returncode
    list_runs(base)
    return 0


def _choices(field: str) -> list[tuple[str, str]]:
    name, separator, values = field.partition("=")
    if not (name and separator and values):
        raise InputError(f"--sweep was given {field!r}, which should be FIELD=VALUE,VALUE, such as seed=0,1")
    return [(name.lstrip("-"), value) for value in values.split(",")]


def without_sweep(arguments: Sequence[str]) -> list[str]:
    """The arguments without --sweep and its values."""
    kept, inside = [], False
    for argument in arguments:
        inside = argument == "--sweep" or (inside and not argument.startswith("--"))
        if not inside:
            kept.append(argument)
    return kept
