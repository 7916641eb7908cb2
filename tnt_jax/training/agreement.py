"""What must be the same in all processes of a run: configuration, versions, and what their data holds."""

import hashlib
import importlib.metadata
import json
import pathlib
import socket
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from tnt_jax.config import InputError, TrainConfig
from tnt_jax.storage.run import by_role

PACKAGE = pathlib.Path(__file__).parent.parent
VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
EACH_ITS_OWN = ("data.source", "data.num_threads", "data.num_workers")
"""Fields that may differ between processes: paths, whose content is compared, and how each prepares its images."""
DIGEST_BYTES = 16
HOST_BYTES = 64


def facts(config: TrainConfig) -> dict[str, str]:
    """The configuration and the versions of this process, by name."""
    fields = {name: value for name, (value, _) in by_role(config).items() if name not in EACH_ITS_OWN}
    found = {f"config.{name}": json.dumps(value) for name, value in fields.items()}
    found |= {f"version of {name}": importlib.metadata.version(name) for name in VERSIONS}
    return found | {"code of tnt_jax": _code()}


def _code() -> str:
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def agree_on_content(content: Mapping[str, str]) -> None:
    """Makes sure that the data of all processes holds the same.

    Args:
        content: digests by what they are of, of the same names in all processes.

    Raises:
        InputError: a process has other data than process 0; all of them raise it, and it names the process and host.
    """
    if jax.process_count() == 1:
        return
    host = socket.gethostname().encode()[:HOST_BYTES]
    row = host.ljust(HOST_BYTES, b"\0") + b"".join(
        hashlib.sha256(value.encode()).digest()[:DIGEST_BYTES] for value in content.values()
    )
    rows = multihost_utils.process_allgather(np.frombuffer(row, np.uint8))
    digests = rows[:, HOST_BYTES:].reshape(len(rows), len(content), DIGEST_BYTES)
    for index, there in enumerate(digests):
        if differ := [name for at, name in enumerate(content) if (there[at] != digests[0][at]).any()]:
            host = rows[index, :HOST_BYTES].tobytes().rstrip(b"\0").decode(errors="replace")
            error = InputError(
                f"process {index} on {host} reads other data than process 0: {', '.join(differ)} differ. "
                "Every process must see the same files"
            )
            error.agreed = True
            raise error
