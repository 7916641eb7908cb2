"""A train step compiled for devices that need not be there, and the search for the largest batch that fits them."""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Sequence

from tnt_jax.collectives import Collective, collectives, loops
from tnt_jax.config import TrainConfig

SEARCHES = 4
"""Compilations that look for the largest batch; one that fits may take minutes."""
BEYOND = 1.05
"""How far beyond the largest batch that may fit the search begins."""
STEEPEST = 64
"""How many times larger than the first one a batch may be that is tried."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a train step, per device."""

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


def compile_step(config: TrainConfig, devices: Sequence, steps_per_epoch: int = 1000) -> Compiled:
    """The train step of a run, compiled for these devices.

    Args:
        steps_per_epoch: a number in the schedule; it changes nothing of what is reported.

    Raises:
        InputError: the batch cannot be divided among the devices.
    """
    from tnt_jax.training.mesh import check_batch_size, make_mesh
    from tnt_jax.training.program import Program

    mesh = make_mesh(config.fsdp, devices)
    check_batch_size(config.batch_size, mesh, config.accumulation_steps)
    program = Program(config, mesh, steps_per_epoch)
    batch, start = config.batch_size // len(devices), time.perf_counter()
    try:
        compiled = program.train_step.lower(program.abstract_state, program.abstract_batch).compile()
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(batch, memory_wanted(str(error)), fits=False, seconds=time.perf_counter() - start)
    seconds = time.perf_counter() - start
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    return Compiled(
        batch,
        # What is given away is used again for what comes out.
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
        True,
        seconds,
        cost.get("flops", 0.0),
        cost.get("bytes accessed", 0.0),
        tuple(collectives(text)),
        tuple(loops(text)),
    )


def memory_wanted(message: str) -> int | None:
    """The bytes in the compiler's "Used 27.10G of 15.75G hbm"."""
    found = re.search(r"Used ([\d.]+)([KMG]) of", message)
    return int(float(found[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[found[2]]) if found else None


def largest_batch(
    first: Compiled, capacity: float, fixed: int, unit: int, compile_at: Callable[[int], Compiled]
) -> tuple[int, int | None, int]:
    """Looks for the largest batch of a device that fits, from one compilation and a few more.

    Memory is nearly a line over the batch that begins at `fixed` bytes. The compiler says in seconds that a batch does
    not fit and how much it would take, and needs minutes for one that fits. So the search comes from above: the first
    guess is a little beyond where the line reaches `capacity`, the next ones are where the line through the last two
    compilations does, between what is known to fit and what is known not to.

    Returns:
        The largest batch that was seen to fit (0 for none), the smallest that was seen not to (None for none), and the
        compilations that it took.
    """
    fits, too_large = (first.batch, None) if first.fits else (0, first.batch)
    before, last = (0, fixed), (first.batch, first.memory or 2 * capacity)
    for search in range(SEARCHES):
        slope = (last[1] - before[1]) / (last[0] - before[0])
        reaches = last[0] + (capacity - last[1]) / slope if slope > 0 else math.inf
        if too_large is None:
            # From a few images the line says little.
            reaches = min(reaches, STEEPEST * last[0])
            guess = max(math.ceil(BEYOND * reaches / unit) * unit, fits + unit)
        else:
            guess = min(max(1, int(reaches) // unit) * unit, too_large - unit)
            if guess <= fits:
                return fits, too_large, search
        found = compile_at(guess)
        before, last = last, (guess, found.memory or 2 * capacity)
        fits, too_large = (guess, too_large) if found.fits else (fits, guess)
    return fits, too_large, SEARCHES
