"""TNT-S and DeiT-S: ours, timm, timm under torch.compile and ONNX Runtime on timm's export, timed in turns.

Beside DeiT-S also a ViT-S/16 of Flax's own layers (benchmarks/stock_vit.py).

    pip install timm==1.0.31 torch onnx onnxscript onnxruntime      here, or where PEER_PYTHON lies
    [PEER_PYTHON=/path/to/another/venv/bin/python] python benchmarks/cpu.py [--dtype bfloat16] [--rounds 5]

One command, one table, in milliseconds: inference of 1 and 8 images and a training step of 8 (forward, loss, backward,
AdamW), 224 x 224. In bfloat16 that is TNT-S, timm's under autocast, all with parameters in float32, and beside it ours
and ONNX Runtime in float32. A peer whose library is missing is left out with a line that says so. Each runner is a
process of its own, which sleeps on a pipe while another is timed. In a turn every runner has one call that is not
timed, then calls until a second is over. Times are medians; the last column is the median of the ratios within a round
of the best other, which is the one with the least median. Memory is kept between steps, as in `train.py`.
"""

import argparse
import contextlib
import functools
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parents[1]
TASKS = {"inference, 1": ("infer", 1), "inference, 8": ("infer", 8), "training step, 8": ("train", 8)}
MODELS = {"TNT-S": "tnt_s_patch16_224", "DeiT-S": "deit_small_patch16_224"}
STOCK = "stock ViT-S"
NEEDS = {
    "ours": ("jax", "flax", "optax"),
    STOCK: ("jax", "flax", "optax"),
    "timm": ("torch", "timm"),
    "timm compiled": ("torch", "timm"),
    "ONNX Runtime": ("torch", "timm", "onnx", "onnxscript", "onnxruntime"),
}
PEERS = ("timm", "timm compiled")
# The models of a table, and its columns: what runs, and in which dtype.
TABLES = {
    "float32": (tuple(MODELS), {name: (name, "float32") for name in NEEDS}),
    "bfloat16": (
        ("TNT-S",),
        {"ours": ("ours", "bfloat16"), "ours, float32": ("ours", "float32")}
        | {name: (name, "bfloat16") for name in PEERS}
        | {"ONNX Runtime, float32": ("ONNX Runtime", "float32")},
    ),
}
SETTLE = 0.3  # seconds after which the threads of the runner before have stopped spinning
TURN = 1.0  # seconds


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--dtype", choices=TABLES, default="float32")
    arguments.add_argument("--rounds", type=int, default=5)
    given = arguments.parse_args()
    models, columns = TABLES[given.dtype]
    what = "float32, ms" if len(models) > 1 else f"{models[0]} in {given.dtype}, ms"
    print(f"| {what} | batch | {' | '.join(columns)} | the best other over ours |")
    print("|" + "---|" * (len(columns) + 3))
    there = {name for name in columns if _available(columns[name][0])}
    for task in TASKS:
        for model in models:
            runners = {name: of for name, of in columns.items() if name in there and _can(of[0], task, model)}
            with contextlib.ExitStack() as stack:
                children = {name: stack.enter_context(_Child(*of, model, task)) for name, of in runners.items()}
                rounds = [{name: child.turn() for name, child in children.items()} for _ in range(given.rounds)]
            kind, _, batch = task.partition(", ")
            cells = [kind if len(models) == 1 else f"{kind}, {model}", batch, *_cells(columns, rounds)]
            print(f"| {' | '.join(cells)} |", flush=True)


def _cells(columns: dict, rounds: list[dict[str, float]]) -> list[str]:
    medians = {name: statistics.median(turn[name] for turn in rounds) for name in rounds[0]}
    best = min((name for name in medians if not name.startswith("ours")), key=medians.get, default=None)
    cells = [f"{1e3 * medians[name]:.0f}" if name in medians else "-" for name in columns]
    return [*cells, f"{statistics.median(turn[best] / turn['ours'] for turn in rounds):.2f}" if best else "-"]


def _can(name: str, task: str, model: str) -> bool:
    if name == STOCK:
        return model == "DeiT-S"
    return not (name == "ONNX Runtime" and task.startswith("training"))


def _python(name: str) -> str:
    """The Python that runs it: that of `PEER_PYTHON` for the peers."""
    return sys.executable if name in ("ours", STOCK) else os.environ.get("PEER_PYTHON", sys.executable)


def _available(name: str) -> bool:
    """Whether a runner's libraries are there; says so if not."""
    code = f"import importlib.util as i; print(*(m for m in {NEEDS[name]} if i.find_spec(m) is None))"
    missing = subprocess.run([_python(name), "-c", code], capture_output=True, text=True, check=True).stdout.split()
    if missing:
        print(f"{name} is left out: {_python(name)} has no {', '.join(missing)}", file=sys.stderr)
    return not missing


class _Child:
    """A process that has made its first call and waits; every line that it is sent is one turn."""

    def __init__(self, name: str, dtype: str, model: str, task: str):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [_python(name), __file__, "--child", name, dtype, model, task]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)

    def __enter__(self):
        self._answer()
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait()

    def turn(self) -> float:
        """Seconds a call."""
        time.sleep(SETTLE)
        print("turn", file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> float:
        for line in self._process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise SystemExit(f"{' '.join(self._process.args)} ended without an answer")


def child(name: str, dtype: str, model: str, task: str) -> None:
    kind, batch = TASKS[task]
    if name in ("ours", STOCK):
        run = ours("ViT-S" if name == STOCK else model, kind, batch, dtype)
    elif name == "ONNX Runtime":
        run = onnx_runtime(model, batch)
    else:
        run = timms(model, kind, batch, dtype, compiled="compiled" in name)
    run()
    print("seconds 0", flush=True)
    for _ in sys.stdin:
        run()
        start, calls = time.perf_counter(), 0
        while calls == 0 or time.perf_counter() - start < TURN:
            run()
            calls += 1
        print(f"seconds {(time.perf_counter() - start) / calls}", flush=True)


def ours(model: str, kind: str, batch: int, dtype: str) -> Callable[[], None]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from deit import DeiT
    from flax import nnx
    from stock_vit import StockViT

    from tnt_jax.commands.process import keep_memory
    from tnt_jax.models.tnt import TNT
    from tnt_jax.models.variants import model_config

    keep_memory()  # as train.py does
    config = model_config("tnt_s_patch16_224", dtype=dtype)
    network = {"TNT-S": TNT, "DeiT-S": DeiT, "ViT-S": StockViT}[model](config, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(network)
    random = np.random.default_rng(0)
    images = jnp.asarray(random.standard_normal((batch, *config.image_size, 3), np.float32))
    labels = jnp.asarray(random.integers(0, config.num_classes, batch))

    if kind == "infer":
        forward = jax.jit(lambda params, images: nnx.merge(graphdef, params)(images))

        def run():
            forward(params, images).block_until_ready()
    else:
        optimizer = optax.adamw(1e-4, weight_decay=0.05)

        @jax.jit(donate_argnums=(0, 1))
        def step(params, opt_state, images, labels):
            def loss_of(params):
                logits = nnx.merge(graphdef, params)(images)
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

            loss, grads = jax.value_and_grad(loss_of)(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        state = [params, jax.block_until_ready(jax.jit(optimizer.init)(params))]

        def run():
            *state[:], _ = jax.block_until_ready(step(*state, images, labels))

    return run


def _import_timm():
    """timm; beside a PyTorch for CPUs alone, torchvision of PyPI does not declare the operators that it misses."""
    import torch

    with contextlib.suppress(RuntimeError):
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm

    return timm


def timms(model: str, kind: str, batch: int, dtype: str, *, compiled: bool) -> Callable[[], None]:
    import torch

    timm = _import_timm()
    torch.manual_seed(0)
    network = timm.create_model(MODELS[model]).train(kind == "train")
    images, labels = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    call = torch.compile(network) if compiled else network
    low = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    if kind == "infer":

        def run():
            with torch.inference_mode(), low():
                call(images)

        return run
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

    def run():
        optimizer.zero_grad()
        with low():
            loss = torch.nn.functional.cross_entropy(call(images), labels)
        loss.backward()
        optimizer.step()

    return run


def onnx_runtime(model: str, batch: int) -> Callable[[], None]:
    import onnxruntime
    import torch

    timm = _import_timm()
    options = onnxruntime.SessionOptions()
    # Threads spin within a call, as they do by default, and not after it.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    images = torch.randn(batch, 3, 224, 224)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        path = pathlib.Path(folder) / "model.onnx"
        torch.onnx.export(timm.create_model(MODELS[model]).eval(), (images,), path, dynamo=True)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, feed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
