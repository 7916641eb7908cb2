"""A page to try a model in the browser: `python demo.py MODEL [--port 7860]`."""

from tnt_jax.commands.demo import main

if __name__ == "__main__":
    main()
