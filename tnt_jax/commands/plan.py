"""The plan of a run, `train.py --plan TOPOLOGY`: a process of its own, whose environment says which devices JAX has."""

import json
import os
import subprocess
import sys

from tnt_jax.commands.cli import command
from tnt_jax.config import ModelChanges, TrainConfig
from tnt_jax.storage.description import from_json, to_json


def plan(config: TrainConfig, topology: str) -> int:
    """Prints the plan of a run on `topology`, such as v5e:16x16 or cpu:8.

    Returns:
        The exit code of the process that did it.

    Raises:
        InputError: it is no topology, or libtpu is not installed.
    """
    from tnt_jax.planning.plan import environment_for

    child = subprocess.run(
        [sys.executable, "-m", "tnt_jax.commands.plan"],
        input=json.dumps({"config": to_json(config), "topology": topology}),
        text=True,
        env=os.environ | environment_for(topology),
        check=False,
    )
    return child.returncode


@command
def main() -> None:
    """The process that `plan` starts."""
    from tnt_jax.planning.plan import print_plan

    given = json.load(sys.stdin)
    print_plan(from_json(given["config"], TrainConfig[ModelChanges]), given["topology"])


if __name__ == "__main__":
    main()
