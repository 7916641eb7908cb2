"""A model for other runtimes: `python export.py MODEL --format stablehlo|onnx [--out FILE]`."""

from tnt_jax.commands.export import main

if __name__ == "__main__":
    main()
