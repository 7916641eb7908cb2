"""Kernels on several devices: XLA cannot cut them, so each device runs its own on what it has."""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec


def mesh_obstacle(count: int) -> str | None:
    """Why the devices cannot each compute their own part of `count` rows, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty and jax.device_count() > 1:
        return "kernels need to know the mesh of several devices: call the model under jax.set_mesh(mesh)"
    if not mesh.empty and count % mesh.size:
        return f"{count} rows cannot be divided among {mesh.size} devices"
    return None


def on_each_device(kernel: Callable, axes: tuple[int | None, ...], out_axes: int | tuple[int, ...]) -> Callable:
    """The kernel on each device's own rows.

    Args:
        axes: of the rows in each of its arguments, None for what every device has whole.
        out_axes: of the rows in what it returns.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel

    def cut(axis: int | None) -> PartitionSpec:
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, mesh.axis_names)

    outs = cut(out_axes) if isinstance(out_axes, int) else tuple(map(cut, out_axes))
    return jax.shard_map(kernel, in_specs=tuple(map(cut, axes)), out_specs=outs, check_vma=False)
