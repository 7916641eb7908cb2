"""Fields of configurations: their roles, the bounds of their values, and what is wrong with a value."""

import ast
import dataclasses
import inspect
import itertools
import math
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

Role = Literal["identity", "execution", "observation"]
"""The role of a field in a run: what is computed, how it is computed, or how it is watched and kept.

Only identity binds a run that is started again. A field that is not marked is identity."""


def setting(
    default: Any = dataclasses.MISSING,
    *,
    role: Role = "identity",
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> Any:
    """A field of a configuration: its default, its role, and the bounds of its numbers."""
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    known = {words: bound for words, bound in bounds.items() if math.isfinite(bound)}
    return dataclasses.field(default=default, metadata={"role": role, "bounds": known})


def role_of(field: dataclasses.Field) -> Role:
    """The role of a field; identity where it has none."""
    return field.metadata.get("role", "identity")


def changes_of(kind: type, others: dict[str, tuple[Any, Any]], doc: str) -> type:
    """A dataclass with the fields of `kind`, each of which may be None, so that no field is written twice.

    Args:
        others: type and default of the fields where that is not so.
    """
    from typing_extensions import Doc  # where tyro looks for the help of a field

    hints, texts = typing.get_type_hints(kind), _docstrings(kind)
    fields = []
    for field in dataclasses.fields(kind):
        hint, default = others.get(field.name, (hints[field.name] | None, None))
        made = dataclasses.field(default=default, metadata=field.metadata)
        fields.append((field.name, Annotated[hint, Doc(texts.get(field.name, ""))], made))
    name = kind.__name__.replace("Config", "Changes")
    changes = dataclasses.make_dataclass(name, fields, frozen=True, namespace={"__doc__": doc})
    changes.__module__ = kind.__module__  # where pickle finds it; from Python 3.12 on a namespace cannot say so
    return changes


def _docstrings(kind: type) -> dict[str, str]:
    """The texts below the fields of a dataclass; none where modules were installed without their sources."""
    try:
        body = ast.parse(inspect.getsource(kind)).body[0].body
    except OSError:
        return {}
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def plain(value: Any) -> Any:
    """NumPy's and JAX's numbers and arrays, and lists, as Python's numbers and tuples, dtypes as their names; anything
    else as it is."""
    if isinstance(value, type) and hasattr(value, "dtype"):  # np.float32, jnp.bfloat16
        return value.__name__
    if hasattr(value, "itemsize") and hasattr(value, "name"):  # np.dtype
        return value.name
    if hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(map(plain, value)) if isinstance(value, list | tuple) else value


def faults(config: Any, prefix: str = "") -> Iterator[str]:
    """The faults of a dataclass's fields, and of those in it: a sentence for each value."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        parts = [kind for kind in getattr(hint, "__constraints__", (hint,)) if dataclasses.is_dataclass(kind)]
        if parts and not isinstance(value, tuple(parts)):
            yield f"{prefix}{field.name} is {value!r}, and must be a {parts[0].__name__}"
        elif parts:
            yield from faults(value, f"{prefix}{field.name}.")
        elif wanted := _wanted(value, hint, field.metadata.get("bounds", {})):
            yield f"{prefix}{field.name} is {value!r}, and must be {wanted}"


def _wanted(value: Any, hint: Any, bounds: dict[str, float]) -> str | None:
    """The sentence that says what a value should be; None where it is right."""
    if not any(_is(value, kind) for kind in _kinds(hint)):
        return " or ".join(map(_words, _kinds(hint)))
    if value == "":
        return "a text that is not empty"
    numbers = [number for number in (value if isinstance(value, tuple) else (value,)) if _is(number, float)]
    if not all(map(math.isfinite, numbers)):
        return "finite"
    within = {
        "at least": lambda number, bound: number >= bound,
        "above": lambda number, bound: number > bound,
        "at most": lambda number, bound: number <= bound,
        "below": lambda number, bound: number < bound,
    }
    if all(within[words](number, bound) for words, bound in bounds.items() for number in numbers):
        return None
    return " and ".join(f"{words} {bound:g}" for words, bound in bounds.items())


def _kinds(hint: Any) -> tuple:
    """The members of a union, or the type alone."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType | typing._UnionGenericAlias) else (hint,)


def _is(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        kinds = kinds[:1] * len(value) if kinds[-1] is ... and isinstance(value, tuple) else kinds
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_is, value, kinds))
    if kind in (int, float):  # Python counts True as a number
        return isinstance(value, kind | int) and not isinstance(value, bool)
    return value is None if kind is types.NoneType else isinstance(value, kind)


def _words(kind: Any) -> str:
    """A type in words."""
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(typing.get_args(kind))}"
    if typing.get_origin(kind) is tuple:
        first, *rest = typing.get_args(kind)
        many = {int: "whole numbers", float: "numbers", str: "texts"}[first]
        return many if rest == [...] else f"{1 + len(rest)} {many}"
    return {int: "a whole number", float: "a number", str: "a text", bool: "True or False", types.NoneType: "None"}[
        kind
    ]
