"""A tree of arrays as few arrays, and back: writing an array costs a millisecond, however small it is."""

import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

# Arrays of fewer elements are put together.
LEAST_ALONE = 2**16


def pack(tree) -> dict[str, jax.Array]:
    """The small arrays of each dtype one after another in one, by the name of the dtype; the others by their path."""
    large, small = _by_size(tree)
    return large | {dtype: _joined(leaves) for dtype, leaves in small.items()}


def packed_shapes(like) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of what `pack` makes of a tree with the shapes and shardings of `like`."""
    large, small = _by_size(like)
    # The smallest array lies whole on every device, and so may the small ones together for a moment.
    whole = min(jax.tree.leaves(like), key=lambda leaf: leaf.size).sharding
    return large | {
        dtype: jax.ShapeDtypeStruct((sum(leaf.size for leaf in leaves),), dtype, sharding=whole)
        for dtype, leaves in small.items()
    }


def unpack(packed: dict[str, jax.Array], like):
    """The tree that `pack` was given, with the shardings of `like`."""
    large, small = _by_size(like)
    parts = {dtype: iter(_parted(packed[dtype], leaves)) for dtype, leaves in small.items()}

    def leaf_at(path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return packed[_name(path)] if _name(path) in large else next(parts[str(leaf.dtype)])

    return jax.tree_util.tree_map_with_path(leaf_at, like)


def _by_size(tree) -> tuple[dict, dict[str, list]]:
    large, small = {}, {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if leaf.size < LEAST_ALONE:
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


def checksums(packed: dict[str, jax.Array]) -> dict[str, int]:
    """A 32-bit checksum of each array, computed where it lies, the same on any number of devices.

    The bits of each element times an odd number of its own, summed modulo 2^32: no change of one element goes unseen.
    """
    return {name: int(value) for name, value in jax.device_get(_checksums(packed)).items()}


@jax.jit
def _checksums(packed: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def checksum(leaf: jax.Array) -> jax.Array:
        unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, length in enumerate(leaf.shape):
            place = place * jnp.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

    return jax.tree.map(checksum, packed)


def layout(tree) -> int:
    """A 32-bit checksum of all that `pack` leaves out: paths, shapes and dtypes, and what it takes for small."""
    leaves = [(_name(path), leaf.shape, str(leaf.dtype)) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    return zlib.crc32(str((LEAST_ALONE, leaves)).encode())
