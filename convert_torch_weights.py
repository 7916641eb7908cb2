"""Takes PyTorch weights of TNT in any published layout, and gives them back in any."""

from tnt_jax.commands.convert import main

if __name__ == "__main__":
    main()
