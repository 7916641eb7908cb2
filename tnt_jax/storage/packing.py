"""A tree of arrays as few arrays, and back: writing an array costs a millisecond, however small it is."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

LEAST_ALONE = 2**16
"""Arrays of fewer elements are put together. A checkpoint records with which number it was written."""


def pack(tree, least_alone: int = LEAST_ALONE) -> dict[str, jax.Array]:
    """Concatenates the small arrays of each dtype, by its name; the large ones keep their path as key."""
    large, small = _by_size(tree, least_alone)
    return large | {dtype: _joined(leaves) for dtype, leaves in small.items()}


def packed_shapes(like, least_alone: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of what `pack` makes of a tree with the shapes and shardings of `like`."""
    large, small = _by_size(like, least_alone)
    # The smallest array lies whole on every device, and so may the small ones together for a moment.
    whole = min(jax.tree.leaves(like), key=lambda leaf: leaf.size).sharding
    return large | {
        dtype: jax.ShapeDtypeStruct((sum(leaf.size for leaf in leaves),), dtype, sharding=whole)
        for dtype, leaves in small.items()
    }


def unpack(packed: dict[str, jax.Array], like, least_alone: int):
    """The tree that `pack` was given, with the shardings of `like`."""
    large, small = _by_size(like, least_alone)
    parts = {dtype: iter(_parted(packed[dtype], leaves)) for dtype, leaves in small.items()}

    def leaf_at(path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return packed[_name(path)] if _name(path) in large else next(parts[str(leaf.dtype)])

    return jax.tree_util.tree_map_with_path(leaf_at, like)


def _by_size(tree, least_alone: int) -> tuple[dict, dict[str, list]]:
    large, small = {}, {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if leaf.size < least_alone:
            small.setdefault(str(leaf.dtype), []).append(leaf)
        else:
            large[_name(path)] = leaf
    return large, small


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


@jax.jit
def _joined(leaves: list[jax.Array]) -> jax.Array:
    return jnp.concatenate([leaf.ravel() for leaf in leaves])


def _parted(joined: jax.Array, like: list[jax.ShapeDtypeStruct]) -> list[jax.Array]:
    # By way of the host: to compile as many slices takes seconds.
    ends = list(itertools.accumulate(leaf.size for leaf in like))
    parts = np.split(np.asarray(joined), ends[:-1])
    return [
        jax.make_array_from_callback(leaf.shape, leaf.sharding, part.reshape(leaf.shape).__getitem__)
        for part, leaf in zip(parts, like, strict=True)
    ]


def checksums(packed: dict[str, jax.Array]) -> tuple[dict[str, int], bool]:
    """A 32-bit checksum of each array, the same on any number of devices, and whether all numbers are finite.

    It is the sum of the bit patterns modulo 2^32, each weighted by its position. The weights are odd, so any single
    changed element changes it. All is computed where the arrays lie.
    """
    sums, finite = jax.device_get(_checksums(packed))
    return {name: int(value) for name, value in sums.items()}, all(finite.values())


@jax.jit
def _checksums(packed: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    def checksum(leaf: jax.Array) -> jax.Array:
        unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, length in enumerate(leaf.shape):
            place = place * jnp.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

    return jax.tree.map(checksum, packed), jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), packed)


Layout = list[list]
"""Path, shape and dtype of each array of a tree, in order, as JSON holds them."""


def layout(tree) -> Layout:
    """All that `pack` leaves out, but for which arrays were put together."""
    return [
        [_name(path), list(leaf.shape), str(leaf.dtype)] for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
