"""A page to try a model in the browser: `python demo.py MODEL [--port 7860]`."""

import dataclasses
from typing import Annotated

import tyro

from tnt_jax.commands.cli import command


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Serves a page on this machine: drop an image, see its likeliest classes, click a patch to see its attention."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A folder of a run or a model, a published name, OWNER/NAME on the hub, an address, or a checkpoint file."""
    port: int = 7860
    """The address of the page: http://HOST:PORT"""
    host: str = "127.0.0.1"
    """Address that is listened at: 0.0.0.0 lets every machine of the network in, without a password."""


@command
def main() -> None:
    arguments = tyro.cli(Arguments)
    from tnt_jax.demo import check_port, serve_page
    from tnt_jax.storage.load import load_model

    check_port(arguments.port, arguments.host)
    serve_page(load_model(arguments.model), arguments.model, arguments.port, arguments.host)
