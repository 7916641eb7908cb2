"""What is computed for: the platform, and kernels on several devices, which XLA cannot partition."""

import functools
import logging
from collections.abc import Callable

import jax
from jax.sharding import AxisType, PartitionSpec

from tnt_jax.chips import GPUS
from tnt_jax.models.kernels.tpu.tile import Machine

log = logging.getLogger(__name__)
CORES = {"TPU v5": 2}  # of one device, a v5p; they share the steps of a kernel
PACKS = ("TPU v6 lite", "TPU7x")  # compute with registers of bfloat16
AUTO_MESH = "jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))"


def platform() -> str:
    """What is being traced for: cpu, gpu or tpu."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def device_kind() -> str:
    """The kind of device that is being traced for, as JAX calls it."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.devices()[0].device_kind if mesh.empty else mesh.abstract_device.device_kind


def tpu(*, interpret: bool) -> Machine:
    """The TPU that is being traced for; with `interpret`, kernels run step by step on any platform."""
    return Machine(CORES.get(device_kind(), 1), device_kind() in PACKS, interpret)


def mesh_obstacle(count: int) -> str | None:
    """Why the devices cannot each compute their own part of `count` rows, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    if _is_manual(mesh):
        return None
    if mesh.empty and jax.device_count() > 1:
        return f"kernels need to know the mesh of several devices: use jax.set_mesh({AUTO_MESH})"
    if not mesh.empty and count % mesh.size:
        return f"{count} rows cannot be divided among {mesh.size} devices"
    return None


def on_each_device(kernel: Callable, axes: tuple[int | None, ...], out_axes: int | tuple[int, ...]) -> Callable:
    """The kernel on each device's own rows. Inside of a shard_map it already is, and is returned as it is.

    Args:
        axes: of the rows in each of its arguments, None for what every device has whole.
        out_axes: of the rows in what it returns.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or _is_manual(mesh):
        return kernel

    def cut(axis: int | None) -> PartitionSpec:
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, mesh.axis_names)

    outs = cut(out_axes) if isinstance(out_axes, int) else tuple(map(cut, out_axes))
    return jax.shard_map(kernel, in_specs=tuple(map(cut, axes)), out_specs=outs, check_vma=False)


def _is_manual(mesh: jax.sharding.AbstractMesh) -> bool:
    """Whether a shard_map over all axes of the mesh is being traced."""
    return not mesh.empty and all(kind == AxisType.Manual for kind in mesh.axis_types)


def has_explicit_axes() -> bool:
    """Whether the mesh has axes of JAX's default type, under which a reshape asks for a sharding."""
    return AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def gpu() -> tuple[float, int] | str:
    """Compute capability and multiprocessors of the GPUs that are being traced for, or why they are not known."""
    mesh = jax.sharding.get_abstract_mesh()
    here = [device for device in jax.devices() if device.platform == "gpu"]
    kinds = sorted({device.device_kind for device in here})
    if len({(device.device_kind, device.compute_capability, device.core_count) for device in here}) > 1:
        return f"the processes have different cards: {', '.join(kinds)}"
    kind = jax.devices()[0].device_kind if mesh.empty else mesh.abstract_device.device_kind
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
