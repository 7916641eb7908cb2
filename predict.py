"""Names what images show: `python predict.py MODEL IMAGE_OR_FOLDER ... [--format table|csv|jsonl]`."""

from tnt_jax.commands.predict import main

if __name__ == "__main__":
    main()
