"""What checkpoints cost the digits run: the run of `configs/digits.py` with its saves and without them, in turns.

    python benchmarks/checkpoints.py [--rounds 3] [--unpacked] [any flag of train.py, such as --epochs 10]
    python benchmarks/checkpoints.py --rounds 0 --config imagenet_tnt_s --data.source synthetic:2000

Wall and CPU seconds of a run are those after its first step, which compiles, to its end; everything else about
checkpoints, their first one's compilation among it, is counted. Each run is a process of its own. The cost of a single
save is measured alone, in one more process, by saves of a state of that run's shapes one after another, each waited
for; with `--rounds 0` only that. `--unpacked` writes every array by itself.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable

ROOT = pathlib.Path(__file__).resolve().parents[1]
SAVES_ALONE = 30


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--unpacked", action="store_true")
    arguments.add_argument("--child", choices=("with saves", "without", "alone"), help=argparse.SUPPRESS)
    given, flags = arguments.parse_known_args()
    flags += [] if "--config" in flags else ["--config", "digits"]
    if given.child:
        sys.path.insert(0, str(ROOT))
        print(
            json.dumps(
                alone(flags, given.unpacked)
                if given.child == "alone"
                else run(flags, saves=given.child == "with saves")
            )
        )
        return
    unpacked = ["--unpacked"] if given.unpacked else []
    if given.rounds:
        compare(given.rounds, flags)
    one = child("alone", [*unpacked, *flags])
    print(
        f"one save alone: the steps wait {spread(one['wait'])} ms for it; {spread(one['wall'])} ms of wall and "
        f"{spread(one['cpu'])} ms of CPU until it is on the disk; the first, with compilation, {one['first wall']:.0f} "
        f"and {one['first cpu']:.0f} ms; {one['bytes']:,} bytes in {one['files']} files; {one['arrays']} arrays"
    )
    waited, computed = (100 * statistics.median(one[name]) / 600e3 for name in ("wait", "cpu"))
    print(f"every ten minutes: the steps wait {waited:.3f}% of the time, one processor is busy {computed:.3f}% of it")


def compare(count: int, flags: list[str]) -> None:
    """The run with its saves and without them, in turns."""
    rounds = [{kind: child(kind, flags) for kind in ("with saves", "without")} for _ in range(count)]
    print("| after the first step | with saves | without | with over without |")
    print("|---|---|---|---|")
    for clock in ("wall", "cpu"):
        both = [[turn[kind][clock] for turn in rounds] for kind in ("with saves", "without")]
        ratios = [with_saves / without for with_saves, without in zip(*both, strict=True)]
        print(f"| {clock}, s | {spread(both[0], 1)} | {spread(both[1], 1)} | {spread(ratios, 3)} |")
    saves = len(rounds[0]["with saves"]["waits"])
    waits = [turn["with saves"]["waits"] for turn in rounds]
    shares = [100 * sum(each) / turn["with saves"]["wall"] for each, turn in zip(waits, rounds, strict=True)]
    print(
        f"\n{saves} saves in a run; the steps wait {spread(1e3 * wait for each in waits for wait in each)} ms for one, "
        f"{spread(shares, 1)} % of the run's wall in all"
    )


def child(kind: str, flags: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--child", kind, "--run-dir", f"{folder}/run", *flags]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def run(flags: list[str], *, saves: bool) -> dict:
    """The run, and what it took after its first step."""
    from tnt_jax.commands.cli import training_config
    from tnt_jax.training import loop
    from tnt_jax.training.run import Run

    began, waits = [], []
    take_step, save = Run.train_step, loop.Checkpoints.save

    def timed_step(self, state, batch):
        state, metrics = take_step(self, state, batch)
        if not began:
            metrics["loss"].block_until_ready()
            began.extend((time.perf_counter(), time.process_time()))
        return state, metrics

    def timed_save(*arguments):
        before = time.perf_counter()
        save(*arguments)
        waits.append(time.perf_counter() - before)

    Run.train_step = timed_step
    loop.Checkpoints.save = timed_save if saves else lambda *_: None
    loop._conclude = lambda *_: {}  # names the best checkpoint
    loop.train(training_config(flags))
    return {
        "wall": time.perf_counter() - began[0],
        "cpu": time.process_time() - began[1],
        "waits": waits,
    }


def alone(flags: list[str], unpacked: bool) -> dict:
    """Milliseconds of a save, until the steps go on and until all is on the disk, and what it leaves there."""
    import contextlib

    import jax
    import numpy as np

    from tnt_jax.commands.cli import training_config
    from tnt_jax.storage import checkpoint
    from tnt_jax.training.run import Run, saved_trees

    if unpacked:
        pack = checkpoint.pack
        checkpoint.pack, checkpoint.LEAST_ALONE = (lambda tree: pack(tree, 0)), 0
    config = training_config(flags)
    run, chance = Run(config), np.random.default_rng(0)

    def noise(leaf: jax.ShapeDtypeStruct) -> jax.Array:  # as little compressible as what was trained
        return jax.device_put(chance.standard_normal(leaf.shape).astype(leaf.dtype), leaf.sharding)

    trees = jax.tree.map(noise, saved_trees(run.program.abstract_state))
    waits, walls, cpus = [], [], []
    saves = SAVES_ALONE if run.state_bytes() < 1e7 else 5
    with contextlib.closing(checkpoint.Checkpoints(config.run_dir, keep=config.keep_checkpoints)) as checkpoints:
        for step in range(saves + 1):
            wall, cpu = time.perf_counter(), time.process_time()
            checkpoints.save(step, trees)
            waits.append((time.perf_counter() - wall) * 1e3)
            checkpoints.wait()
            walls.append((time.perf_counter() - wall) * 1e3)
            cpus.append((time.process_time() - cpu) * 1e3)
    last = pathlib.Path(config.run_dir) / "checkpoints" / str(saves)
    files = [path for path in last.rglob("*") if path.is_file()]
    return {
        "first wall": walls.pop(0),
        "first cpu": cpus.pop(0),
        "wait": waits[1:],
        "wall": walls,
        "cpu": cpus,
        "bytes": sum(path.stat().st_size for path in files),
        "files": len(files),
        "arrays": sum(len(checkpoint.pack(tree)) for tree in trees.values()),
    }


def spread(values: Iterable[float], digits: int = 0) -> str:
    values = list(values)
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
