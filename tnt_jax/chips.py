"""The peak performance of chips, as their makers publish it."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of what JAX calls one device. Published figures, none of them measured by this project."""

    name: str
    memory: float
    """Bytes."""
    flops: float
    """Floating point operations a second in matrix products of bfloat16 (float16 on a V100), without sparsity."""
    bandwidth: float
    """Bytes a second from and to its memory."""


# By jax.Device.device_kind. Chips of v2, v3 and v7x are two devices each, and these are their halves.
# Sources: the pages "TPU v2" to "TPU7x" of cloud.google.com/tpu/docs; NVIDIA's data sheets of V100, A100, H100, H200,
# DGX B200 (an eighth of it) and L4, and its Ada architecture paper for the RTX 4090.
CHIPS = {
    "TPU v2": Chip("half a TPU v2", 8 * GIB, 22.5e12, 350e9),
    "TPU v3": Chip("half a TPU v3", 16 * GIB, 61.5e12, 450e9),
    "TPU v4": Chip("TPU v4", 32 * GIB, 275e12, 1228e9),
    "TPU v5 lite": Chip("TPU v5e", 16 * GIB, 197e12, 819e9),
    "TPU v5": Chip("TPU v5p", 95 * GIB, 459e12, 2765e9),
    "TPU v6 lite": Chip("TPU v6e", 32 * GIB, 918e12, 1640e9),
    "TPU7x": Chip("half a TPU v7x", 96 * GIB, 1153.5e12, 3690e9),
    "Tesla V100-SXM2-16GB": Chip("V100", 16 * GIB, 125e12, 900e9),
    "Tesla V100-SXM2-32GB": Chip("V100", 32 * GIB, 125e12, 900e9),
    "NVIDIA A100-SXM4-40GB": Chip("A100", 40 * GIB, 312e12, 1555e9),
    "NVIDIA A100-SXM4-80GB": Chip("A100", 80 * GIB, 312e12, 2039e9),
    "NVIDIA H100 80GB HBM3": Chip("H100", 80 * GIB, 989e12, 3350e9),
    "NVIDIA H200": Chip("H200", 141 * GIB, 989e12, 4800e9),
    "NVIDIA B200": Chip("B200", 180 * GIB, 2250e12, 8000e9),
    "NVIDIA L4": Chip("L4", 22.5 * GIB, 121e12, 300e9),
    "NVIDIA GeForce RTX 4090": Chip("RTX 4090", 24 * GIB, 165e12, 1008e9),
}
ALIASES = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite", "TPU v7x": "TPU7x"}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """The properties that a program for an NVIDIA GPU depends on beside its `Chip`."""

    device_kind: str
    capability: float
    """Compute capability: 9.0 is sm_90."""
    multiprocessors: int
    clock: float
    """GHz, at most."""
    l2: int
    """Bytes of its second cache."""


# By the names that --plan takes. Sources: as above, and NVIDIA's architecture papers.
GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 8.0, 108, 1.41, 40 * 2**20),
    "a100-40gb": Gpu("NVIDIA A100-SXM4-40GB", 8.0, 108, 1.41, 40 * 2**20),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 9.0, 132, 1.98, 50 * 2**20),
    "h200": Gpu("NVIDIA H200", 9.0, 132, 1.98, 60 * 2**20),
    "b200": Gpu("NVIDIA B200", 10.0, 148, 1.965, 126 * 2**20),
    "l4": Gpu("NVIDIA L4", 8.9, 58, 2.04, 48 * 2**20),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", 8.9, 128, 2.52, 72 * 2**20),
}


def shared_memory(capability: float) -> int:
    """Bytes of shared memory that a block can have on a GPU, by its compute capability."""
    return {8.0: 163, 9.0: 227, 10.0: 227}.get(capability, 99) * 2**10


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a device by its `device_kind`; None where it is not known."""
    return CHIPS.get(ALIASES.get(device_kind, device_kind))


def training_flops(macs: int) -> int:
    """Floating point operations of a training step for one image whose forward pass takes this many
    multiply-accumulates: two each, and the backward pass takes twice as many as the forward pass."""
    return 6 * macs
