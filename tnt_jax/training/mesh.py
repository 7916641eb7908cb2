"""Devices, and where things lie on them."""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tnt_jax.config import InputError

# Smaller arrays lie whole on every device: to fetch them from others takes longer than it saves memory.
LEAST_SHARDED_SIZE = 2**14


def make_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Devices (by default all, of all processes), `fsdp` of them sharing one copy of parameters and optimizer state.

    Raises:
        InputError: the devices cannot be divided so.
    """
    count = jax.device_count() if devices is None else len(devices)
    if fsdp < 1 or count % fsdp:
        raise InputError(f"fsdp is {fsdp}, and must divide the number of devices, {count}")
    # Auto, because JAX's default is Explicit, where the model's reshapes would need shardings of their own.
    shape = (count // fsdp, fsdp)
    try:
        return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    except ValueError as error:
        raise InputError(f"JAX makes no mesh of these {count} devices; a run trains on one slice: {error}") from error


def check_batch_size(batch_size: int, mesh: Mesh, accumulation_steps: int = 1) -> None:
    """Raises InputError unless every device gets the same number of images in every part of a step."""
    parts = mesh.devices.size * accumulation_steps
    if accumulation_steps < 1:
        raise InputError(f"accumulation_steps is {accumulation_steps}, and must be at least 1")
    if batch_size < 1 or batch_size % parts:
        steps = f" in {accumulation_steps} accumulation steps" if accumulation_steps > 1 else ""
        nearest = max(1, round(batch_size / parts)) * parts
        devices = f"{mesh.devices.size} devices{steps}"
        raise InputError(f"batch_size {batch_size} cannot be divided among {devices}; the nearest is {nearest}")


def on_mesh(mesh: Mesh, function: Callable, precision: str = "highest") -> Callable:
    """The same function, whose modules can ask for the mesh and its platform: kernels are not cut by XLA.

    Args:
        precision: of the products of float32 matrices on accelerators, as `TrainConfig.precision`.
    """

    @functools.wraps(function)
    def on_it(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), jax.default_matmul_precision(precision):
            return function(*arguments)

    return on_it


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The first axis cut among all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def shard_over_batch(x: jax.Array) -> jax.Array:
    """The same array, with its first axis cut among all devices of the mesh that is traced for.

    Where rows are taken apart in a way that does not fit the devices, XLA gathers all of them on every device, and
    without this goes on so: each device would compute the whole batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, PartitionSpec(mesh.axis_names))


def shardings_of(state, mesh: Mesh):
    """For every array of a state, its sharding: its longest axis that can be divided is cut over "fsdp"."""
    size = mesh.shape["fsdp"]

    def sharding(leaf) -> NamedSharding:
        divisible = [axis for axis, length in enumerate(leaf.shape) if length % size == 0]
        if size == 1 or leaf.size < LEAST_SHARDED_SIZE or not divisible:
            return replicated(mesh)
        cut = max(divisible, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*("fsdp" if axis == cut else None for axis in range(leaf.ndim))))

    return jax.tree.map(sharding, state)


def rows_of_process(batch_size: int, mesh: Mesh, process: int | None = None) -> tuple[int, ...]:
    """The rows of a batch that lie on the devices of a process (by default this one), ascending.

    They need not follow each other: a mesh has the order of a TPU slice's wires, and not that of its hosts.
    """
    process = jax.process_index() if process is None else process
    places = over_batch(mesh).devices_indices_map((batch_size,))
    own = [range(batch_size)[rows] for device, (rows,) in places.items() if device.process_index == process]
    return tuple(sorted(row for rows in own for row in rows))


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The rows of a batch that `rows_of_process` says to the global arrays of all processes."""
    sharding = over_batch(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
