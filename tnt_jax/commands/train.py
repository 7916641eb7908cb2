"""Trains a model: `python train.py [--config NAME] [--FIELD VALUE ...]`. `--help` lists the fields."""

import dataclasses
import shlex
import sys
from typing import Annotated

import tyro

from tnt_jax.commands.cli import Chosen, command, parse_with_config, typed
from tnt_jax.training.signals import signals


@dataclasses.dataclass(frozen=True)
class Arguments(Chosen):
    """Trains what --config describes; every other flag changes one of its fields."""

    plan: str | None = None
    """Train nothing, but say whether the run fits on chips that are not here: TPUs as v5e:16x16, GPUs as h100:8 or
    h100:4x8 (hosts x GPUs), or processors as cpu:8."""
    sweep: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FIELD=VALUE,VALUE ...")] = ()
    """Train every combination of these values, one after the other, in folders below --run-dir, and list them."""


@command
def main() -> None:
    with signals():  # from here on, not only when JAX has been imported
        given, config = parse_with_config(Arguments)
        if given.sweep:
            from tnt_jax.commands.sweep import sweep, without_sweep

            arguments = without_sweep(sys.argv[1:])
            sys.exit(sweep(arguments, given.sweep, lambda given: parse_with_config(Arguments, given)[1]))
        if given.plan:
            from tnt_jax.commands.plan import plan

            sys.exit(plan(config, given.plan))
        import jax

        from tnt_jax.commands.process import keep_memory, use_compilation_cache
        from tnt_jax.training.loop import train

        keep_memory()
        use_compilation_cache()
        train(config)
        if jax.process_index() == 0:
            run = shlex.quote(config.run_dir)
            print(f"Next:\n  {typed('eval')} {run}\n  {typed('predict')} {run} IMAGE")
