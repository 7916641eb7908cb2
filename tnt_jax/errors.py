"""The error that is meant for whoever gave the input."""


class InputError(ValueError):
    """Something the user gave is wrong. The message names the value and what would be right."""

    exit_code = 2
