"""Trains a model: `python train.py [--config configs/NAME.py] [--FIELD VALUE ...]`. `--help` lists the fields."""

import argparse
import sys

from tnt_jax.commands.cli import command, training_config
from tnt_jax.training.stopping import signals


@command
def main() -> None:
    arguments = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    arguments.add_argument("--plan")
    given, rest = arguments.parse_known_args()
    with signals():  # from here on, not only when JAX has been imported
        config = training_config(rest)
        if given.plan:
            from tnt_jax.commands.plan import plan

            sys.exit(plan(config, given.plan))
        from tnt_jax.training.loop import train

        train(config)
