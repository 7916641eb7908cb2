"""What checkpoints cost the digits run: the run of `configs/digits.py` with its saves and without them, in turns.

    python benchmarks/checkpoints.py [--rounds 3] [any flag of train.py, such as --epochs 10]

Wall and CPU seconds of a run are those after its first step, which compiles, to its end; everything else about
checkpoints, their first one's compilation among it, is counted. Each run is a process of its own. The cost of a single
save is measured alone, in one more process, by saves of that run's state one after another, each waited for.
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
    arguments.add_argument("--child", choices=("with saves", "without", "alone"), help=argparse.SUPPRESS)
    given, flags = arguments.parse_known_args()
    if given.child:
        sys.path.insert(0, str(ROOT))
        print(json.dumps(alone(flags) if given.child == "alone" else run(flags, saves=given.child == "with saves")))
        return
    rounds = [{kind: child(kind, flags) for kind in ("with saves", "without")} for _ in range(given.rounds)]
    print("| after the first step | with saves | without | with over without |")
    print("|---|---|---|---|")
    for clock in ("wall", "cpu"):
        both = [[turn[kind][clock] for turn in rounds] for kind in ("with saves", "without")]
        ratios = [with_saves / without for with_saves, without in zip(*both, strict=True)]
        print(f"| {clock}, s | {spread(both[0], 1)} | {spread(both[1], 1)} | {spread(ratios, 3)} |")
    saves = len(rounds[0]["with saves"]["waits"])
    waits = [turn["with saves"]["waits"] for turn in rounds]
    shares = [100 * sum(each) / turn["with saves"]["wall"] for each, turn in zip(waits, rounds, strict=True)]
    one = child("alone", flags)
    print(
        f"\n{saves} saves in a run; the steps wait {spread(1e3 * wait for each in waits for wait in each)} ms for one, "
        f"{spread(shares, 1)} % of the run's wall in all"
    )
    print(
        f"one save alone: {spread(one['wall'])} ms of wall, {spread(one['cpu'])} ms of CPU; "
        f"the first, with compilation, {one['first wall']:.0f} and {one['first cpu']:.0f} ms; "
        f"{one['bytes']:,} bytes in {one['files']} files"
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

    began, waits = [], []
    take_step, save = loop.Run.train_step, loop.Checkpoints.save

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

    loop.Run.train_step = timed_step
    loop.Checkpoints.save = timed_save if saves else lambda *_: None
    loop._conclude = lambda *_: {}  # reads the scores from the last checkpoint
    loop.train(training_config(["--config", str(ROOT / "configs/digits.py"), *flags]))
    return {
        "wall": time.perf_counter() - began[0],
        "cpu": time.process_time() - began[1],
        "waits": waits,
    }


def alone(flags: list[str]) -> dict:
    """Milliseconds of a save, from the call until all is on the disk, and what it leaves there."""
    import contextlib

    import jax

    from tnt_jax.commands.cli import training_config
    from tnt_jax.storage.checkpoint import BEST_METRIC, Checkpoints
    from tnt_jax.training.loop import Run, saved_trees

    config = training_config(["--config", str(ROOT / "configs/digits.py"), *flags])
    run, walls, cpus = Run(config), [], []
    state = run.initial_state()
    # One step, after which no average of gradients is zero and none is small when compressed.
    state, _ = run.train_step(state, next(run.batches(0)))
    jax.block_until_ready(state)
    with contextlib.closing(Checkpoints(config.run_dir, keep=config.keep_checkpoints)) as checkpoints:
        for step in range(SAVES_ALONE + 1):
            wall, cpu = time.perf_counter(), time.process_time()
            checkpoints.save(step, saved_trees(state), {BEST_METRIC: 0.0})
            checkpoints.wait()
            walls.append((time.perf_counter() - wall) * 1e3)
            cpus.append((time.process_time() - cpu) * 1e3)
    last = pathlib.Path(config.run_dir) / "checkpoints" / str(SAVES_ALONE)
    files = [path for path in last.rglob("*") if path.is_file()]
    return {
        "first wall": walls.pop(0),
        "first cpu": cpus.pop(0),
        "wall": walls,
        "cpu": cpus,
        "bytes": sum(path.stat().st_size for path in files),
        "files": len(files),
    }


def spread(values: Iterable[float], digits: int = 0) -> str:
    values = list(values)
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
