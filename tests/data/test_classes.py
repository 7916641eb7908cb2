"""Classes of a model and of a dataset, matched by their names."""

import pytest

from tnt_jax.config import InputError
from tnt_jax.data.classes import imagenet_names, match_classes

ANIMALS = ("cow", "bee", "ant")


@pytest.mark.parametrize(
    ("names", "data", "expected", "note"),
    [
        (ANIMALS, ANIMALS, [0, 1, 2], None),
        (ANIMALS, ("ant", "bee", "cow"), [2, 1, 0], "in another order"),
        (ANIMALS, ("bee",), [1], "has 1 of the model's 3 classes"),
        (("Polar_Bear", "ox"), ("ox", "polar bear"), [1, 0], "in another order"),
        (None, ANIMALS, [0, 1, 2], None),
        (ANIMALS, ("0", "1", "2"), [0, 1, 2], None),
        (("0", "1", "2"), ANIMALS, [0, 1, 2], None),
        # Two of ImageNet's classes are called crane: their WordNet ids are not.
        (imagenet_names(), ("n02012849", "n03126707", "n01440764"), [134, 517, 0], "has 3 of the model's 1000"),
        (("n01440764", "n01443537"), imagenet_names()[1::-1], [1, 0], "in another order"),
    ],
)
def test_classes_are_matched_by_name(names, data, expected, note):
    match = match_classes(names, len(names or data), data, "folder:f")
    assert match.of_model.tolist() == expected
    assert match.note is None if note is None else note in match.note


@pytest.mark.parametrize(
    ("names", "data", "message"),
    [
        (
            ANIMALS,
            ("x", "y", "z"),
            "f has classes that the model does not have: x, y, z; the model's 3 are cow, bee",
        ),
        (ANIMALS, (*ANIMALS, "dog"), "does not have: dog"),
        (ANIMALS, tuple("abcdefg"), "does not have: a, b, c, d, e and 2 others"),
        (None, ("bee",), "the model has 3 classes, and folder:f has 1"),
        (imagenet_names(), ("crane", "tench"), "does not have: crane, tench"),  # which crane, and not its whole name
    ],
)
def test_other_classes_are_an_error_that_lists_them(names, data, message):
    with pytest.raises(InputError, match=message):
        match_classes(names, 3 if names is None else len(names), data, "folder:f")
