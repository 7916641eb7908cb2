"""Agreement of all processes of a run on the way in which CUDA kernels are made."""

import socket

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from tnt_jax.config import ModelConfig
from tnt_jax.models.formulations.inner import cuda_sizes
from tnt_jax.models.formulations.sentences import row_sizes
from tnt_jax.models.inner import InnerTransformer
from tnt_jax.models.kernels.gpu import call
from tnt_jax.models.kernels.gpu.sizes import LayerSizes, Rows, sizes_obstacle
from tnt_jax.models.tnt import WordsToSentence, words_per_side
from tnt_jax.models.variants import abstract_model

HOST_BYTES = 64
REASON_BYTES = 512


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


def _kernel_sizes(config: ModelConfig) -> set[LayerSizes | Rows]:
    """The sizes that the CUDA kernels of a network are compiled for."""
    modules, words = [module for _, module in nnx.iter_modules(abstract_model(config))], words_per_side(config) ** 2
    inner = [module for module in modules if isinstance(module, InnerTransformer) and module.norms_each_token]
    found = {sizes for sizes in (cuda_sizes(layer, words) for layer in inner) if not sizes_obstacle(sizes)}
    projections = [row_sizes(module) for module in modules if isinstance(module, WordsToSentence)]
    return found | {sizes for sizes in projections if sizes.covered}


def _of_all(row: bytes) -> tuple[list[str], np.ndarray]:
    """The hosts of all processes, and what each of them gives: as many bytes as this one, in rows."""
    host = socket.gethostname().encode()[:HOST_BYTES].ljust(HOST_BYTES, b"\0")
    rows = multihost_utils.process_allgather(np.frombuffer(host + row, np.uint8))
    return [_text(each[:HOST_BYTES]) for each in rows], rows[:, HOST_BYTES:]


def _text(row: np.ndarray) -> str:
    return row.tobytes().rstrip(b"\0").decode(errors="replace")
