"""What words are worth: a TNT beside the same network without inner transformers.

    apt-get install dataset-fashion-mnist
    python benchmarks/words.py [--data marks fashion_mnist] [--seeds 0 1 2] [--out words.jsonl]

Without inner transformers the words of a patch are embedded, joined to its sentence once, and never talk. That network
is made as wide as it takes to have as many parameters as the TNT, and once more as wide as it takes to have as many
multiply-accumulates: one width cannot give both, because an inner transformer uses its few parameters for every word.
Everything else is the same: epochs, learning rate, images, their order. A network is trained once with each seed; a
line of JSON is written as soon as one is done, and lines that a file has already are not computed again.

"marks" are generated: noise of 32 x 32 pixels with one of 15 marks of 4 x 4 at any place, which alone tells the class.
Fashion-MNIST has 28 x 28 pixels, resized to 32 x 32.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

import scipy.stats
from marks import balanced_marks, marked_images, write_idx

from tnt_jax.config import ModelConfig
from tnt_jax.models.summary import count_macs, count_parameters
from tnt_jax.models.variants import model_config

ROOT = pathlib.Path(__file__).resolve().parents[1]
CLASSES = {"marks": 16, "fashion_mnist": 10}
EPOCHS = {"marks": 20, "fashion_mnist": 3}
SIZES = {
    "image_size": 32,
    "in_channels": 1,
    "patch_size": 8,
    "word_stride": 2,
    "depth": 3,
    "inner_dim": 12,
    "inner_heads": 2,
    "outer_dim": 64,
    "outer_heads": 2,
    "drop_path_rate": 0.0,
}
WIDTHS = range(32, 193, 4)
FLAGS = (
    *("--batch_size", "64", "--optimizer.learning_rate", "2e-3", "--optimizer.warmup_epochs", "1"),
    *("--optimizer.ema_decay", "0.99", "--data.mixup", "0", "--data.random_shift", "0"),
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", nargs="+", choices=CLASSES, default=list(CLASSES))
    arguments.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    arguments.add_argument("--fashion-mnist", default="/usr/share/datasets/fashion-mnist", metavar="FOLDER")
    arguments.add_argument("--out", type=pathlib.Path, default=pathlib.Path("words.jsonl"))
    given = arguments.parse_args()
    done = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        for seed in given.seeds:
            for data in given.data:
                source = f"idx:{given.fashion_mnist if data == 'fashion_mnist' else marks(pathlib.Path(folder))}"
                for name, changes in networks(CLASSES[data]).items():
                    run = {"data": data, "network": name, "seed": seed, **changes, "epochs": EPOCHS[data]}
                    if any(run.items() <= each.items() for each in done):
                        continue
                    accuracy = trained(source, changes, EPOCHS[data], seed, pathlib.Path(folder, f"run{len(done)}"))
                    done.append(run | {"accuracy": accuracy})
                    with given.out.open("a") as file:
                        file.write(json.dumps(done[-1]) + "\n")
    print(table(done, given.data))


def marks(folder: pathlib.Path) -> pathlib.Path:
    """4,000 images for training and 2,000 for testing, written where `idx:` reads them."""
    to = folder / "marks"
    if not to.exists():
        to.mkdir()
        kinds = balanced_marks(CLASSES["marks"] - 1)
        write_idx(to, *(marked_images(count, count, kinds, anywhere=True)[:2] for count in (4_000, 2_000)))
    return to


def config_of(classes: int, **changes) -> ModelConfig:
    return model_config("tnt_ti_patch16_224", **SIZES | {"num_classes": classes} | changes)


def networks(classes: int) -> dict[str, dict]:
    """What each network changes of the TNT."""
    tnt = config_of(classes)
    found = {"TNT": {}}
    for name, count in {"parameters": parameters, "multiply-accumulates": macs}.items():
        width = min(WIDTHS, key=lambda width: abs(count(without_words(classes, width)) - count(tnt)))
        found[f"no inner transformers, same {name}"] = {"outer_dim": width, "inner_blocks": []}
    return found


def without_words(classes: int, width: int) -> ModelConfig:
    return config_of(classes, outer_dim=width, inner_blocks=())


def parameters(config: ModelConfig) -> int:
    return sum(count_parameters(config).values())


def macs(config: ModelConfig) -> int:
    return sum(count_macs(config).values())


def trained(source: str, changes: dict, epochs: int, seed: int, run_dir: pathlib.Path) -> float:
    """The share of the test images that a network classifies right after its last epoch, with averaged weights."""
    model = [flag for name, value in (SIZES | changes).items() for flag in (f"--model.{name}", *words_of(value))]
    command = [sys.executable, ROOT / "train.py", "--run_dir", run_dir, "--data.source", source]
    command += ["--epochs", str(epochs), "--eval_every_epochs", str(epochs), "--seed", str(seed), *FLAGS, *model]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["ema_top1"]


def words_of(value: object) -> list[str]:
    """A value as the command line takes it."""
    return [str(each) for each in value] if isinstance(value, list) else [str(value)]


def table(done: list[dict], data: list[str]) -> str:
    """A row for each network: mean accuracy over the seeds with its 95% interval, and the difference to the TNT."""
    lines = ["| data | network | width | parameters | million MACs | accuracy | less than the TNT |", "|---" * 7 + "|"]
    for name in data:
        rows = [each for each in done if each["data"] == name]
        tnt = {each["seed"]: each["accuracy"] for each in rows if each["network"] == "TNT"}
        for network, changes in networks(CLASSES[name]).items():
            of_network = {each["seed"]: each["accuracy"] for each in rows if each["network"] == network}
            config = config_of(CLASSES[name], **changes | ({"inner_blocks": ()} if changes else {}))
            lost = [tnt[seed] - of_network[seed] for seed in tnt.keys() & of_network.keys()]
            size = f"{config.outer_dim} | {parameters(config):,} | {macs(config) / 1e6:.2f}"
            accuracy, difference = interval(list(of_network.values()), 0.0), interval(lost, -1.0)
            lines.append(f"| {name} | {network} | {size} | {accuracy} | {difference if network != 'TNT' else ''} |")
    return "\n".join(lines)


def interval(shares: list[float], least: float) -> str:
    """Mean and 95% interval (Student's t) of a few seeds, in percent; nothing lies outside of `least` and 1."""
    mean = statistics.mean(shares)
    if len(shares) < 2:
        return f"{100 * mean:.2f}"
    half = scipy.stats.t.ppf(0.975, len(shares) - 1) * statistics.stdev(shares) / len(shares) ** 0.5
    return f"{100 * mean:.2f} ({100 * max(mean - half, least):.2f} to {100 * min(mean + half, 1):.2f})"


if __name__ == "__main__":
    main()
