"""The list of what was fetched: `python -m tnt_jax.commands.cache [--clear [NAME]]`."""

import dataclasses
from typing import Annotated

import tyro

from tnt_jax.commands.cli import Flag, command
from tnt_jax.config import InputError


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Lists what `load_model` has fetched from addresses, or removes it. The hub's own cache: `hf cache`."""

    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = None
    """With --clear: remove only what has this in its name or address."""
    clear: Flag = False
    """Remove it."""


@command
def main() -> None:
    arguments = tyro.cli(Arguments)
    from tnt_jax.storage.download import cache_entries, clear_cache
    from tnt_jax.user_cache import cache_path

    if arguments.name is not None and not arguments.clear:
        raise InputError(f"{arguments.name} was given without --clear, and everything is listed")
    shown = clear_cache(arguments.name) if arguments.clear else cache_entries()
    for each in shown:
        print(f"{each.size / 1e6:9,.1f} MB  {each.kind:10}  {each.name}")
    total = sum(each.size for each in shown) / 1e6
    print(f"{total:9,.1f} MB {'removed from' if arguments.clear else 'in'} {cache_path()}")


if __name__ == "__main__":
    main()
