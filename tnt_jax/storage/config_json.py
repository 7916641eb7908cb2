"""A configuration as JSON, and back."""

import dataclasses
import json
import typing

from tnt_jax.config import InputError, ModelConfig, TrainConfig

NOT_THE_RUN = ("wandb", "profile", "distributed")
"""Fields of how a run is started and watched, which are no part of what it computes."""


def to_json(config: TrainConfig) -> dict:
    """A configuration as JSON holds it: nested dictionaries, tuples as lists, without how it is started and watched."""
    fields = json.loads(json.dumps(dataclasses.asdict(config)))
    return {name: value for name, value in fields.items() if name not in NOT_THE_RUN}


def from_json(values: dict, kind: type = TrainConfig[ModelConfig]):
    """The configuration that `to_json` gave, of a complete run or with `TrainConfig[ModelChanges]` of a config file.

    Raises:
        InputError: a field that this version does not have, or one that it misses.
    """
    plain_kind = typing.get_origin(kind) or kind
    if not isinstance(values, dict):
        raise InputError(f"{values!r} was found where the fields of a {plain_kind.__name__} should be")
    hints = typing.get_type_hints(plain_kind)
    if kind is not plain_kind:
        (hints["model"],) = typing.get_args(kind)
    fields = dataclasses.fields(plain_kind)
    required = {field.name for field in fields if field.default is field.default_factory is dataclasses.MISSING}
    for names, fault in ((values.keys() - hints.keys(), "has no field"), (required - values.keys(), "needs the field")):
        if names:
            listed = ", ".join(sorted(names))
            raise InputError(f"{plain_kind.__name__} {fault} {listed}; this was written by another version")

    def read(value, field_type):
        if dataclasses.is_dataclass(field_type):
            return from_json(value, field_type)
        return tuple(value) if isinstance(value, list) else value

    return plain_kind(**{name: read(value, hints[name]) for name, value in values.items()})
