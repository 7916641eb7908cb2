"""A train step compiled for devices that need not be there, and the search for the largest batch that fits them."""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from tnt_jax.config import TrainConfig
from tnt_jax.planning.collectives import Collective, collectives, loops

SEARCHES = 5
"""Compilations that look for the largest batch: seconds for one that does not fit, minutes for one that does."""
BEYOND = 2
"""The search begins so far beyond the largest batch that seems to fit: half of a step's memory can be spared."""
STEEPEST = 64
"""A batch that is tried may be so many times larger than the last one: from further away, the line says little."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's account of a train step, per device."""

    batch: int
    """Images of a step on one device."""
    memory: int | None
    """Bytes at the peak; None where it did not fit and the compiler did not say."""
    fits: bool
    seconds: float
    flops: float = 0.0
    traffic: float = 0.0
    """Bytes from and to the device's memory."""
    collectives: tuple[Collective, ...] = ()
    loops: tuple[int, ...] = ()


def compile_step(
    config: TrainConfig, devices: Sequence, steps_per_epoch: int = 1000, *, limit: float | None = None
) -> Compiled:
    """The train step of a run, compiled for these devices.

    Args:
        limit: bytes that fit. Without one the compiler says that a program does not fit, as TPUs' does.
        steps_per_epoch: a number in the schedule; it changes nothing of what is reported.

    Raises:
        InputError: the batch cannot be divided among the devices.
    """
    from tnt_jax.training.mesh import check_batch_size, make_mesh
    from tnt_jax.training.program import Program

    mesh = make_mesh(config.fsdp, devices)
    check_batch_size(config.batch_size, mesh, config.accumulation_steps)
    program = Program(config, mesh, steps_per_epoch)
    arguments = program.abstract_state, program.abstract_batch
    batch, start = config.batch_size // len(devices), time.perf_counter()
    try:
        compiled = program.train_step.lower(*arguments).compile()
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(
            batch, memory_wanted(str(error), bytes_of(arguments)), fits=False, seconds=time.perf_counter() - start
        )
    seconds = time.perf_counter() - start
    memory, cost, text = compiled.memory_analysis(), costs_of(compiled), compiled.as_text()
    # What is given away is used again for what comes out.
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    used += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return Compiled(
        batch,
        used,
        limit is None or used <= limit,
        seconds,
        cost.get("flops", 0.0),
        cost.get("bytes accessed", 0.0),
        tuple(collectives(text)),
        tuple(loops(text)),
    )


def costs_of(compiled: Any) -> dict[str, float]:
    """The compiler's account of a program: `flops` and `bytes accessed`; empty where there is none.

    A program for a GPU that is not there has none of its own, and XLA's count of any program's operations is had from
    the client of the CPU. That function is private to JAX; where it has gone, the plan says that there is no count.
    """
    if cost := compiled.cost_analysis():
        return cost
    import jax

    try:
        from jax._src.lib import xla_client

        count = xla_client._xla.hlo_module_cost_analysis
        return count(jax.devices("cpu")[0].client, compiled.runtime_executable().hlo_modules()[0])
    except (ImportError, AttributeError):
        return {}


def bytes_of(shapes: Any) -> int:
    """Bytes on one device of a tree of shapes with shardings."""
    import jax

    leaves = [(leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize) for leaf in jax.tree.leaves(shapes)]
    return sum(size * math.prod(shape) for shape, size in leaves)


def memory_wanted(message: str, arguments: int = 0) -> int | None:
    """The bytes that a program would take, by the compiler's message that it does not fit.

    Args:
        message: "Used 27.10G of 15.75G hbm" counts all, "required for HLO temporaries (19.71G)" not the arguments.
        arguments: their bytes.
    """
    found = re.search(r"(Used |temporaries \()([\d.]+)([KMG])", message)
    if not found:
        return None
    bytes_ = int(float(found[2]) * {"K": 2**10, "M": 2**20, "G": 2**30}[found[3]])
    return bytes_ if found[1] == "Used " else bytes_ + arguments


def largest_batch(
    first: Compiled, capacity: float, fixed: int, unit: int, compile_at: Callable[[int], Compiled]
) -> tuple[int, int | None, int]:
    """Looks for the largest batch of a device that fits, from one compilation and a few more.

    XLA computes things again where memory runs out, so what a batch takes that fits says little of larger ones. Of one
    that does not fit it says, in seconds, what would be left to take after all that: nearly a line over the batch that
    begins at `fixed` bytes. So the search comes from above, each guess where that line reaches `capacity`, and ends
    with the first batch that fits, whose program takes minutes to make.

    Returns:
        The largest batch that was seen to fit (0 for none), the smallest that was seen not to (None for none), and the
        compilations that it took.
    """
    fits, too_large, last = (first.batch, None, first) if first.fits else (0, first.batch, first)
    for search in range(SEARCHES):
        per_image = ((last.memory or 2 * capacity) - fixed) / last.batch
        reaches = (capacity - fixed) / per_image
        if too_large is None:
            guess = max(math.ceil(min(BEYOND * reaches, STEEPEST * last.batch) / unit) * unit, fits + unit)
        else:
            guess = min(max(1, int(reaches) // unit) * unit, too_large - unit)
        if guess <= fits or guess < 1:
            return fits, too_large, search
        last = compile_at(guess)
        fits, too_large = (guess, too_large) if last.fits else (fits, guess)
        if last.fits and too_large:
            return fits, too_large, search + 1
    return fits, too_large, SEARCHES


def largest_batch_by_memory(
    first: Compiled, capacity: float, fixed: int, unit: int, compile_at: Callable[[int], Compiled]
) -> tuple[int, int | None, int]:
    """As `largest_batch`, for a compiler that compiles every batch, and makes those that do not fit smaller in its way.

    So only what fits lies on a line: each guess is where that one reaches `capacity`, and the last one lies above it.
    """
    fits, too_large = (first, None) if first.fits else (None, first.batch)
    for search in range(SEARCHES):
        if fits is None:
            guess = too_large // 2 // unit * unit
        else:
            reaches = (capacity - fixed) * fits.batch / (fits.memory - fixed)
            guess = max(int(min(reaches, STEEPEST * fits.batch)) // unit * unit, fits.batch + unit)
            guess = min(guess, too_large - unit) if too_large else guess
        if guess < 1 or (fits and guess <= fits.batch):
            return fits.batch if fits else 0, too_large, search
        last = compile_at(guess)
        fits, too_large = (last, too_large) if last.fits else (fits, guess)
    return fits.batch if fits else 0, too_large, SEARCHES
