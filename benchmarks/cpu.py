"""TNT-S and DeiT-S: ours, timm, timm under torch.compile and ONNX Runtime on timm's export, timed in turns.

Beside DeiT-S also a ViT-S/16 of Flax's own layers (benchmarks/stock_vit.py).

    pip install timm==1.0.31 torch onnx onnxscript onnxruntime
    python benchmarks/cpu.py [--peer-python /path/to/another/venv/bin/python] [--rounds 7]

One command, one table: inference of 1 and 8 images and a training step of 8 (forward, loss, backward, AdamW),
224 x 224, float32; ours and timm's also in bfloat16 (under autocast), with parameters in float32. A peer whose library
is missing is left out with a line that says so. Each runner is a process of its own, which sleeps on a pipe while
another is timed. In a turn every runner has one call that is not timed, then calls until a second is over; the ratios
are medians of the ratios within a round, over peers in float32 for what is in float32, and over all for bfloat16. The
first step is timed in fresh processes without compilation caches: from the call to the updated parameters, compilation
included.

Memory is kept between steps, as in `train.py`. On a GPU or TPU it runs as it is, timm on CUDA where PyTorch has it, and
tells the share of the published peak.
"""

import argparse
import contextlib
import functools
import json
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
BFLOAT16 = " bfloat16"
NEEDS = {
    "ours": ("jax", "flax", "optax"),
    "stock Flax": ("jax", "flax", "optax"),
    "timm": ("torch", "timm"),
    "timm compiled": ("torch", "timm"),
    "ONNX Runtime": ("torch", "timm", "onnx", "onnxscript", "onnxruntime"),
}
NEEDS |= {name + BFLOAT16: NEEDS[name] for name in ("ours", "timm", "timm compiled")}
OURS = ("ours", "ours" + BFLOAT16, "stock Flax")  # run by this Python
SETTLE = 0.3  # seconds after which the threads of the runner before have stopped spinning
TURN = 1.0  # seconds
FIRST_STEPS = 3


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--peer-python", default=sys.executable, help="the Python that has timm and PyTorch")
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--runners", nargs="+", choices=NEEDS, default=list(NEEDS))
    arguments.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments.add_argument("--no-first-step", action="store_true", help="leave out the seconds of the first step")
    given = arguments.parse_args()
    pythons = {name: sys.executable if name in OURS else given.peer_python for name in given.runners}
    runners = [name for name, python in pythons.items() if _available(name, python)]

    print("| | batch | runner | ms, median (least to most) | over timm | over the best peer | share of peak |")
    print("|---|---|---|---|---|---|---|")
    seconds = {}
    for task in TASKS:
        for model in given.models:
            can = [name for name in runners if _can(name, task, model)]
            with contextlib.ExitStack() as stack:
                children = {name: stack.enter_context(_Child(pythons[name], name, model, task)) for name in can}
                rounds = [{name: child.turn() for name, child in children.items()} for _ in range(given.rounds)]
                shares = {name: child.at_peak for name, child in children.items()}
            seconds[task, model] = rounds
            for name in can:
                print(_row(task, model, name, rounds, shares[name]), flush=True)

    if given.models == list(MODELS):
        _print_tnt_over_deit(runners, seconds)
    if not given.no_first_step:
        _print_first_steps(runners, pythons, given.models)


def _print_tnt_over_deit(runners: list[str], seconds: dict[tuple[str, str], list[dict[str, float]]]) -> None:
    # Flax has no TNT: its ViT-S is what our TNT-S is compared with.
    print("\n| TNT-S over DeiT-S, time | " + " | ".join(runners) + " |")
    print("|---|" + "---|" * len(runners))
    for task in TASKS:
        cells = []
        for name in runners:
            tnt = [turn.get("ours" if name == "stock Flax" else name) for turn in seconds[task, "TNT-S"]]
            deit = [turn.get(name) for turn in seconds[task, "DeiT-S"]]
            cells.append("-" if tnt[0] is None else f"{statistics.median(tnt) / statistics.median(deit):.2f}")
        print(f"| {task} | {' | '.join(cells)} |")


def _print_first_steps(runners: list[str], pythons: dict[str, str], models: list[str]) -> None:
    print("\n| first training step, s | " + " | ".join(runners) + " |")
    print("|---|" + "---|" * len(runners))
    for model in models:
        cells = []
        for name in runners:
            if not _can(name, "training step, 8", model):
                cells.append("-")
                continue
            firsts = []
            for _ in range(FIRST_STEPS):
                with _Child(pythons[name], name, model, "training step, 8") as child:
                    firsts.append(child.first)
            cells.append(f"{statistics.median(firsts):.1f} ({min(firsts):.1f} to {max(firsts):.1f})")
        print(f"| {model} | {' | '.join(cells)} |", flush=True)


def _can(name: str, task: str, model: str) -> bool:
    if name == "stock Flax":
        return model == "DeiT-S"
    return not (name == "ONNX Runtime" and task.startswith("training"))


def _available(name: str, python: str) -> bool:
    """Whether a runner's libraries are there; says so if not."""
    code = f"import importlib.util as i; print(*(m for m in {NEEDS[name]} if i.find_spec(m) is None))"
    missing = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    if missing:
        print(f"{name} is left out: {python} has no {', '.join(missing)}", file=sys.stderr)
    return not missing


def _row(task: str, model: str, name: str, rounds: list[dict[str, float]], at_peak: float | None) -> str:
    def ratio(of: Callable[[dict[str, float]], float]) -> str:
        return f"{statistics.median(of(turn) / turn[name] for turn in rounds):.2f}"

    mine = [turn[name] for turn in rounds]
    peers = [peer for peer in rounds[0] if not peer.startswith("ours") and (BFLOAT16 in name or BFLOAT16 not in peer)]
    best = min(peers, key=lambda peer: statistics.median(turn[peer] for turn in rounds), default=None)
    cells = [f"{task.partition(',')[0]}, {model}", task.rpartition(" ")[2], name]
    cells.append(f"{statistics.median(mine) * 1e3:.0f} ({min(mine) * 1e3:.0f} to {max(mine) * 1e3:.0f})")
    cells.append(ratio(lambda turn: turn["timm"]) if "timm" in peers else "-")
    cells.append(ratio(lambda turn: turn[best]) if best and name.startswith("ours") else "-")
    cells.append(f"{at_peak / statistics.median(mine):.1%}" if at_peak else "-")
    return f"| {' | '.join(cells)} |"


class _Child:
    """A process that has made its first call and waits; every line that it is sent is one turn."""

    def __init__(self, python: str, name: str, model: str, task: str):
        # Without caches, torch.compile's first step is a first step; ours has none unless it is told to.
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        command = [python, __file__, "--child", name, model, task]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)

    def __enter__(self):
        answer = self._answer()
        self.first, self.at_peak = answer["first"], answer["at_peak"]
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait()

    def turn(self) -> float:
        """Seconds a call."""
        time.sleep(SETTLE)
        print("turn", file=self._process.stdin, flush=True)
        return self._answer()["seconds"]

    def _answer(self) -> dict:
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{' '.join(self._process.args)} ended without an answer")


def child(name: str, model: str, task: str) -> None:
    kind, batch = TASKS[task]
    dtype = "bfloat16" if name.endswith(BFLOAT16) else "float32"
    if name in OURS:
        run, at_peak = ours("ViT-S" if name == "stock Flax" else model, kind, batch, dtype)
    elif name == "ONNX Runtime":
        run, at_peak = onnx_runtime(model, kind, batch)
    else:
        run, at_peak = timms(model, kind, batch, dtype, compiled="compiled" in name)
    start = time.perf_counter()
    run()
    print(json.dumps({"first": time.perf_counter() - start, "at_peak": at_peak}), flush=True)
    for _ in sys.stdin:
        run()
        start, calls = time.perf_counter(), 0
        while calls == 0 or time.perf_counter() - start < TURN:
            run()
            calls += 1
        print(json.dumps({"seconds": (time.perf_counter() - start) / calls}), flush=True)


def ours(model: str, kind: str, batch: int, dtype: str) -> tuple[Callable[[], None], float | None]:
    """A call, and the seconds that its arithmetic takes at the chip's peak, where it is known."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from deit import DeiT
    from flax import nnx
    from stock_vit import StockViT

    from tnt_jax.chips import chip_of, training_flops
    from tnt_jax.commands.process import keep_memory
    from tnt_jax.models.tnt import TNT
    from tnt_jax.models.variants import VARIANTS, model_config

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

    chip = chip_of(jax.devices()[0].device_kind)
    if chip is None or model != "TNT-S":
        return run, None
    macs = VARIANTS[config.name].macs
    return run, batch * (2 * macs if kind == "infer" else training_flops(macs)) / chip.flops


def timms(model: str, kind: str, batch: int, dtype: str, *, compiled: bool) -> tuple[Callable[[], None], None]:
    import timm
    import torch

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = timm.create_model(MODELS[model]).to(device).train(kind == "train")
    images, labels = torch.randn(batch, 3, 224, 224, device=device), torch.randint(1000, (batch,), device=device)
    call = torch.compile(network) if compiled else network
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    low = functools.partial(torch.autocast, device, torch.bfloat16, enabled=dtype == "bfloat16")
    if kind == "infer":

        def run():
            with torch.inference_mode(), low():
                call(images)
            wait()

        return run, None
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

    def run():
        optimizer.zero_grad()
        with low():
            loss = torch.nn.functional.cross_entropy(call(images), labels)
        loss.backward()
        optimizer.step()
        wait()

    return run, None


def onnx_runtime(model: str, kind: str, batch: int) -> tuple[Callable[[], None], None]:
    import onnxruntime
    import timm
    import torch

    options = onnxruntime.SessionOptions()
    # Threads spin within a call, as they do by default, and not after it.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    images = torch.randn(batch, 3, 224, 224)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        path = pathlib.Path(folder) / "model.onnx"
        torch.onnx.export(timm.create_model(MODELS[model]).eval(), (images,), path, dynamo=True)
        providers = onnxruntime.get_available_providers()
        session = onnxruntime.InferenceSession(path, options, providers=providers)
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, feed), None


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
