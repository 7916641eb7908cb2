"""Trees of parameters, nested dictionaries: their paths, parts of them, and what is frozen."""

import fnmatch
import re
from collections.abc import Sequence

import jax

from tnt_jax.config import InputError

ALL_BUT = "all-but-"


def overwritten(params: dict, statistics: dict) -> dict:
    """Parameters with the running averages that a forward pass has left, a part of the same tree."""
    return params | {
        name: overwritten(params[name], value) if isinstance(value, dict) else value
        for name, value in statistics.items()
    }


def part_of(params: dict, like: dict) -> dict:
    """The leaves of a tree that are at the places of another."""
    return {
        name: part_of(params[name], value) if isinstance(value, dict) else params[name] for name, value in like.items()
    }


def frozen_mask(params: dict, patterns: Sequence[str]) -> dict:
    """True for the parameters that a run does not move.

    Args:
        patterns: beginnings of paths such as `blocks.0.outer`, with ranges of numbers (`blocks.0-8`) and wildcards
            (`blocks.*.inner`); after `all-but-` what stays free, such as `all-but-head`.

    Raises:
        InputError: a pattern fits no parameter, or all are frozen.
    """
    paths = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(params)]
    frozen = set()
    for pattern in patterns:
        beginning = pattern.removeprefix(ALL_BUT)
        found = {path for path in paths if _begins(path.split("."), beginning.split("."))}
        if not found:
            there = ", ".join(dict.fromkeys(path.partition(".")[0] for path in paths))
            raise InputError(f"freeze is {pattern!r}, which fits no parameter; their paths begin with {there}")
        frozen |= set(paths) - found if beginning != pattern else found
    if paths and len(frozen) == len(paths):
        raise InputError(f"freeze is {' '.join(patterns)}, which leaves no parameter to train")
    return jax.tree.unflatten(jax.tree.structure(params), [path in frozen for path in paths])


def _begins(path: list[str], pattern: list[str]) -> bool:
    return len(pattern) <= len(path) and all(map(_fits, path, pattern))


def _fits(key: str, wanted: str) -> bool:
    if ends := re.fullmatch(r"(\d+)-(\d+)", wanted):
        return key.isdigit() and int(ends[1]) <= int(key) <= int(ends[2])
    return fnmatch.fnmatchcase(key, wanted)
