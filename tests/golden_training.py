"""The forty published training steps, run by this project.

`python golden_training.py` prints their losses on 8 devices.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import published
from flax import nnx

from tnt_jax.config import DataConfig, ModelChanges, OptimizerConfig, TrainConfig
from tnt_jax.models.variants import resolve
from tnt_jax.storage.folder import model_from_parameters
from tnt_jax.storage.torch.read import to_parameters
from tnt_jax.training.mesh import make_mesh, replicated, shardings_of, to_devices
from tnt_jax.training.optimizer import make_optimizer
from tnt_jax.training.step import init_state, make_train_step

MODEL = ModelChanges(
    name="tnt_s_patch16_224",
    image_size=32,
    patch_size=8,
    word_stride=2,
    depth=3,
    inner_dim=12,
    inner_heads=2,
    outer_dim=48,
    outer_heads=3,
    num_classes=10,
    drop_path_rate=0.0,
)


def published_batches(manifest):
    """The manifest's `data_rule`, as NHWC."""
    rng = np.random.default_rng([manifest["seed"], 11])
    images = rng.standard_normal((manifest["steps"], manifest["batch"], 3, 32, 32)).astype(np.float32)
    labels = rng.integers(0, 10, (manifest["steps"], manifest["batch"]))
    images += (labels[..., None, None, None] - 4.5).astype(np.float32) * 0.15
    return images.transpose(0, 1, 3, 4, 2), labels


def forty_steps(record, manifest, *, devices=None, fsdp=1, remat="none", accumulation_steps=1):
    """The graph definition, the final state and the metrics of every step."""
    config = TrainConfig(
        model=resolve(dataclasses.replace(MODEL, remat=remat)),
        # The record feeds its images as they are, as floats.
        data=DataConfig.plain("digits", label_smoothing=manifest["label_smoothing"], mean=0.0, std=1.0),
        optimizer=OptimizerConfig(weight_decay=0.05, ema_decay=manifest["ema_decay"], ema_warmup=False),
        accumulation_steps=accumulation_steps,
    )
    tensors = {
        name: tensor * np.float32(0.3 if tensor.ndim > 1 else 1)
        for name, tensor in published.state_dict(manifest).items()
    }
    graphdef, params = nnx.split(model_from_parameters(config.model, to_parameters(tensors, "huawei", config.model)))

    def schedule(step):
        return jnp.asarray(record["lr"], jnp.float32)[step]

    optimizer = make_optimizer(config.optimizer, schedule)
    params = nnx.to_pure_dict(params)
    state = init_state(params, optimizer)
    mesh = make_mesh(fsdp, devices)
    shardings = shardings_of(state, mesh)
    state = jax.device_put(state, shardings)
    train_step = jax.jit(
        make_train_step(graphdef, params, optimizer, schedule, config), out_shardings=(shardings, replicated(mesh))
    )
    metrics = []
    for images, labels in zip(*published_batches(manifest), strict=True):
        state, values = train_step(state, to_devices({"image": images, "label": labels.astype(np.int32)}, mesh))
        metrics.append({name: float(value) for name, value in values.items()})
    return graphdef, state, metrics


VARIANTS = {
    "2 devices": {"devices": 2},
    "8 devices, sharded over 4, 2 parts, rematerialised": {
        "devices": 8,
        "fsdp": 4,
        "accumulation_steps": 2,
        "remat": "all",
    },
}


def main():
    # The arrays of so small a model would all stay whole.
    from tnt_jax.training import mesh

    mesh.LEAST_SHARDED_SIZE = 0
    record, manifest = published.record("huawei_training_40_steps")
    variant = VARIANTS[sys.argv[1]]
    chosen = jax.devices()[: variant["devices"]]
    _, state, metrics = forty_steps(record, manifest, **(variant | {"devices": chosen}))
    shards = len({str(shard.index) for shard in state.params["head"]["kernel"].addressable_shards})
    curves = {curve: [step[curve] for step in metrics] for curve in ("loss", "grad_norm")}
    print(json.dumps({"shards": shards} | curves))


if __name__ == "__main__":
    main()
