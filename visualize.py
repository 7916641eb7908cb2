"""Pictures of what a model does and of how a run went: `python visualize.py PICTURE MODEL [IMAGE ...] --out FILE`."""

from tnt_jax.commands.visualize import main

if __name__ == "__main__":
    main()
