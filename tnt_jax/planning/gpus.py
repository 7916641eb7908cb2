"""NVIDIA GPUs that are not there, as XLA's compiler wants them described, and the devices of hosts of them."""

import math
import re

from tnt_jax.chips import CHIPS, GPUS, Chip, Gpu, shared_memory
from tnt_jax.config import InputError

KNOWN = ", ".join(f"{name}:8" for name in GPUS) + ", or h100:4x8 for 4 hosts of 8"
NUMBERS = ("capability", "multiprocessors", "memory", "bandwidth", "flops")
BY_NUMBERS = "gpu,capability=8.6,multiprocessors=84,memory=48e9,bandwidth=768e9,flops=155e12:8"
"""A card by its numbers, here those of an RTX A6000: bytes, bytes a second, FLOPs a second in bfloat16."""
DEFAULT_SHARE = 0.75
"""Of a card's memory that JAX takes by default, XLA_PYTHON_CLIENT_MEM_FRACTION."""
TOPOLOGY = re.compile(r"(?P<card>[a-z][\w-]*(?:,\w+=[\d.e+]+)*):(?:(?P<hosts>[1-9]\d*)x)?(?P<gpus>[1-9]\d*)")
F16, F32, BF16 = 10, 11, 16  # of XLA's PrimitiveType


def is_gpu(topology: str) -> bool:
    """True for a topology of GPUs: hosts x GPUs of a card by its name, or by its numbers."""
    found = TOPOLOGY.fullmatch(topology)
    return bool(found) and (found["card"] in GPUS or found["card"].startswith("gpu,"))


def card_of(topology: str) -> tuple[Gpu, Chip]:
    """The card of a topology.

    Raises:
        InputError: its numbers are not those that are needed.
    """
    card = TOPOLOGY.fullmatch(topology)["card"]
    if card in GPUS:
        return GPUS[card], CHIPS[GPUS[card].device_kind]
    given = dict(part.split("=") for part in card.split(",")[1:])
    try:
        numbers = {name: float(value) for name, value in given.items()}
    except ValueError:
        numbers = {}
    if set(numbers) != set(NUMBERS) or not all(numbers.values()):
        raise InputError(f"{topology!r} does not say {', '.join(NUMBERS)} of a card, each once; as in {BY_NUMBERS}")
    chip = Chip("GPU", numbers["memory"], numbers["flops"], numbers["bandwidth"])
    gpu = Gpu("GPU given by its numbers", numbers["capability"], int(numbers["multiprocessors"]), 1.7, 40 * 2**20)
    return gpu, chip


def gpu_devices(topology: str) -> list:
    """The devices of such a topology, in a process with JAX_PLATFORMS=cpu and the extra plan-gpu.

    Raises:
        InputError: XLA's compiler does not take the card.
    """
    from jax.experimental import topologies

    found, (gpu, chip) = TOPOLOGY.fullmatch(topology), card_of(topology)
    shape = f"1x{found['hosts'] or 1}x{found['gpus']}"
    try:
        described = topologies.get_topology_desc(
            platform="cuda", target_config=target_config(gpu, chip), topology=shape
        )
    except Exception as error:  # XLA's own, of several types
        raise InputError(f"XLA cannot compile for {topology!r}. It said: {str(error).splitlines()[0]}") from error
    return list(described.devices)


def target_config(gpu: Gpu, chip: Chip) -> str:
    """A GpuTargetConfigProto, as the files of xla/backends/gpu/target_config/specs of openxla/xla have it.

    The speed of the tensor cores is needed: without it XLA takes that of float32 for every product.
    """
    major, minor = divmod(round(gpu.capability * 10), 10)
    lanes = 64 if gpu.capability == 8.0 else 128  # multiply-adds of float32 in a cycle of a multiprocessor
    units = 4  # tensor cores of a multiprocessor
    per_cycle = 2 ** round(math.log2(chip.flops / (2 * units * gpu.multiprocessors * gpu.clock * 1e9)))
    matrix_clock = chip.flops / (2 * units * gpu.multiprocessors * per_cycle * 1e9)
    optin = shared_memory(gpu.capability)
    extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    scalar = _rates(gpu.clock, {F16: (lanes, 2), F32: (lanes, 1), BF16: (lanes, 2)})
    matrix = _rates(matrix_clock, {F16: (units, per_cycle), F32: (units, per_cycle // 2), BF16: (units, per_cycle)})
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {1536 if optin == 99 * 1024 else 2048}
  core_count: {gpu.multiprocessors} fpus_per_core: {lanes} shared_memory_per_block: 49152
  shared_memory_per_core: {optin + 1024} shared_memory_per_block_optin: {optin}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {int(chip.bandwidth)} l2_cache_size: {gpu.l2} clock_rate_ghz: {gpu.clock}
  device_memory_size: {int(chip.memory)} device_address_bits: 64
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  scalar_unit_description {{ {scalar} }} matrix_unit_description {{ {matrix} }}
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.12.0"
  name: "{gpu.device_kind}"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 patch: 0 }} device_description_str: "{gpu.device_kind}"
"""


def _rates(clock: float, of: dict[int, tuple[int, int]]) -> str:
    def rate(units: int, per_clock: int) -> str:
        return f"clock_rate_ghz: {clock} units_per_core: {units} ops_per_clock: {per_clock}"

    return " ".join(f"rate_infos {{ key: {kind} value {{ {rate(*numbers)} }} }}" for kind, numbers in of.items())
