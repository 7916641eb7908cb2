"""A run that is killed again and again, and whose checkpoints are damaged: does it end as if nothing had happened?

    python benchmarks/faults.py [--kills 30] [--seed 0] [--folder FOLDER]

A digits run (`configs/digits.py`, smaller, a checkpoint after each of 60 epochs) is done once undisturbed. Then the
same run is started and killed with SIGKILL at random moments, while it starts, while it trains, and while a checkpoint
is written. It is started again each time until it ends; where that comes before the last kill, another run begins.
Then one byte of a newest checkpoint is flipped, and one file of another is cut off. Every run must end with bitwise the
parameters, the average of parameters, the optimizer and the history of metrics of the undisturbed one.

Exits with 1 if one did not.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMALL = {"depth": 1, "word-stride": 4, "inner-dim": 4, "outer-dim": 24, "outer-heads": 2}
RUN = ["--config", str(ROOT / "configs/digits.py"), "--batch-size", "128", "--epochs", "60"]
RUN += ["--eval-every-epochs", "1", "--log-every-steps", "1"]
RUN += [f"--model.{name}={value}" for name, value in SMALL.items()]
MOMENTS = ("starting", "training", "saving", "saving", "training")  # in turns
PATIENCE = 600  # seconds


class Process:
    """One start of the run, and what it has said."""

    def __init__(self, run_dir: pathlib.Path, cache: pathlib.Path):
        self.began = time.monotonic()
        self._run_dir, self._left = run_dir, unfinished(run_dir)
        environment = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PLATFORMS": "cpu"}
        self._process = subprocess.Popen(
            [sys.executable, "-u", str(ROOT / "train.py"), *RUN, "--run-dir", str(run_dir)],
            env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=lambda: self.lines.extend(iter(self._process.stdout.readline, "")))
        self._reader.start()

    def wait_until(self, condition) -> bool:
        """Whether it came true before the process ended."""
        while self._process.poll() is None:
            if condition():
                return True
            time.sleep(0.001)
        return False

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        code = self._process.wait(PATIENCE)
        self._reader.join()
        return code

    def is_saving(self) -> bool:
        """Whether a checkpoint of this process, none that another one left, is being written."""
        return not unfinished(self._run_dir) <= self._left

    def said(self, text: str) -> str | None:
        return next((line.strip() for line in list(self.lines) if text in line), None)


def unfinished(run_dir: pathlib.Path) -> set[tuple[str, float]]:
    """The folders of checkpoints that are being written, or that a killed process left, and when they changed."""
    folder = run_dir / "checkpoints"
    found = [path for path in folder.iterdir() if "tmp" in path.name] if folder.is_dir() else []
    with contextlib.suppress(FileNotFoundError):  # it was finished while we looked
        return {(path.name, path.stat().st_ctime) for path in found}
    return set()


def moment(process: Process, kind: str, run_dir: pathlib.Path, chance: random.Random, start_seconds: float) -> bool:
    """Waits for a random moment of this kind; False if the run ended before it."""
    if kind == "starting":
        until = process.began + chance.uniform(0, start_seconds)
        return process.wait_until(lambda: time.monotonic() > until)
    if not process.wait_until(lambda: process.said("first step done")):
        return False
    until = time.monotonic() + chance.uniform(0, 3)
    if not process.wait_until(lambda: time.monotonic() > until):
        return False
    if kind == "training":
        return True
    if not process.wait_until(lambda: process.is_saving()):
        return False
    time.sleep(chance.uniform(0, 0.03))
    return True


def last_step(run_dir: pathlib.Path) -> int:
    """Of the metrics, which log every step: how far the run had come."""
    path, step = run_dir / "metrics.jsonl", 0
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            step = json.loads(line)["step"]
        except ValueError:
            break
    return step


def went_on_from(process: Process) -> str:
    """The step that a start says it goes on from, if it was not killed too early to say so."""
    if process.said("is finished"):
        return "the end"
    line = process.said(", from step ")
    return line.split(", from step ")[1].split()[0] if line else "(killed before it said)"


def digest(run_dir: pathlib.Path) -> dict:
    """All that a finished run left: the bytes of the last checkpoint's arrays, and the history of metrics."""
    import hashlib

    import numpy as np
    import orbax.checkpoint as ocp

    step = max(int(path.name) for path in (run_dir / "checkpoints").iterdir() if path.name.isdecimal())
    result = {"step": step}
    warnings.filterwarnings("ignore", message="Sharding info not provided")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        items = checkpointer.restore(run_dir / "checkpoints" / str(step) / "default")
    for item in ("params", "ema", "opt_state"):
        hashed = hashlib.sha256()
        for name in sorted(items[item]):
            hashed.update(name.encode() + np.asarray(items[item][name]).tobytes())
        result[item] = hashed.hexdigest()
    history = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    result["metrics"] = [{name: line[name] for name in line if name != "images_per_second"} for line in history]
    return result


def damage(run_dir: pathlib.Path, kind: str) -> str:
    """Damages the newest checkpoint, and says which."""
    folder = run_dir / "checkpoints"
    step = max(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
    largest = max((folder / str(step)).rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    if kind == "one byte flipped":
        content[len(content) // 2] ^= 1
    else:
        del content[len(content) // 2 :]
    largest.write_bytes(content)
    return str(step)


def row(*cells) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--kills", type=int, default=30)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--folder", type=pathlib.Path, help="keep the runs here; by default they are thrown away")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or pathlib.Path(temporary)
        sys.exit(0 if faults(folder.resolve(), given.kills, random.Random(given.seed)) else 1)


def faults(folder: pathlib.Path, kills: int, chance: random.Random) -> bool:
    cache, undisturbed = folder / "cache", folder / "undisturbed"
    process = Process(undisturbed, cache)
    process.wait_until(lambda: process.said("first step done"))
    start_seconds = time.monotonic() - process.began
    if process.wait():
        raise SystemExit("".join(process.lines))
    expected, seconds = digest(undisturbed), time.monotonic() - process.began
    print(f"undisturbed: {expected['step']} steps in {seconds:.0f} s, {start_seconds:.0f} s of them before the first\n")
    sys.stdout.flush()
    row("kill", "while", "after step", "a save under way", "went on from step", "run")
    row(*["---"] * 6)
    done, run, sound = 0, 0, True
    while done < kills:
        run_dir = folder / f"killed-{run}"
        process, killed = Process(run_dir, cache), None
        while done < kills:
            kind = MOMENTS[done % len(MOMENTS)]
            arrived = moment(process, kind, run_dir, chance, start_seconds)
            if killed:
                row(*killed, went_on_from(process), run)
            killed = None
            if not arrived:
                break
            saving = process.is_saving()
            if kind == "starting" and process.said("first step done"):
                kind = "training"  # it started faster than the first time
            process.kill()
            done += 1
            killed = (done, kind, last_step(run_dir), "yes" if saving else "no")
            process = Process(run_dir, cache)
        process.wait()
        if killed:
            row(*killed, went_on_from(process), run)
        ended_well = digest(run_dir) == expected
        sound &= ended_well
        print(f"\nrun {run} ended: {'bitwise the undisturbed one' if ended_well else 'NOT AS THE UNDISTURBED ONE'}\n")
        run += 1
    row("damage", "in the checkpoint of step", "what the run said", "ended")
    row(*["---"] * 4)
    for kind in ("one byte flipped", "one file cut off"):
        run_dir = folder / kind.replace(" ", "-")
        process = Process(run_dir, cache)
        process.wait_until(lambda: process.said("epoch 9/"))  # noqa: B023
        process.kill()
        step = damage(run_dir, kind)
        process = Process(run_dir, cache)
        ended_well = process.wait() == 0 and digest(run_dir) == expected
        sound &= ended_well
        said = process.said("Going back to") or "nothing"
        ended = "bitwise the undisturbed one" if ended_well else "DIFFERENTLY"
        row(kind, step, said[said.find("is damaged") :], ended)
    return sound


if __name__ == "__main__":
    main()
