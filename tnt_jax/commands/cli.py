"""What the commands share: a configuration from a file and flags, and errors as messages."""

import argparse
import dataclasses
import functools
import pathlib
import runpy
import sys
from collections.abc import Callable, Sequence

import tyro

from tnt_jax.config import InputError, ModelChanges, TrainConfig, smoke

DEFAULT_CONFIG = "configs/digits.py"


def training_config(arguments: Sequence[str] | None = None) -> TrainConfig[ModelChanges]:
    """The configuration that `--config` names, shrunk if `--smoke` is there, changed by the other flags.

    Raises:
        InputError: the file is missing or returns no configuration.
    """
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", default=DEFAULT_CONFIG)
    files.add_argument("--smoke", action="store_true")
    chosen, rest = files.parse_known_args(arguments)
    config = config_of(chosen.config)
    return tyro.cli(
        TrainConfig[ModelChanges],
        default=smoke(config) if chosen.smoke else config,
        args=rest,
        prog="train.py [--config FILE] [--smoke] [--plan TOPOLOGY]",
        description=f"Trains what {chosen.config} describes; every flag changes one of its fields. "
        "--smoke shrinks the run to a minute, to see whether it holds together. --plan says whether it fits on "
        "v5e:16x16 or another TPU that is not here, or on cpu:8, and trains nothing.",
    )


def config_of(path: str) -> TrainConfig[ModelChanges]:
    """The configuration that a file in configs/ returns, or that of the training run in a folder.

    Raises:
        InputError: there is no such file, or it returns none, or the folder holds no run.
    """
    if pathlib.Path(path).is_dir():
        from tnt_jax.models.variants import changes_to
        from tnt_jax.storage.run import read_config

        config = read_config(path)
        return dataclasses.replace(config, model=changes_to(config.model))
    if not pathlib.Path(path).is_file():
        folder = pathlib.Path(path).parent
        raise InputError(f"there is no configuration file {path}; {folder}/ holds {_names(folder)}")
    get_config = runpy.run_path(path).get("get_config")
    config = get_config() if callable(get_config) else None
    if not isinstance(config, TrainConfig):
        raise InputError(f"{path} has no function get_config() that returns a TrainConfig")
    return config


def _names(folder: pathlib.Path) -> str:
    return ", ".join(sorted(path.name for path in folder.glob("*.py"))) or "no files"


def command(main: Callable[[], None]) -> Callable[[], None]:
    """A command's `main`. An error that is meant for the user, which has an exit code, is a message, no traceback."""

    @functools.wraps(main)
    def run() -> None:
        try:
            main()
        except KeyboardInterrupt:
            print("error: stopped by Ctrl-C", file=sys.stderr)
            sys.exit(130)
        except Exception as error:
            if not hasattr(error, "exit_code"):
                raise
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)

    return run
