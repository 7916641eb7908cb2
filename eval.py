"""How good models are: `python eval.py MODEL ... [--source SOURCE ...] [--probe knn linear]`, as table and files."""

from tnt_jax.commands.eval import main

if __name__ == "__main__":
    main()
