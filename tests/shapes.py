"""The type checker of `make shapes`: a whole number is a number, as Python's own typing has it."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
