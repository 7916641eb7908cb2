"""The parts that commands share: the configuration that flags choose and change, and errors as messages."""

import dataclasses
import functools
import itertools
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro

import tnt_jax
from tnt_jax.commands.process import (
    notes_on_stderr,
    of_accelerator,
    quiet_orbax,
    use_cpu_where_there_is_nothing_else,
)
from tnt_jax.config import DataConfig, InputError, LossConfig, ModelChanges, TrainConfig
from tnt_jax.tasks.table import TASKS

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
"""A flag without its contrary, --no-FLAG."""
PACKAGE = Path(tnt_jax.__file__).parent


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The configuration of a run, which the other flags change."""

    config: str = "digits"
    """A configuration of this project by its name, a file like those in configs/, or the folder of a run."""
    smoke: Flag = False
    """Shrink the run to a minute, to see whether it holds together."""


CALLED = {
    "--optimizer.learning-rate": ("--lr", "--learning-rate"),
    "--optimizer.weight-decay": ("--weight-decay", "--wd"),
    "--optimizer.name": ("--opt", "--optimizer"),
    "--optimizer.warmup-epochs": ("--warmup-epochs",),
    "--optimizer.clip-norm": ("--clip-grad", "--max-grad-norm"),
    "--optimizer.ema-decay": ("--model-ema-decay", "--ema-decay"),
    "--loss.name binary_cross_entropy": ("--bce-loss",),
    "--batch-size": ("-b", "--batch", "--bs"),
    "--data.num-workers": ("-j", "--workers", "--num-workers"),
    "--data.label-smoothing": ("--smoothing", "--label-smoothing"),
    "--data.mixup": ("--mixup",),
    "--data.cutmix": ("--cutmix",),
    "--data.erasing": ("--reprob",),
    "--data.source folder:PATH": ("--data-dir", "--data-path", "--dataset"),
    "--model.name": ("--model", "--arch", "-a"),
    "--model.image-size HEIGHT WIDTH": ("--img-size", "--imgsz", "--input-size", "--image-size"),
    "--model.drop-path-rate": ("--drop-path",),
    "--model.dtype bfloat16": ("--amp", "--fp16", "--bf16"),
    "--init-from MODEL": ("--pretrained", "--finetune", "--checkpoint"),
    "--run-dir": ("--output", "--output-dir", "--out-dir", "--project"),
    "the same command again, which goes on by itself": ("--resume", "--auto-resume"),
    "JAX_PLATFORMS or CUDA_VISIBLE_DEVICES in the environment; all devices are taken": ("--device", "--gpu", "--gpus"),
}
"""The names that other tools give to a flag, by ours."""


def check_words(arguments: Sequence[str]) -> None:
    """Raises InputError for a flag of another tool, with what it is here."""
    for before, argument in itertools.pairwise(["", *arguments]):
        name = argument.partition("=")[0].replace("_", "-")
        for ours, theirs in CALLED.items():
            if name in theirs:
                raise InputError(f"{argument} is not a flag of this command; here it is {ours}")
        if before.replace("_", "-").endswith("image-size") and re.fullmatch(r"\d+x\d+", argument):
            height, width = argument.split("x")
            raise InputError(f"{argument} is no size here; write height and width as two numbers: {height} {width}")


def parse_with_config(kind: type, arguments: Sequence[str] | None = None) -> tuple:
    """The arguments of a command, an instance of `kind`, and the configuration that they choose and change.

    Args:
        kind: a dataclass with the field `config` of `Chosen`. Its docstring is the help of the command.
        arguments: by default those of this process.

    Raises:
        InputError: there is no such configuration.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    check_words(arguments)
    # The values of the configuration are the defaults of the flags, so it is read before they are.
    without_help = [argument for argument in arguments if argument not in ("-h", "--help")]
    chosen, _ = tyro.cli(kind, args=without_help, return_unknown_args=True, add_help=False)
    config = config_of(chosen.config)
    config = smoke(config) if getattr(chosen, "smoke", False) else config
    flags = Annotated[TrainConfig[ModelChanges], tyro.conf.arg(name="")]
    changed = ("changed", flags, dataclasses.field(default=config))
    given = tyro.cli(
        dataclasses.make_dataclass(kind.__name__, [changed], bases=(kind,), frozen=True),
        args=arguments,
        description=kind.__doc__,
    )
    return given, given.changed


def smoke(config: TrainConfig) -> TrainConfig:
    """The same run shrunk to a minute on a laptop: two blocks (one in each stage of a PyramidTNT, as narrow as in the
    smallest one), few patches, a few steps on noise of one class an image, or with masks, in a folder of its own.

    What it trains is worth nothing; that it trains shows that the configuration holds together.
    """
    from tnt_jax.data.opening import without_unused

    patch = config.model.patch_size or 16
    shrunk = {"image_size": 2 * patch, "depth": 2, "inner_blocks": None, "num_classes": None}
    if config.model.name.startswith("ptnt_"):
        shrunk |= {"depth": (1, 1, 1, 1), "inner_dim": (5, 10, 20, 20), "inner_heads": (1, 2, 4, 4)}
        shrunk |= {"outer_dim": (80, 160, 320, 320), "outer_heads": (2, 4, 8, 8)}
    return dataclasses.replace(
        config,
        run_dir=f"{config.run_dir}_smoke",
        init_from=None,
        model=dataclasses.replace(config.model, **shrunk),
        data=without_unused(
            dataclasses.replace(
                config.data,
                source="synthetic:512",
                task=config.data.task if TASKS[config.data.task].dense else DataConfig.task,
                sampling="natural",
                fold=None,
                holdout=0.0,
                train_split="train",
                eval_split=None,
                num_workers=0,
            )
        ),
        loss=LossConfig(),
        best_metric=None,
        optimizer=dataclasses.replace(config.optimizer, warmup_epochs=1, cooldown_epochs=0),
        batch_size=64,
        epochs=2,
        eval_every_epochs=1,
        log_every_steps=1,
    )


def training_config(arguments: Sequence[str]) -> TrainConfig[ModelChanges]:
    """The configuration that the flags of train.py choose and change."""
    return parse_with_config(Chosen, arguments)[1]


def config_of(name: str) -> TrainConfig[ModelChanges]:
    """The configuration that a file returns, that a shipped file of this name returns, or that of a run in a folder.

    Raises:
        InputError: there is no such file, or it returns none, or the folder holds no run.
    """
    path, shipped = Path(name), _shipped(name)
    if path.name == "config.json" and path.is_file():  # the file that a run leaves: the run is meant
        path = path.parent
    if path.is_dir() and not shipped:
        from tnt_jax.models.variants import as_changes
        from tnt_jax.storage.run import read_config

        config = read_config(path)
        return dataclasses.replace(config, model=as_changes(config.model))
    if not path.is_file() and not shipped:
        raise InputError(f"there is no configuration {name}; by name there are {', '.join(shipped_configs())}")
    file = path if path.is_file() else shipped
    get_config = runpy.run_path(str(file)).get("get_config")
    config = get_config() if callable(get_config) else None
    if not isinstance(config, TrainConfig):
        raise InputError(f"{file} has no function get_config() that returns a TrainConfig")
    return config


def _shipped(name: str) -> Path | None:
    """The shipped configuration that is called `NAME`, `NAME.py` or `configs/NAME.py`, None if there is none."""
    path = Path(name)
    beside = path.parent.name == "configs" and len(path.parts) == 2
    return shipped_configs().get(path.name.removesuffix(".py")) if beside or len(path.parts) == 1 else None


def shipped_configs() -> dict[str, Path]:
    """The configurations of this project by name: they lie in the package of a wheel, and beside it in a checkout."""
    folder = next(folder for folder in (PACKAGE / "configs", PACKAGE.parent / "configs") if folder.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def typed(script: str) -> str:
    """The command as this process's user types it: `python eval.py`, with the way to it, or `tnt-eval`."""
    given = Path(sys.argv[0])
    if given.suffix == ".py":
        return f"python {given.with_name(f'{script}.py')}"
    return f"tnt-{script.removesuffix('_torch_weights')}"


def command(main: Callable[[], None]) -> Callable[[], None]:
    """A command's `main`. An error that is meant for the user, which has an exit code, becomes one message."""

    @functools.wraps(main)
    def run() -> None:
        use_cpu_where_there_is_nothing_else()
        quiet_orbax()
        try:
            with notes_on_stderr():
                main()
        except KeyboardInterrupt:
            print("error: stopped by Ctrl-C", file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:  # who reads, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
            sys.exit(128 + signal.SIGPIPE)
        except Exception as error:
            message = error if hasattr(error, "exit_code") else of_accelerator(error)
            if message is None:
                raise
            print(f"error: {message}", file=sys.stderr)
            sys.exit(getattr(error, "exit_code", 1))

    return run
