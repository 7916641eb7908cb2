"""What a start of faults.py runs: train.py, in which happens what FAULTS says, by the chance of FAULT_SEED."""

import os
import random
import resource
import runpy
import sys
import threading
import time

kinds, chance = os.environ.get("FAULTS", "").split(","), random.Random(int(os.environ.get("FAULT_SEED", "0")))
if "clock" in kinds:
    truth, jump = time.time, [0.0]
    time.time = lambda: truth() + jump[0]

    def leap():
        while True:
            time.sleep(chance.uniform(0.01, 0.3))
            jump[0] = chance.uniform(-30, 30) * 86400

    threading.Thread(target=leap, daemon=True).start()
if "full disk" in kinds:
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill():
        time.sleep(chance.uniform(0, 8))
        resource.setrlimit(resource.RLIMIT_FSIZE, (chance.choice((0, 100, 3000, 12000)),) * 2)

    threading.Thread(target=fill, daemon=True).start()
if "stale" in kinds:
    import errno

    from tnt_jax.storage import reading

    number = chance.choice((errno.ESTALE, errno.EIO, errno.EACCES))
    error, where = OSError(number, os.strerror(number)), chance.choice(("description", "arrays"))

    def fail(*arguments, **named):
        raise error

    if where == "arrays":
        reading.ocp.Checkpointer.restore = fail
    else:
        reading._description = fail
if "any read" in kinds:
    import builtins
    import errno
    import io

    folder = sys.argv[sys.argv.index("--run-dir") + 1]
    number, left = chance.choice((errno.ESTALE, errno.EIO)), [chance.randrange(60)]

    def fails(path) -> None:
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(folder):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(number, os.strerror(number), os.fspath(path))

    def failing(call):
        return lambda path=".": fails(path) or call(path)

    opens = builtins.open

    def open_or_fail(path, mode="r", *rest, **named):
        if mode in ("r", "rb"):
            fails(path)
        return opens(path, mode, *rest, **named)

    builtins.open = io.open = open_or_fail
    os.listdir, os.scandir = failing(os.listdir), failing(os.scandir)
if "worker" in kinds:
    from tnt_jax.data import workers

    begin = workers.Worker.__init__

    def begin_and_die(self, *arguments):
        begin(self, *arguments)
        threading.Timer(chance.uniform(0, 4), self._process.kill).start()

    workers.Worker.__init__ = begin_and_die
if "unavailable" in kinds:
    import jax

    from tnt_jax.training import run

    take_step, left = run.Run.train_step, [chance.randrange(1, 60)]

    def train_step(self, state, batch):
        left[0] -= 1
        if left[0] == 0:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: the device is not reachable")
        return take_step(self, state, batch)

    run.Run.train_step = train_step
if "order" in kinds:
    import numpy as np
    from jax.sharding import AxisType, Mesh

    from tnt_jax.training import run

    make_mesh = run.make_mesh

    def other_order(fsdp):
        devices = make_mesh(fsdp).devices
        order = np.random.default_rng(int(os.environ["FAULT_ORDER"])).permutation(devices.size)
        return Mesh(devices.ravel()[order].reshape(devices.shape), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    run.make_mesh = other_order
sys.argv[0] = "train.py"
runpy.run_path(os.environ["TRAIN"], run_name="__main__")
