"""The platform that a program is traced for, and `shard_map` around kernels, which XLA cannot partition."""

import functools
import logging
import math
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from tnt_jax.chips import GPUS
from tnt_jax.models.kernels.tpu.tile import Machine

log = logging.getLogger(__name__)
CORES = {"TPU v5": 2}  # of one device, a v5p; they share the steps of a kernel
PACKS = ("TPU v6 lite", "TPU7x")  # compute with registers of bfloat16
AUTO_MESH = "jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))"


def platform() -> str:
    """The platform that is being traced for: cpu, gpu or tpu."""
    return traced_device().platform


def device_kind() -> str:
    """The kind of device that is being traced for, as JAX calls it."""
    return traced_device().device_kind


def traced_device() -> jax.Device | jax.sharding.AbstractDevice:
    """A device of the mesh that is being traced for; without one, or where it names none, the default device."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.abstract_device is not None:
        return mesh.abstract_device
    default = jax.config.jax_default_device
    if isinstance(default, str):
        return jax.local_devices(backend=default)[0]
    return jax.devices()[0] if default is None else default


def tpu(*, interpret: bool) -> Machine:
    """The TPU that is being traced for; with `interpret`, kernels run step by step on any platform."""
    return Machine(CORES.get(device_kind(), 1), device_kind() in PACKS, interpret)


def mesh_obstacle(count: int) -> str | None:
    """The reason why the devices cannot each compute their own part of `count` rows, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        alone = jax.device_count() == 1 or jax.config.jax_default_device is not None
        return None if alone else f"kernels need to know the mesh of several devices: use jax.set_mesh({AUTO_MESH})"
    devices = math.prod(mesh.shape[name] for name in _axes_to_cut(mesh))
    return f"{count} rows cannot be divided among {devices} devices" if count % devices else None


def on_each_device(kernel: Callable, axes: tuple[int | None, ...], out_axes: int | tuple[int, ...]) -> Callable:
    """The kernel on each device's own rows. Inside of a shard_map over all axes it already is, and stays as it is.

    Args:
        axes: of the rows in each of its arguments, None for what every device has whole.
        out_axes: of the rows in what it returns.
    """
    names = _axes_to_cut(jax.sharding.get_abstract_mesh())
    if not names:
        return kernel

    def cut(axis: int | None) -> PartitionSpec:
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, names)

    outs = cut(out_axes) if isinstance(out_axes, int) else tuple(map(cut, out_axes))
    ins = tuple(map(cut, axes))
    return jax.shard_map(kernel, in_specs=ins, out_specs=outs, axis_names=set(names), check_vma=False)


def _axes_to_cut(mesh: jax.sharding.AbstractMesh) -> tuple[str, ...]:
    """The axes that XLA would partition over: all but those of a shard_map that is being traced."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind != AxisType.Manual)


def has_explicit_axes(*arrays: jax.Array | np.ndarray) -> bool:
    """True if the mesh, or that of an array, has axes of JAX's default type, under which a reshape asks for a
    sharding."""
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(array).sharding.mesh for array in arrays)]
    return any(AxisType.Explicit in mesh.axis_types for mesh in meshes)


def gpu() -> tuple[float, int] | str:
    """Compute capability and multiprocessors of the GPUs that are being traced for, or why they are not known."""
    here = [device for device in jax.devices() if device.platform == "gpu"]
    kinds = sorted({device.device_kind for device in here})
    if len({(device.device_kind, device.compute_capability, device.core_count) for device in here}) > 1:
        return f"the processes have different cards: {', '.join(kinds)}"
    kind = device_kind()
    if kind in kinds:
        return float(here[0].compute_capability), here[0].core_count
    for each in GPUS.values():  # of a program that is compiled for a card that is not here
        if each.device_kind == kind:
            return each.capability, each.multiprocessors
    return f"{kind} is no GPU that is known"


@functools.cache
def say_once(message: str) -> None:
    """A line in the log, once for each message; of several processes, process 0 says it."""
    if jax.process_index() == 0:
        log.warning(message)
