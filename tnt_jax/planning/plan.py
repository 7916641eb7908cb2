"""The plan of a run for chips that are not here: its real train step, compiled for them on any machine.

    python train.py --plan v5e:16x16 --config configs/imagenet_tnt_s.py
    python train.py --plan h100:8 --config configs/imagenet_tnt_s.py

Everything that is said is what the compiler says. Nothing runs, no parameters are made and no images are read.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence

import rich.console
import rich.table

from tnt_jax.chips import GIB, Chip, chip_of, training_flops
from tnt_jax.config import InputError, ModelChanges, ModelConfig, TrainConfig, check
from tnt_jax.planning import gpus
from tnt_jax.planning.collectives import Collective
from tnt_jax.planning.compiling import Compiled, bytes_of, compile_step, largest_batch, largest_batch_by_memory

KNOWN_TPUS = "v5e:2x4, v5e:16x16, v6e:4x4, v5p:2x2x1, v4:2x2x2, v3:2x2, tpu7x:2x2x1, ..."
KNOWN = f"{KNOWN_TPUS}, cpu:8, {gpus.KNOWN}; another card by its numbers is {gpus.BY_NUMBERS}"


def environment_for(topology: str) -> dict[str, str]:
    """The environment variables that the process needs which compiles for a topology.

    Raises:
        InputError: it is no topology, or the compiler for it is not installed.
    """
    on_gpus = gpus.is_gpu(topology)
    if not on_gpus and not re.fullmatch(r"cpu:[1-9]\d{0,3}|(v\d|tpu)\w*:\d+(x\d+){1,2}", topology):
        raise InputError(f"{topology!r} is no topology{_guess(topology)}; there are {KNOWN}")
    kind, _, size = topology.partition(":")
    environment = {"JAX_PLATFORMS": "cpu"}
    if kind == "cpu":
        flags = os.environ.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={size}"
    elif on_gpus:
        gpus.card_of(topology)
        if not importlib.util.find_spec("jax_cuda13_plugin") or not importlib.util.find_spec("nvidia"):
            raise InputError(
                f"to compile for {topology} takes XLA's compiler for GPUs, which is not installed: "
                "pip install -e '.[plan-gpu]'"
            )
        environment["TF_CPP_MIN_LOG_LEVEL"] = "3"  # what a program takes that does not fit is said by the plan
    else:
        if not importlib.util.find_spec("libtpu"):
            raise InputError(
                f"to compile for {topology} takes libtpu, which is not installed: pip install -e '.[plan]'"
            )
        environment |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # of the machine that there is not; any will do
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # its lock is for who uses the chips
            "TPU_STDERR_LOG_LEVEL": "3",
            "TPU_MIN_LOG_LEVEL": "3",
        }
    return environment


def print_plan(config: TrainConfig[ModelChanges], topology: str) -> None:
    """Prints the plan of a run on `topology`, such as v5e:16x16, h100:8 or cpu:8, in a process with its
    `environment_for`.

    Raises:
        InputError: the compiler does not know the topology, or the batch cannot be divided among its devices.
    """
    console = rich.console.Console(highlight=False, markup=False, soft_wrap=True)
    config, note = _resolved(config)
    devices = _devices(topology)
    chip = _chip(topology, devices)
    if note:
        console.print(note)
    # Nothing fails on a GPU for lack of memory: what JAX takes of it is compared with what the program takes.
    limit = gpus.DEFAULT_SHARE * chip.memory if gpus.is_gpu(topology) else None
    step = _timed(console, config, devices, config.batch_size // len(devices), limit)
    console.print(_heading(config, topology, devices, chip))
    console.print(_table(config, step, chip, limit), end="")
    if step.fits:
        console.print(_collectives_table(step.collectives), end="")
    if chip:
        console.print(_largest(console, config, devices, chip, step, limit))


def _resolved(config: TrainConfig[ModelChanges]) -> tuple[TrainConfig[ModelConfig], str | None]:
    """The configuration with every field of its model, and a note where the classes are assumed."""
    from tnt_jax.data.opening import open_split
    from tnt_jax.models.variants import complete, resolve

    check(config)
    note, classes = None, config.model.num_classes
    if classes is None:
        try:
            classes = len(open_split(config.data, config.data.train_split).class_names)
        except (InputError, ImportError):
            classes = resolve(config.model).num_classes
            note = f"{config.data.source} is not on this machine: planned with {classes} classes"
    return complete(config, classes), note


def _devices(topology: str) -> list:
    import jax
    from jax.experimental import topologies

    if topology.startswith("cpu:"):
        return jax.devices()
    if gpus.is_gpu(topology):
        return gpus.gpu_devices(topology)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # libtpu's own, of several types
        raise InputError(
            f"libtpu knows no topology {topology!r}; there are {KNOWN_TPUS}. It said: {str(error).splitlines()[0]}"
        ) from error


def _chip(topology: str, devices: list) -> Chip | None:
    """The chip of one device of a topology; libtpu describes the v4 as two devices a chip, which a real one joins."""
    if gpus.is_gpu(topology):
        return gpus.card_of(topology)[1]
    chip = chip_of(devices[0].device_kind)
    chips = math.prod(map(int, topology.partition(":")[2].split("x")))
    if chip is None or len(devices) != 2 * chips or chip.name.startswith("half"):
        return chip
    return Chip(f"half a {chip.name}", chip.memory / 2, chip.flops / 2, chip.bandwidth / 2)


def _timed(
    console: rich.console.Console, config: TrainConfig, devices: list, batch: int, limit: float | None
) -> Compiled:
    console.print(f"compiling for {batch} images a device ...", end=" ")
    step = compile_step(config, devices, limit=limit)
    used = _bytes(step.memory) if step.memory else "memory unknown"
    console.print(f"{used}, {'fits' if step.fits else 'does not fit'} ({step.seconds:.0f} s)")
    return step


def _heading(config: TrainConfig, topology: str, devices: list, chip: Chip | None) -> str:
    what = f"{len(devices)} x {chip.name if chip else devices[0].device_kind}"
    parts = f" in {config.accumulation_steps} parts" if config.accumulation_steps > 1 else ""
    shared = f", parameters over {config.fsdp}" if config.fsdp > 1 else ""
    return (
        f"{config.model.name} in {config.model.dtype} on {topology} ({what}): batch {config.batch_size}{parts}{shared}"
    )


def _table(config: TrainConfig, step: Compiled, chip: Chip | None, limit: float | None) -> rich.table.Table:
    import jax

    from tnt_jax.models.summary import count_macs

    table = _new_table("of each device", "")
    memory = _bytes(step.memory) if step.memory else "more than there is"
    of = f" of {chip.memory / GIB:.0f} GiB: {'fits' if step.fits else 'does not fit'}" if chip else ""
    if limit:
        of += f" into the {limit / GIB:.1f} GiB that JAX takes by default"
    table.add_row("memory at its peak", memory + of)
    table.add_row("images of a step", str(step.batch))
    model_flops = training_flops(sum(count_macs(config.model).values()))
    table.add_row("FLOPs of an image, by the model", _count(model_flops))
    if step.flops:
        once = "at least " if step.loops else ""
        table.add_row("FLOPs of an image, as compiled", once + _count(step.flops / step.batch))
        table.add_row("memory traffic of an image", f"{once}{_count(step.traffic / step.batch)}B")
        if chip:
            compute, traffic = step.flops / chip.flops, step.traffic / chip.bandwidth
            by = "memory traffic" if traffic > compute else "FLOPs"
            table.add_row("images/s at the chip's peaks", f"at most {step.batch / max(compute, traffic):.0f}, by {by}")
        if step.loops:
            runs = ", ".join(map(str, sorted(set(step.loops))))
            table.add_row("loops", f"the compiler counts a body once; they run {runs} times")
    elif step.fits:
        table.add_row("FLOPs and traffic as compiled", f"not known: JAX {jax.__version__} does not count them")
    table.add_row("compiled in", f"{step.seconds:.0f} s")
    return table


def _collectives_table(found: Sequence[Collective]) -> rich.table.Table | str:
    if not found:
        return "nothing is sent between devices\n"
    table = _new_table("sent in a step", "operations", "devices together", "bytes on each")
    for kind, group in sorted({(each.kind, each.group) for each in found}, key=str):
        same = [each.bytes for each in found if (each.kind, each.group) == (kind, group)]
        together = "in pairs" if kind == "collective-permute" else str(group or "all")
        table.add_row(kind, str(len(same)), together, f"{sum(same):,}")
    return table


def _bytes(count: float) -> str:
    """Bytes with three digits that mean something, in the largest binary unit that is not below one."""
    power = min(3, max(0, int(math.log2(max(count, 1)) // 10)))
    return f"{count / 2 ** (10 * power):#.3g}".rstrip(".") + (" B", " KiB", " MiB", " GiB")[power]


def _count(count: float) -> str:
    """A number with three digits that mean something and a decimal prefix, as `31.3 G`."""
    power = min(3, max(0, int(math.log10(max(count, 1)) // 3)))
    return f"{count / 1000**power:#.3g}".rstrip(".") + (" ", " k", " M", " G")[power]


def _new_table(*columns: str) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for at, column in enumerate(columns):
        table.add_column(column, justify="right" if at and len(columns) > 2 else "left")
    return table


def _largest(
    console: rich.console.Console,
    config: TrainConfig,
    devices: list,
    chip: Chip,
    first: Compiled,
    limit: float | None,
) -> str:
    def compile_at(batch: int) -> Compiled:
        return _timed(console, dataclasses.replace(config, batch_size=batch * len(devices)), devices, batch, limit)

    unit = config.accumulation_steps * (8 if first.batch >= 8 * config.accumulation_steps else 1)
    search, capacity = (largest_batch_by_memory, limit) if limit else (largest_batch, 0.98 * chip.memory)
    fits, too_large, _ = search(first, capacity, _state_bytes(config, devices), unit, compile_at)
    if not fits:
        smaller = "" if config.model.remat == "all" else "--model.remat all, "
        return (
            f"The smallest batch that was tried, {too_large} images a device, does not fit. "
            f"Less memory: {smaller}--accumulation-steps, --fsdp, --model.dtype bfloat16"
        )
    limit = f"{too_large} does not" if too_large else "larger ones were not tried"
    text = f"Largest batch: {fits} images a device fit ({fits * len(devices)} in all), {limit}."
    if not first.fits and config.model.remat != "all":
        text += " For larger ones: --model.remat all, or --accumulation-steps N, which computes a batch in N parts."
    return text


def _state_bytes(config: TrainConfig, devices: list) -> int:
    """Of parameters, average and optimizer on one device."""
    from tnt_jax.training.mesh import make_mesh
    from tnt_jax.training.program import Program

    return bytes_of(Program(config, make_mesh(config.fsdp, devices), 1000).abstract_state)


def _guess(topology: str) -> str:
    """The topology that Google names by a number of chips, of v5e or v6e."""
    found = re.fullmatch(r"v(5litepod|5e|5lite|6e)-(\d+)", topology)
    sizes = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
    if not found or int(found[2]) not in sizes:
        return ""
    return f" (did you mean {'v6e' if found[1] == '6e' else 'v5e'}:{sizes[int(found[2])]}?)"
