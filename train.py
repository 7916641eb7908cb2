"""Trains a model: `python train.py [--config configs/NAME.py] [--FIELD VALUE ...]`. `--help` lists the fields."""

from tnt_jax.cli import run_command, training_config


def main() -> None:
    config = training_config()
    from tnt_jax.training.loop import train

    train(config)


if __name__ == "__main__":
    run_command(main)
