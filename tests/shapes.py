"""The type checker of CHECK_SHAPES: a whole number is a number, as Python's own typing has it."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
