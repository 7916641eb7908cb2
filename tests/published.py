"""The golden records, and the weights and images they were made with (the rule of tests/golden/README.md)."""

import json
import zlib
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"


def record(name):
    """The arrays of a golden file and its manifest."""
    arrays = dict(np.load(GOLDEN / f"{name}.npz"))
    return arrays, json.loads(str(arrays.pop("manifest")))


def tensor(name, shape, seed):
    if name.endswith("outer_tokens"):
        return np.zeros(shape, np.float32)
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    x = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape).astype(np.float32)
    if name.endswith("running_var"):
        return np.abs(x) * np.float32(0.5) + np.float32(0.5)
    if len(shape) == 1:
        return 1 + np.float32(0.1) * x if name.endswith("weight") else np.float32(0.1) * x
    if name.endswith("weight"):
        return (x * 1.5 / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    return np.float32(0.5) * x


def state_dict(manifest):
    return {name: tensor(name, shape, manifest["seed"]) for name, shape in manifest["tensors"].items()}


def images(manifest):
    """NHWC."""
    shape = (manifest["batch"], 3, *manifest["image_size"])
    x = np.random.default_rng([manifest["seed"], 7]).standard_normal(shape).astype(np.float32)
    return x.transpose(0, 2, 3, 1)
