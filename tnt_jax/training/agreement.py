"""What must be the same in all processes of a run: configuration, versions, what their data holds, and how the CUDA
kernels are made."""

import hashlib
import importlib.metadata
import json
import pathlib
import socket
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from tnt_jax.config import InputError, ModelConfig, TrainConfig
from tnt_jax.models.formulations.inner import cuda_sizes
from tnt_jax.models.formulations.sentences import row_sizes
from tnt_jax.models.inner import InnerTransformer
from tnt_jax.models.kernels.gpu import call
from tnt_jax.models.kernels.gpu.sizes import Rows, Sizes, obstacle
from tnt_jax.models.tnt import WordsToSentence, words_per_side
from tnt_jax.models.variants import abstract_model
from tnt_jax.storage.run import by_role

PACKAGE = pathlib.Path(__file__).parent.parent
VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
EACH_ITS_OWN = ("data.source", "data.num_threads", "data.num_workers")
"""Fields that may differ between processes: paths, whose content is compared, and how each prepares its images."""
CODE = (".py", ".c", ".h", ".cu")
DIGEST_BYTES = 16
HOST_BYTES = 64
REASON_BYTES = 512


def facts(config: TrainConfig) -> dict[str, str]:
    """The configuration and the versions of this process, by name."""
    fields = {name: value for name, (value, _) in by_role(config).items() if name not in EACH_ITS_OWN}
    found = {f"config.{name}": json.dumps(value) for name, value in fields.items()}
    found |= {f"version of {name}": importlib.metadata.version(name) for name in VERSIONS}
    return found | {"code of tnt_jax": _code()}


def _code() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in PACKAGE.rglob("*") if path.suffix in CODE):
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
    hosts, rows = _of_all(
        b"".join(hashlib.sha256(value.encode()).digest()[:DIGEST_BYTES] for value in content.values())
    )
    digests = rows.reshape(len(rows), len(content), DIGEST_BYTES)
    for index, (host, there) in enumerate(zip(hosts, digests, strict=True)):
        if differ := [name for at, name in enumerate(content) if (there[at] != digests[0][at]).any()]:
            error = InputError(
                f"process {index} on {host} reads other data than process 0: {', '.join(differ)} differ. "
                "Every process must see the same files"
            )
            error.agreed = True
            raise error


def agree_on_kernels(config: ModelConfig) -> None:
    """Makes all processes compute their inner layers alike where the CUDA kernels are asked for.

    NVRTC or a C compiler may be missing on one host alone. The kernels are used if all can compile them, and launched
    by the handler if all have it.
    """
    if jax.process_count() == 1 or config.inner != "cuda":
        return
    for sizes in sorted(_kernel_sizes(config), key=str):
        own = call.own_means(sizes)
        reason = (own.obstacle or "").encode()[:REASON_BYTES].ljust(REASON_BYTES, b"\0")
        hosts, rows = _of_all(reason + bytes([own.handler]))
        reasons = [_text(row[:REASON_BYTES]) for row in rows]
        index = next((index for index, reason in enumerate(reasons) if reason), None)
        reason = None if index is None else f"process {index} on {hosts[index]}: {reasons[index]}"
        call.agree(sizes, call.Means(reason, handler=bool(rows[:, REASON_BYTES].all())))


def _kernel_sizes(config: ModelConfig) -> set[Sizes | Rows]:
    """What the CUDA kernels of a network are compiled for."""
    modules, words = [module for _, module in nnx.iter_modules(abstract_model(config))], words_per_side(config) ** 2
    inner = [module for module in modules if isinstance(module, InnerTransformer) and module.norms_each_token]
    found = {sizes for sizes in (cuda_sizes(layer, words) for layer in inner) if not obstacle(sizes)}
    projections = [row_sizes(module) for module in modules if isinstance(module, WordsToSentence)]
    return found | {sizes for sizes in projections if sizes.covered}


def _of_all(row: bytes) -> tuple[list[str], np.ndarray]:
    """The hosts of all processes, and what each of them gives: as many bytes as this one, in rows."""
    host = socket.gethostname().encode()[:HOST_BYTES].ljust(HOST_BYTES, b"\0")
    rows = multihost_utils.process_allgather(np.frombuffer(host + row, np.uint8))
    return [_text(each[:HOST_BYTES]) for each in rows], rows[:, HOST_BYTES:]


def _text(row: np.ndarray) -> str:
    return row.tobytes().rstrip(b"\0").decode(errors="replace")
