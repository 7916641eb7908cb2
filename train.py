"""Trains a model: `python train.py [--config configs/NAME.py] [--FIELD VALUE ...]`. `--help` lists the fields."""

from tnt_jax.commands.train import main

if __name__ == "__main__":
    main()
