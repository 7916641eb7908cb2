"""Masks with and without the words of a TNT: heads `mlp` and `mlp_words` on the scenes of digits.

    python benchmarks/word_detail.py [--seeds 0 1 2]

Each is `train.py --config digit_scenes --model.head HEAD --seed SEED`, then `eval.py` on the 300 test scenes: averaged
weights, with the interval over the images.
"""

import argparse
import pathlib
import tempfile

from trained import evaluated, python, trained


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = arguments.parse_args()
    print("| `--model.head` | seed | mIoU of the test scenes | processor minutes |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        python("benchmarks/scenes.py", f"{folder}/scenes")
        for seed in given.seeds:
            for head in ("mlp", "mlp_words"):
                run = pathlib.Path(folder, f"{head}{seed}")
                flags = ["--data.source", f"masks:{folder}/scenes", "--model.head", head]
                minutes = trained("digit_scenes", run, seed, flags)
                _, _, reached = evaluated(run, pathlib.Path(folder, "table.md"))
                print(f"| `{head}` | {seed} | {reached} | {minutes:.1f} |", flush=True)


if __name__ == "__main__":
    main()
