"""A run to which everything happens: does it end as if nothing had?

    python benchmarks/faults.py [--faults 1000] [--minutes M] [--seed 0] [--layouts] [--folder FOLDER]

A digits run (`configs/digits.py`, smaller, 20 epochs) is done once undisturbed.
Then the same run is started again and again, and to each start several things happen, at random moments:

    before it   bit: one bit of the newest checkpoint is flipped; cut: one of its files is cut off; gone: one is removed
    during it   SIGSTOP, and SIGCONT a moment later; clock: the machine's clock jumps, by up to a month either way;
                order (only with --layouts): the devices of the processes come in another order in the mesh
    at its end  SIGKILL, while it starts, trains, evaluates or writes a checkpoint; SIGTERM, likewise; full disk: no
                file may grow any more; stale: a file handle is stale, or a disk broken, while the checkpoint is read;
                any read: the same in one of the looks at the run's folder, whichever; version: the newest checkpoint
                is one of another version (and is itself again afterwards); worker: a data worker is killed;
                unavailable: a step raises JAX's UNAVAILABLE; lost (only with --layouts): one of several processes is
                killed

A run that is through begins again in a new folder, so that the faults are as many as were asked for.
Every run must end with bitwise the parameters, the average of parameters, the optimizer and the history of metrics of
the undisturbed one. With --layouts each start has 1, 2 or 4 processes, whose sums are added in another order, and the
ends must agree within `BOUNDS`. No start may begin from step 0 after a checkpoint was written. No checkpoint that was
sound may be renamed. The first new step must come within 15 s.

Prints a table, and exits with 1 if something of this was not so.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

os.environ["JAX_PLATFORMS"] = "cpu"
ROOT = pathlib.Path(__file__).resolve().parents[1]
SMALL = {"depth": 1, "word-stride": 4, "inner-dim": 4, "outer-dim": 24, "outer-heads": 2}
RUN = ["--config", str(ROOT / "configs/digits.py"), "--batch-size", "128", "--epochs", "20"]
RUN += ["--eval-every-epochs", "1", "--log-every-steps", "1", "--checkpoint-every-steps", "4"]
RUN += [f"--model.{name}={value}" for name, value in SMALL.items()]
PATIENCE = 900  # seconds after which a process hangs; busy machines are slow
RECOVERY = 15  # seconds from a start to its first step
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "lost": signal.SIGKILL}
ON_DISK = ("bit", "cut", "gone")
INSIDE = ("full disk", "stale", "any read", "worker", "unavailable")
ENDS = ("SIGKILL",) * 4 + ("SIGTERM",) * 2 + INSIDE + ("version",)
CODES = {"SIGKILL": (-9,), "SIGTERM": (75,), "full disk": (1, 2, 75), "stale": (75,), "any read": (75,)}
CODES |= {"worker": (75,), "unavailable": (75,), "version": (2,), "lost": (-9, -6, 75)}

BOUNDS = {"params": 5e-6, "ema": 5e-6, "opt_state": 2e-5}
"""What layouts may differ by, of the larger of 1 and the largest number, three times what they do without any fault.
Undisturbed, the runs on 1, 2 and 4 devices end up to 1.5e-6 from each other in parameters and their average, and up to
5.6e-6 in Adam's averages; two processes with a device each end bitwise as one process with two devices. Four steps
more or less are 7e-5 of the parameters, 5e-4 of their average and 0.25 of Adam's averages."""


class Start:
    """One start of the run, of one process or several, and what process 0 has said."""

    def __init__(self, run_dir: pathlib.Path, cache: pathlib.Path, processes: int = 1, faults=(), seed: int = 0):
        self.began, self.first_step = time.monotonic(), None
        environment = {"JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
        environment |= {"FAULTS": ",".join(faults), "FAULT_SEED": str(seed), "TRAIN": str(ROOT / "train.py")}
        environment |= {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "FAULT_ORDER": str(seed)}
        workers = ["--data.num-workers", "1"] if "worker" in faults else []
        port = free_port()
        self.processes = []
        for index in range(processes):
            flags = [f"--distributed.coordinator=127.0.0.1:{port}", f"--distributed.num-processes={processes}"]
            flags += [f"--distributed.process-id={index}", "--distributed.timeout=60"]
            self.processes.append(
                subprocess.Popen(
                    [
                        sys.executable,
                        "-u",
                        str(ROOT / "benchmarks/fault_child.py"),
                        *RUN,
                        *workers,
                        "--run-dir",
                        str(run_dir),
                    ]
                    + (flags if processes > 1 else []),
                    env=os.environ | environment,
                    stdout=subprocess.PIPE if index == 0 else subprocess.DEVNULL,
                    stderr=subprocess.STDOUT if index == 0 else subprocess.DEVNULL,
                    text=True,
                )
            )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.processes[0].stdout:
            if "first step done" in line:
                self.first_step = time.monotonic() - self.began
            self.lines.append(line.rstrip())

    def wait_until(self, condition) -> bool:
        """Whether it came true before the first process ended."""
        while self.processes[0].poll() is None:
            if condition():
                return True
            time.sleep(0.002)
        return False

    def signal(self, number: int, which: int = 0) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.processes[which].send_signal(number)

    def wait(self) -> int:
        """Exit code of process 0."""
        deadline = time.monotonic() + PATIENCE
        try:
            for process in self.processes:
                process.wait(max(1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            for process in self.processes:
                process.kill()
            self._reader.join()
            raise SystemExit("a process hangs; it said:\n" + "\n".join(self.lines)) from None
        self._reader.join()
        return self.processes[0].returncode

    def said(self, text: str) -> str | None:
        return next((line for line in list(self.lines) if text in line), None)

    def start_step(self) -> int | None:
        """From which step it goes on, if it came to say so."""
        line = self.said(", from step ")
        return int(line.split(", from step ")[1].split()[0]) if line else None


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def unfinished(run_dir: pathlib.Path) -> bool:
    """Whether a checkpoint is being written, or was left half written."""
    folder = run_dir / "checkpoints"
    with contextlib.suppress(FileNotFoundError):
        return any("tmp" in name for name in os.listdir(folder))
    return False


def steps(run_dir: pathlib.Path) -> list[int]:
    folder = run_dir / "checkpoints"
    return sorted(int(name) for name in os.listdir(folder) if name.isdecimal()) if folder.is_dir() else []


def damaged(run_dir: pathlib.Path) -> list[str]:
    folder = run_dir / "checkpoints"
    return [name for name in os.listdir(folder) if name.startswith("damaged")] if folder.is_dir() else []


def shuffled(kinds: tuple[str, ...], chance: random.Random) -> Iterator[str]:
    """Kinds without end, each as often as it is among them, so that none stays away by chance."""
    while True:
        yield from chance.sample(kinds, len(kinds))


def moment(start: Start, run_dir: pathlib.Path, chance: random.Random, start_seconds: float) -> str | None:
    """Waits for a random moment, and says which; None if the run ended before it."""
    kind = chance.choice(("starting", "training", "training", "saving"))
    if kind == "starting":
        until = start.began + chance.uniform(0, start_seconds)
        arrived = start.wait_until(lambda: time.monotonic() > until)
        return (kind if start.first_step is None else "training") if arrived else None
    until = chance.uniform(0, 2.5)
    if not start.wait_until(lambda: start.first_step and time.monotonic() - start.began > start.first_step + until):
        return None
    if kind == "saving":
        if not start.wait_until(lambda: unfinished(run_dir)):
            return None
        time.sleep(chance.uniform(0, 0.03))
    return kind


def harm(run_dir: pathlib.Path, chance: random.Random, harmed: set[int]) -> str | None:
    """Damages a file of the newest checkpoint, if the one before is sound; says how, and adds its step to `harmed`."""
    sound = [step for step in steps(run_dir) if step not in harmed]
    if len(sound) < 2 or sound[-1] != steps(run_dir)[-1]:
        return None
    folder, kind = run_dir / "checkpoints" / str(sound[-1]), chance.choice(ON_DISK)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    path = max(files, key=lambda path: path.stat().st_size) if chance.random() < 0.5 else chance.choice(files)
    content = bytearray(path.read_bytes())
    if kind == "gone":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(content[: chance.randrange(len(content))])
    else:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
    harmed.add(sound[-1])
    return kind


def description_of_another_version(run_dir: pathlib.Path, chance: random.Random) -> tuple[pathlib.Path, str] | None:
    """Rewrites what the newest checkpoint says of itself; the file and what it held."""
    if not steps(run_dir):
        return None
    path = run_dir / "checkpoints" / str(steps(run_dir)[-1]) / "_CHECKPOINT_METADATA"
    before = path.read_text()
    content = json.loads(before)
    content["custom_metadata"]["format"] = chance.randrange(2, 9)
    path.write_text(json.dumps(content))
    path.parent.with_name(f"{path.parent.name}.files.json").unlink(missing_ok=True)  # which would prove a damage
    return path, before


def arrays(run_dir: pathlib.Path) -> dict:
    """The arrays of the last checkpoint, by their names."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    folder = run_dir / "checkpoints" / str(steps(run_dir)[-1]) / "default"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        names = checkpointer.metadata(folder).item_metadata.tree
        here = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), names)  # its devices were those of other processes
        items = checkpointer.restore(folder, args=ocp.args.PyTreeRestore(restore_args=here))
    return {f"{item}.{name}": value for item, tree in items.items() for name, value in tree.items()}


def metrics(run_dir: pathlib.Path) -> list[dict]:
    history = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line if name != "images_per_second"} for line in history]


def differs(run_dir: pathlib.Path, undisturbed: pathlib.Path, exactly: bool) -> str | None:
    """How a run that ended differs from the undisturbed one; None where it does not."""
    import numpy as np

    if steps(run_dir)[-1] != steps(undisturbed)[-1]:
        return f"it ended at step {steps(run_dir)[-1]}"
    ours, theirs = arrays(run_dir), arrays(undisturbed)
    for name, expected in theirs.items():
        found, expected = np.asarray(ours[name]), np.asarray(expected)
        if exactly and found.tobytes() != expected.tobytes():
            return f"{name} is not bitwise the same"
        worst = float(np.abs(found.astype(np.float64) - expected).max())
        bound = BOUNDS[name.partition(".")[0]]
        if not exactly and not worst <= bound * max(1.0, float(np.abs(expected).max())):
            return f"{name} differs by {worst:.2g}"
    if exactly and metrics(run_dir) != metrics(undisturbed):
        return "its metrics differ"
    return None


@dataclasses.dataclass
class Report:
    """What is counted by kind of fault, and what went wrong."""

    done: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    moments: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    recoveries: list = dataclasses.field(default_factory=list)
    runs: int = 0
    wrong: list = dataclasses.field(default_factory=list)

    def complain(self, what: str, start: Start | None = None) -> None:
        self.wrong.append(what)
        print(f"WRONG: {what}", *(start.lines[-8:] if start else []), sep="\n    ", flush=True)


def disturb(folder: pathlib.Path, count: int, minutes: float, chance: random.Random, layouts: bool) -> Report:
    cache, undisturbed = folder / "cache", folder / "undisturbed"
    start = Start(undisturbed, cache)
    if start.wait():
        raise SystemExit("\n".join(start.lines))
    again = Start(folder / "warm", cache)  # with what the first has compiled
    again.wait_until(lambda: again.first_step)
    start_seconds = time.monotonic() - again.began
    again.signal(signal.SIGKILL)
    again.wait()
    print(
        f"undisturbed: {steps(undisturbed)[-1]} steps; a start takes {start_seconds:.1f} s to its first step",
        flush=True,
    )
    report, ends = Report(), shuffled(ENDS + (("lost",) * 3 if layouts else ()), chance)
    end_of_time = time.monotonic() + 60 * minutes
    while sum(report.done.values()) < count and time.monotonic() < end_of_time:
        run_dir, harmed = folder / f"run-{report.runs}", set()
        while True:
            enough = sum(report.done.values()) >= count or time.monotonic() >= end_of_time
            end = "" if enough else next(ends)
            processes = chance.choice((2, 4) if end == "lost" else (1, 2, 4)) if layouts else 1
            if one_start(run_dir, cache, end, processes, chance, harmed, start_seconds, report):
                break
        if difference := differs(run_dir, undisturbed, exactly=not layouts):
            report.complain(f"{run_dir.name}: {difference}")
        report.runs += 1
        print(f"{sum(report.done.values())} faults, {report.runs} runs, {len(report.wrong)} wrong", flush=True)
    return report


def one_start(
    run_dir: pathlib.Path,
    cache: pathlib.Path,
    end: str,
    processes: int,
    chance: random.Random,
    harmed: set[int],
    start_seconds: float,
    report: Report,
) -> bool:
    """Starts the run, lets things happen to it, and waits for its end; whether that is the end of the run."""
    before, renamed, disturbed = steps(run_dir), len(damaged(run_dir)), bool(end)
    other = description_of_another_version(run_dir, chance) if end == "version" and not harmed else None
    if end == "version":
        report.done[end] += other is not None
    elif disturbed and chance.random() < 0.8 and (kind := harm(run_dir, chance, harmed)):
        report.done[kind] += 1
    inside = [end] if end in INSIDE else []
    inside += ["clock"] if disturbed and chance.random() < 0.7 else []
    inside += ["order"] if disturbed and processes > 1 and chance.random() < 0.7 else []
    report.done.update(inside)
    start = Start(run_dir, cache, processes, inside, chance.getrandbits(30))
    stops = chance.choice((0, 1, 2, 3)) if disturbed else 0
    for _ in range(stops):
        if moment(start, run_dir, chance, start_seconds):
            which = chance.randrange(processes)
            start.signal(signal.SIGSTOP, which)
            time.sleep(chance.uniform(0.05, 0.5))
            start.signal(signal.SIGCONT, which)
            report.done["SIGSTOP"] += 1
    when = moment(start, run_dir, chance, start_seconds) if end in SIGNALS else None
    if when:
        start.signal(SIGNALS[end], chance.randrange(processes))
        report.done[end] += 1
        report.moments[when] += 1
    code = start.wait()
    if other:
        path, before_it = other
        if not path.exists() or (code == 0 and steps(run_dir)[-1] == int(path.parent.name)):
            report.complain(f"{run_dir.name}: a checkpoint of another version was touched or taken", start)
        else:
            path.write_text(before_it)
    allowed = (0, *CODES.get(end, ())) + ((75, -9, -6) if processes > 1 else ())
    what = f"{run_dir.name}, {processes} processes, {', '.join([*inside, end])}"
    if code not in allowed:
        report.complain(f"{what}: exit code {code}", start)
    step = start.start_step()
    if step == 0 and before:
        report.complain(f"{what}: it began anew, and there were checkpoints of {before}", start)
    if len(damaged(run_dir)) > renamed + len(harmed):
        report.complain(f"{what}: a sound checkpoint was renamed", start)
    if len(damaged(run_dir)) > renamed or step is not None:  # it has looked at what was harmed
        harmed.clear()
    if start.first_step and step and not stops:
        report.recoveries.append(start.first_step)
    return code == 0


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--faults", type=int, default=1000)
    arguments.add_argument("--minutes", type=float, default=math.inf, help="no new fault after so many")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--layouts", action="store_true", help="1, 2 or 4 processes, changing between starts")
    arguments.add_argument("--folder", type=pathlib.Path, help="keep the runs here; by default they are thrown away")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or pathlib.Path(temporary)).resolve()
        report = disturb(folder, given.faults, given.minutes, random.Random(given.seed), given.layouts)
    print("\n| fault | how often |\n|---|---|")
    for kind, often in report.done.most_common():
        print(f"| {kind} | {often} |")
    print(f"| all | {sum(report.done.values())} |\n\nmoments of signals: {dict(report.moments)}")
    slowest = max(report.recoveries, default=0)
    if report.recoveries:
        median = statistics.median(report.recoveries)
        print(f"start to first new step: median {median:.1f} s, longest {slowest:.1f} s, of {len(report.recoveries)}")
    exact = "within the bounds" if given.layouts else "bitwise"
    print(f"{report.runs} runs ended, {exact} as the undisturbed one, but for {len(report.wrong)} that went wrong")
    if slowest > RECOVERY:
        report.complain(f"a start took {slowest:.1f} s to its first step")
    sys.exit(1 if report.wrong else 0)


if __name__ == "__main__":
    main()
