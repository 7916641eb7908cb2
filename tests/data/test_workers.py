import dataclasses
import itertools
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data import workers
from tnt_jax.data.pipeline import TrainRecipe, train_batches
from tnt_jax.data.sources import Split

ROOT = pathlib.Path(__file__).parents[2]
IMAGES = Split(np.zeros((300, 8, 8, 3), np.uint8), np.zeros(300, int), ("a",))
FEED = {"image_size": (16, 16), "channels": 3, "batch_size": 8, "seed": 0}


@dataclasses.dataclass(frozen=True)
class FailingRecipe:
    """Pickled by value of its fields, so that a worker process finds the class: see the fixture."""

    row_shape = (4, 4, 3)
    dtype = "uint8"
    target_shape, target_dtype = (), "int32"
    error: Exception

    def fill(self, step, rows, images, labels):
        images[:] = step
        labels[:] = rows
        if step == 3:
            raise self.error
        return []


@pytest.fixture
def batches():
    running = train_batches(IMAGES, dataclasses.replace(DataConfig(), num_workers=2), **FEED)
    yield running
    running.close()


def descendants(pid):
    """Process ids below this one."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            name, parent, state = int(path.parent.name), *stat(path)
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == pid and state != "Z":
            found += [name, *descendants(name)]
    return found


def stat(path):
    """Parent and state of a process."""
    state, parent = path.read_text().rpartition(")")[2].split()[:2]
    return int(parent), state


def gone(pids, within=10):
    """Whether these processes end, in seconds."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        alive = []
        for pid in pids:
            try:
                alive += [pid] if stat(pathlib.Path(f"/proc/{pid}/stat"))[1] != "Z" else []
            except (FileNotFoundError, ProcessLookupError):
                continue
        if not alive:
            return True
        time.sleep(0.05)
    return False


def test_a_worker_that_is_killed_ends_the_run_with_the_cause(batches):
    next(batches)
    started = descendants(os.getpid())
    os.kill(started[0], signal.SIGKILL)
    with pytest.raises(workers.WorkerError, match="a data worker was killed by SIGKILL"):
        list(itertools.islice(batches, 1000))
    assert gone(started)


def test_a_worker_that_exits_ends_the_run_with_the_cause(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    failing = train_batches(IMAGES, dataclasses.replace(DataConfig(), num_workers=1), **FEED)
    with pytest.raises(workers.WorkerError, match="a data worker ended with exit status 1"):
        next(failing)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_in_preparing_reaches_the_run_with_its_cause(num_workers, monkeypatch):
    # A worker process imports what it unpickles.
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parent))
    for error, expected, message in (
        (InputError("bad.jpg is empty"), InputError, "^bad.jpg is empty$"),
        (ZeroDivisionError("of the source"), (workers.WorkerError, ZeroDivisionError), "of the source"),
    ):
        running = workers.prepare(FailingRecipe(error), range(8), range(100), num_workers=num_workers, num_threads=2)
        for step in range(3):
            images, labels, _ = next(running)
            assert (images == step).all()
            assert labels.tolist() == list(range(8))
        with pytest.raises(expected, match=message):
            next(running)
        assert not descendants(os.getpid())


def test_closing_ends_the_workers(batches):
    next(batches)
    started = descendants(os.getpid())
    assert len(started) == 2
    batches.close()
    assert gone(started)


SCRIPT = """
import dataclasses, itertools, sys, time
import numpy as np
from tnt_jax.config import DataConfig
from tnt_jax.data.pipeline import TrainRecipe, train_batches
from tnt_jax.data.sources import Split
source = Split(np.zeros((300, 64, 64, 3), np.uint8), np.zeros(300, int), ("a",))
data = dataclasses.replace(DataConfig(), num_workers=%d)
batches = train_batches(source, data, image_size=(64, 64), channels=3, batch_size=64, seed=0)
next(batches)
print("running", flush=True)
%s
"""


@pytest.mark.parametrize(
    ("name", "then"),
    [("SIGKILL", "time.sleep(600)"), ("SIGTERM", "for _ in batches: pass"), ("SIGINT", "for _ in batches: pass")],
)
def test_no_process_and_no_shared_memory_outlives_the_run(name, then):
    shared = set(os.listdir("/dev/shm"))
    # A session of its own, so that the signal reaches the workers as well, as that of a terminal or a scheduler does
    run = subprocess.Popen(
        [sys.executable, "-c", SCRIPT % (2, then)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        start_new_session=True,
        # Tests that run in the background of a shell inherit that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        assert run.stdout.readline() == b"running\n"
        started = descendants(run.pid)
        assert len(started) == 2
        if name == "SIGKILL":
            run.kill()
        else:
            os.killpg(run.pid, signal.Signals[name])
        run.wait(timeout=20)
        assert gone(started)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert set(os.listdir("/dev/shm")) <= shared


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_that_forgets_to_close_leaves_nothing_and_prints_nothing(num_workers):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT % (num_workers, "sys.exit()")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_workers_import_neither_jax_nor_anything_else_that_is_large(batches):
    next(batches)
    for pid in descendants(os.getpid()):
        assert "jax" not in pathlib.Path(f"/proc/{pid}/maps").read_text().replace("tnt_jax", "")


def private_bytes(pid):
    """Memory that a process has for itself."""
    lines = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_"))


def test_workers_share_the_arrays_of_a_source():
    size = 100_000_000
    source = Split(np.zeros((size // (16 * 16 * 3), 16, 16, 3), np.uint8), np.zeros(size // 768, int), ("a",))
    feed = FEED | {"batch_size": 64}
    running = train_batches(source, dataclasses.replace(DataConfig(), num_workers=2), **feed)
    next(running)
    started = descendants(os.getpid())
    assert len(started) == 2
    for pid in started:
        assert private_bytes(pid) < size
    running.close()
    assert gone(started)


def test_what_a_batch_costs_to_order_does_not_grow_with_its_square():
    count = 2**20
    source = Split(np.broadcast_to(np.zeros((1, 1, 1, 3), np.uint8), (count, 1, 1, 3)), np.zeros(count), ("a",))
    seconds = {}
    for batch_size in (1024, 16384):
        recipe = TrainRecipe(source, DataConfig(), (1, 1, 3), batch_size, 0)
        recipe.places(0, range(1))  # the order of the epoch
        began = time.process_time()
        for step in (1, 2, 3):
            for row in range(0, batch_size, workers.ROWS_PER_TASK):
                recipe.places(step, range(row, row + workers.ROWS_PER_TASK))
        seconds[batch_size] = time.process_time() - began
    assert seconds[16384] < 3 * 16 * seconds[1024]
    assert seconds[16384] < 1


def test_a_worker_runs_no_code_of_the_current_folder(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mmap.py").write_text("raise SystemExit('code of the current folder')\n")
    (tmp_path / "run.py").write_text(SCRIPT % (1, "batches.close()"))
    done = subprocess.run(
        [sys.executable, tmp_path / "run.py"],
        cwd=tmp_path / "photos",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "running\n", "")
