"""Ten minutes with an NVIDIA GPU: is the CUDA kernel right, how fast is it, and what do whole models take?

    python benchmarks/gpu.py --out gpu.jsonl             on the machine with the card, with `jax[cuda13]`
    python benchmarks/gpu_compile.py --json >> gpu.jsonl   the estimates for it, anywhere
    python benchmarks/gpu.py --tables gpu.jsonl          both as tables, anywhere

The first command writes a JSON line for each thing that it finds, at once, the most telling first: whether the kernel
is right, then training steps, then the rest. It ends after `--minutes`, by default 9; called again with the same
`--out` it finds its compiled programs beside it and gets further, and `--parts` chooses. Each part is a process with a
time limit of its own, so what hangs or fails costs that part alone and is a line too. PyTorch's timm is measured beside
ours where both are installed and see the card; packages that `PYTHONPATH` names are found.

Without a GPU it says so and ends; with --smoke it does everything that a CPU can do, in the least sizes, to show that
the command itself is sound: those numbers mean nothing.
"""

import argparse
import contextlib
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODELS = ("cuda+cudnn", "stock", "auto", "deit+cudnn", "cuda", "deit", "reference", "feature_major")
# Name, seconds at most, most of which compile: the most telling first.
SANITIZERS = ("memcheck", "racecheck")  # NVIDIA's compute-sanitizer: memory out of bounds, and a missing barrier
PARTS = [("kernel", 240), *((tool, 150) for tool in SANITIZERS)]
PARTS += [(f"model {model} train", 240) for model in MODELS] + [("timm", 300), ("inner", 120)]
PARTS += [(f"model {model} forward", 150) for model in MODELS]
PARTS += [("attention", 90), ("knobs", 150), ("digits", 300)]
ROUNDS = 5
SENTENCES = 37  # no multiple of anything
MORE = 8  # times the sentences, for what an image more takes


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=pathlib.Path, help="a file to which the lines are added, beside the screen")
    arguments.add_argument("--parts", nargs="+", help="those whose names begin so; by default all")
    arguments.add_argument("--batch", type=int, default=128, help="images")
    arguments.add_argument("--minutes", type=float, default=9, help="after which no part begins, and the last one ends")
    arguments.add_argument("--smoke", action="store_true", help="in the least sizes, on whatever JAX finds")
    arguments.add_argument("--tables", type=pathlib.Path, help="renders the lines of this file, and measures nothing")
    given = arguments.parse_args()
    if given.tables:
        import gpu_tables

        return print(gpu_tables.render(given.tables.read_text()))
    say, end = functools.partial(_say, given.out), time.monotonic() + 60 * given.minutes
    found = _child("card", 120, given, say)
    if not found or (found[0]["platform"] != "gpu" and not given.smoke):
        there = found[0]["platform"] if found else "nothing"
        sys.exit(
            f"no NVIDIA GPU: JAX finds {there}; expected a card and jax[cuda13]. --smoke shows that all parts start"
        )
    for name, limit in PARTS:
        if not given.parts or name.startswith(tuple(given.parts)):
            if (left := end - time.monotonic()) > 5:
                _child(name, min(limit, left), given, say)
            else:
                say({"part": name, "failed": f"not begun: {given.minutes:g} minutes are over"})
    return None


def _say(out: pathlib.Path | None, line: dict) -> None:
    text = json.dumps(line)
    print(text, flush=True)
    if out:
        with out.open("a") as file:
            file.write(text + "\n")


def _child(name: str, limit: float, given: argparse.Namespace, say) -> list[dict]:
    """The lines of a part, said as they come; what goes wrong is one too."""
    command = [sys.executable, __file__, "--child", name, str(given.batch), str(int(given.smoke))]
    paths = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    if given.out:
        settings["JAX_COMPILATION_CACHE_DIR"] = str(given.out.resolve().parent / "compiled")
    if name in SANITIZERS:
        if not (tool := shutil.which("compute-sanitizer")):
            say({"part": name, "not_run": "compute-sanitizer is not installed"})
            return []
        command = [tool, "--tool", name, "--error-exitcode", "9", *command]
    settings["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]  # one card
    start, found, late = time.monotonic(), [], threading.Event()
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command, env=os.environ | settings, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )

        def end() -> None:
            late.set()
            os.killpg(child.pid, signal.SIGKILL)

        timer = threading.Timer(limit, end)
        timer.start()
        for line in child.stdout:
            if line.startswith("{"):
                found.append({"part": name} | json.loads(line))
                say(found[-1])
        code = child.wait()
        timer.cancel()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or ["no message"])[-1][:300]
    if code:
        failed = f"took more than {limit:.3g} s" if late.is_set() else f"exit code {code}: {last}"
        say({"part": name, "failed": failed, "seconds": round(time.monotonic() - start, 1)})
    return found


# What the children do


def say(**what) -> None:
    print(json.dumps(what), flush=True)


def seconds(function, *arguments) -> float:
    """Of one call: the shortest of a few rounds, the calls of a round queued one behind the other."""
    import jax

    jax.block_until_ready(function(*arguments))
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    calls = max(1, min(100, int(0.3 / (time.perf_counter() - start))))
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(calls):
            out = function(*arguments)
        jax.block_until_ready(out)
        rounds.append((time.perf_counter() - start) / calls)
    return min(rounds)


def card(batch: int, smoke: bool) -> None:
    import flax
    import jax

    device = jax.devices()[0]
    say(
        platform=device.platform, device=device.device_kind, jax=jax.__version__, flax=flax.__version__,
        capability=getattr(device, "compute_capability", None), multiprocessors=getattr(device, "core_count", None),
        python=sys.version.split()[0], images=batch,
    )  # fmt: skip


def layer_of(formulation: str, model: str, dtype: str, smoke: bool = False):
    """An inner layer with random parameters, split; and what it makes of words and of a key."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from tnt_jax.models.inner import InnerTransformer
    from tnt_jax.models.variants import model_config

    config = model_config(model, inner=formulation, dtype=dtype)
    layer = InnerTransformer(config.inner_dim, config.inner_heads, 0.1, config=config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    layer = jax.tree.map(lambda leaf: leaf + jnp.asarray(0.2 * rng.standard_normal(leaf.shape), leaf.dtype), layer)
    graphdef, params = nnx.split(layer)
    return params, lambda params, words: nnx.merge(graphdef, params)(words, jax.random.key(7)), config.inner_dim


def gradient_of(run):
    import jax

    def gradient(params, words, cotangent):
        out, backward = jax.vjp(run, params, words)
        return out, backward(cotangent)

    return jax.jit(gradient)


def draw(shape: tuple[int, ...], seed: int):
    import jax.numpy as jnp
    import numpy as np

    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def obstacle_of(model: str) -> str | None:
    """Why the CUDA kernel does not run here, or None."""
    import jax.numpy as jnp
    from flax import nnx

    from tnt_jax.models.formulations.inner import cuda_obstacle
    from tnt_jax.models.inner import InnerTransformer
    from tnt_jax.models.variants import model_config

    config = model_config(model, inner="cuda", dtype="bfloat16")
    layer = InnerTransformer(config.inner_dim, config.inner_heads, 0.1, config=config, rngs=nnx.Rngs(0))
    assert layer.dtype == jnp.bfloat16
    return cuda_obstacle(layer, 196, 16)


@contextlib.contextmanager
def launched(by: str | None):
    """The CUDA kernel launched by our handler (launch.c), or by XLA's own call; anything else as it is."""
    from tnt_jax.models.kernels.gpu import call

    usual = call.means
    if by:
        call.means = lambda sizes: usual(sizes)._replace(handler=by == "handler")
    try:
        yield
    finally:
        call.means = usual


def ways(model: str, formulation: str) -> list[str | None]:
    """How a formulation's kernels can be launched here. Why they cannot, it says."""
    if formulation != "cuda":
        return [None]
    from tnt_jax.models.kernels.gpu import call

    if reason := obstacle_of(model):
        say(model=model, formulation=formulation, not_run=reason)
        return []
    if call.handler_library() is None:
        say(model=model, formulation=formulation, launched_by="handler", not_run="launch.c is not compiled")
        return ["xla"]
    return ["handler", "xla"]


def kernel(batch: int, smoke: bool) -> None:
    """The kernel, launched in both ways, and the equations in bfloat16 beside the equations in float32, and twice for
    equal bits."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    for model in ("tnt_s_patch16_224", "tnt_ti_patch16_224", "tnt_b_patch16_224"):
        sentences, of_plain = SENTENCES if smoke else 3001, None
        with jax.default_matmul_precision("highest"):
            params, run, channels = layer_of("reference", model, "float32")
            words, cotangent = (draw((sentences, 16, channels), seed) for seed in (3, 4))
            rounded = words.astype(jnp.bfloat16), cotangent.astype(jnp.bfloat16)
            exact = gradient_of(run)(params, *(each.astype(jnp.float32) for each in rounded))
        for formulation in ("reference", "cuda"):
            for by in ways(model, formulation):
                params, run, _ = layer_of(formulation, model, "bfloat16")
                compute = gradient_of(run)
                with launched(by):
                    found, again = (jax.tree.leaves(compute(params, *rounded)) for _ in range(2))
                errors = []
                for one, other in zip(found, jax.tree.leaves(exact), strict=True):
                    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
                    errors.append(float(np.sqrt(np.mean((one - other) ** 2) / np.mean(other**2))))
                same = all(np.array_equal(one, other) for one, other in zip(found, again, strict=True))
                of_plain = of_plain or errors  # the equations come first
                over = max(one / plain for one, plain in zip(errors, of_plain, strict=True))
                say(model=model, formulation=formulation, launched_by=by, right=same and over <= 2,
                    over_plain=over, forward=errors[0], gradients=max(errors[1:]), same_bits=same)  # fmt: skip


def sanitizer(batch: int, smoke: bool) -> None:
    """The kernel and its gradient on a few sentences, of TNT-S and in parts of TNT-B, under NVIDIA's compute-sanitizer,
    which ends with an error."""
    import jax
    import jax.numpy as jnp

    for model in ("tnt_s_patch16_224", "tnt_b_patch16_224"):
        if reason := obstacle_of(model):
            say(model=model, not_run=reason)
            continue
        params, run, channels = layer_of("cuda", model, "bfloat16")
        words, cotangent = (draw((SENTENCES, 16, channels), seed).astype(jnp.bfloat16) for seed in (3, 4))
        jax.block_until_ready(gradient_of(run)(params, words, cotangent))
        say(model=model, sentences=SENTENCES, right=True)


def digits(batch: int, smoke: bool) -> None:
    """An epoch of `train.py` in every formulation, in bfloat16: its loss, and the images of a second."""
    for inner in ("reference", "cuda", "auto"):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "train.py", "--epochs", "1", "--run-dir", f"{folder}/run"]
            command += ["--model.inner", inner, "--model.dtype", "bfloat16"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            lines = pathlib.Path(folder, "run/metrics.jsonl")
            if done.returncode or not lines.is_file():
                say(formulation=inner, not_run=(done.stderr.strip().splitlines() or ["no message"])[-1][:300])
                continue
            fell_back = re.search("the equations in XLA: (.+)", done.stderr)
            if inner == "cuda" and fell_back:  # this process asks no card, whose memory the training needs
                say(formulation=inner, not_run=fell_back[1])
                continue
            found = [json.loads(line) for line in lines.read_text().splitlines()]
            say(formulation=inner, loss=[line["loss"] for line in found if line["kind"] == "train"][-1],
                ema_top1=found[-1].get("ema_top1"))  # fmt: skip


def inner(batch: int, smoke: bool) -> None:
    """The layer alone, forward and gradient: what an image more takes, and what a call takes that has none, which is
    folding parameters and launching; beside the first the time of its bytes."""
    import jax
    import jax.numpy as jnp

    from tnt_jax.chips import chip_of

    model, sentences = "tnt_s_patch16_224", 196 * (1 if smoke else batch)
    chip = chip_of(jax.devices()[0].device_kind)
    for formulation in ("cuda", "reference", "feature_major"):
        for by in ways(model, formulation):
            params, run, channels = layer_of(formulation, model, "bfloat16")
            spent = []
            for times in (1, MORE):
                words, cotangent = (
                    draw((times * sentences, 16, channels), seed).astype(jnp.bfloat16) for seed in (3, 4)
                )
                with launched(by):
                    forward = seconds(jax.jit(run), params, words)
                    spent.append((forward, seconds(gradient_of(run), params, words, cotangent) - forward))
            of_batch = [(more - once) / (MORE - 1) for once, more in zip(*spent, strict=True)]
            of_call = [once - each for once, each in zip(spent[0], of_batch, strict=True)]
            floor = sentences * 16 * channels * 2 * 2 / chip.bandwidth * 1e6 if chip else None
            say(formulation=formulation, launched_by=by, forward_us=of_batch[0] * 1e6, gradient_us=of_batch[1] * 1e6,
                forward_call_us=of_call[0] * 1e6, gradient_call_us=of_call[1] * 1e6, floor_us=floor)  # fmt: skip


def attention(batch: int, smoke: bool) -> None:
    """Attention between the sentences of a TNT-S, by cuDNN and by XLA, and whether its gradient has equal bits twice:
    if not, no run can be repeated."""
    import jax
    import jax.numpy as jnp

    from tnt_jax.models.formulations.attention import cudnn

    qkv = draw((1 if smoke else batch, 197, 3 * 384), 1).astype(jnp.bfloat16)
    ways = [("xla", 8), *[("cudnn", 8), ("cudnn", 1)] * (jax.default_backend() == "gpu")]
    for implementation, multiple in ways:  # the last one may be refused
        run = functools.partial(cudnn, 6, implementation=implementation, multiple=multiple)
        gradient = jax.jit(lambda qkv, run=run: jax.vjp(run, qkv)[1](qkv[..., :384]))
        same = bool((gradient(qkv)[0] == gradient(qkv)[0]).all())
        say(implementation=implementation, padded_to=multiple, same_bits=same,
            forward_us=seconds(jax.jit(run), qkv) * 1e6,
            forward_and_gradient_us=seconds(gradient, qkv) * 1e6)  # fmt: skip


def model(name: str, which: str, batch: int, smoke: bool) -> None:
    """A whole model, forward or with the gradient of all parameters."""
    import jax
    import jax.numpy as jnp
    from gpu_compile import program_of

    if name.startswith("cuda") and (reason := obstacle_of("tnt_s_patch16_224")):
        return say(model=name, which=which, not_run=reason)
    if name.endswith("cudnn") and jax.default_backend() != "gpu":
        return say(model=name, which=which, not_run="cuDNN runs on GPUs")
    batch, depth = (1, 1) if smoke else (batch, 12)
    function, shapes, _ = program_of(name, which, batch, depth)
    leaves, treedef = jax.tree.flatten(shapes)
    arrays = [
        jnp.zeros(leaf.shape, leaf.dtype)
        if leaf.dtype == jnp.uint32
        else 0.02 * draw(leaf.shape, at).astype(leaf.dtype)
        for at, leaf in enumerate(leaves)
    ]
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*shapes).compile()
    compiling = time.perf_counter() - start
    spent = seconds(compiled, *jax.tree.unflatten(treedef, arrays))
    say(
        model=name, which=which, images=batch, ms=spent * 1e3, images_per_second=batch / spent, compile_s=compiling,
        temporary_mib_an_image=compiled.memory_analysis().temp_size_in_bytes / batch / 2**20,
    )  # fmt: skip
    return None


def timm(batch: int, smoke: bool) -> None:
    """timm's TNT-S and DeiT-S under PyTorch, eager and compiled, forward and gradient, bfloat16 by autocast."""
    try:
        import timm as peer
        import torch
    except ImportError as error:
        return say(not_run=f"{error.name} is not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not smoke:
        return say(not_run="PyTorch does not see the card")
    batch = 1 if smoke else batch
    images = torch.randn(batch, 3, 224, 224, device=device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for name in ("tnt_s_patch16_224", "deit_small_patch16_224"):
        network = peer.create_model(name).to(device).train()
        for how in ("eager", *["compiled"] * (not smoke)):
            run = torch.compile(network) if how == "compiled" else network
            for which in ("forward", "train"):

                def step(run=run, which=which):
                    with torch.autocast(device, torch.bfloat16), torch.set_grad_enabled(which == "train"):
                        loss = run(images).float().logsumexp(-1).sum()
                    if which == "train":
                        loss.backward()

                for _ in range(1 if smoke else 3):
                    step()
                wait()
                calls, start = (1 if smoke else 10), time.perf_counter()
                for _ in range(calls):
                    step()
                wait()
                spent = (time.perf_counter() - start) / calls
                say(model=f"timm {name} {how}", which=which, images=batch, ms=spent * 1e3)
    return None


def knobs(batch: int, smoke: bool) -> None:
    """The kernels with other warps of a block and blocks of a multiprocessor, on twice the images."""
    import jax
    import jax.numpy as jnp

    from tnt_jax.models.kernels.gpu import call

    name = "tnt_s_patch16_224"
    if reason := obstacle_of(name):
        return say(not_run=reason)
    usual = call.warps_and_blocks
    for warps, blocks in ((8, 2), (4, 4), (4, 3), (16, 1), (12, 1), (8, 1), (4, 2)):
        call.warps_and_blocks = lambda kernel, sizes, both=(warps, blocks): both
        call.ptx.cache_clear()
        params, run, channels = layer_of("cuda", name, "bfloat16")
        words, cotangent = (draw((392 * batch, 16, channels), seed).astype(jnp.bfloat16) for seed in (3, 4))
        line = {"warps": warps, "blocks": blocks, "forward_us": seconds(jax.jit(run), params, words) * 1e6}
        if warps * blocks <= 8:  # more leave a thread too few registers for the sums
            line["forward_and_gradient_us"] = seconds(gradient_of(run), params, words, cotangent) * 1e6
        say(**line)
    call.warps_and_blocks = usual
    return None


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        part, given_batch, given_smoke = sys.argv[2], int(sys.argv[3]), sys.argv[4] == "1"
        if part.startswith("model "):
            model(*part.split()[1:], given_batch, given_smoke)
        else:
            others = (card, kernel, inner, attention, timm, knobs, digits)
            parts = {each.__name__: each for each in others} | dict.fromkeys(SANITIZERS, sanitizer)
            parts[part](given_batch, given_smoke)
    else:
        main()
