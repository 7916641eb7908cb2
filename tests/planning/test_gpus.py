"""Programs for NVIDIA GPUs that are not there, made by XLA's compiler for them. Nothing runs on a GPU."""

import json
import os
import subprocess
import sys

import pytest
from commands import ROOT

from tnt_jax.planning.collectives import Collective
from tnt_jax.planning.plan import environment_for

pytestmark = pytest.mark.gpu

# A block of TNT-S and its gradient for a mesh of so many cards, in the formulation `cuda`.
BLOCK = """
import json, sys
import jax, jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from tnt_jax.models.kernels.gpu import call
from tnt_jax.models.layers import ABSTRACT
from tnt_jax.models.tnt import Block
from tnt_jax.models.variants import model_config
from tnt_jax.planning.collectives import collectives
from tnt_jax.planning.gpus import gpu_devices
from tnt_jax.training.mesh import make_mesh
if sys.argv[2] == "xla":
    call.handler_library = lambda: None
mesh = make_mesh(1, gpu_devices(sys.argv[1]))
config = model_config("tnt_s_patch16_224", dtype="bfloat16", inner="cuda")
graphdef, params = nnx.split(Block(0.1, has_inner=True, config=config, rngs=ABSTRACT))
batch = 8 * mesh.size
def gradient(params, words, sentences, seed):
    def loss(params):
        outs = nnx.merge(graphdef, params)(words, sentences, jax.random.wrap_key_data(seed))
        return sum(out.astype(jnp.float32).sum() for out in outs)
    return jax.grad(loss)(params)
def place(leaf, *axes):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
words = jax.ShapeDtypeStruct((196 * batch, 16, 24), jnp.bfloat16)
sentences, seed = jax.ShapeDtypeStruct((batch, 197, 384), jnp.bfloat16), jax.ShapeDtypeStruct((2,), jnp.uint32)
arguments = (place(words, mesh.axis_names), place(sentences, mesh.axis_names), place(seed))
with jax.set_mesh(mesh):
    text = jax.jit(gradient).lower(jax.tree.map(place, params), *arguments).compile().as_text()
print(json.dumps({
    "by_handler": text.count('custom_call_target="tnt_jax_launch_cuda"'),
    "by_xla": text.count('custom_call_target="__gpu$xla.gpu.ptx"'),
    "words": text.count(f"bf16[{196 * batch // mesh.size},16,24]"),
    "sent": sum(each.bytes for each in collectives(text)),
    "parameters": sum(4 * leaf.size for leaf in jax.tree.leaves(params)),
}))
"""

# The whole train step of the published run, with the kernels.
STEP = """
import dataclasses, json, sys
from tnt_jax.config import TrainConfig, ModelChanges
from configs.imagenet_tnt_s import get_config
from tnt_jax.planning import gpus, plan
from tnt_jax.planning.compiling import compile_step
devices = gpus.gpu_devices(sys.argv[1])
config = get_config()
model = dataclasses.replace(config.model, inner="cuda")
config, _ = plan._resolved(dataclasses.replace(config, model=model, batch_size=16 * len(devices)))
step = compile_step(config, devices, limit=gpus.DEFAULT_SHARE * 80e9)
print(json.dumps(dataclasses.asdict(step)))
"""

# The step of a TNT-Ti of one block by the equations, 144 images a card: 9 groups of 128 on 8 cards.
GROUPS = """
import dataclasses, json, sys
from configs.imagenet_tnt_ti import get_config
from tnt_jax.planning import gpus, plan
from tnt_jax.planning.compiling import compile_step
config = get_config()
model = dataclasses.replace(config.model, depth=1)
config, _ = plan._resolved(dataclasses.replace(config, model=model, batch_size=8 * 144))
step = compile_step(config, gpus.gpu_devices(sys.argv[1]), limit=gpus.DEFAULT_SHARE * 80e9)
print(json.dumps({"memory": step.memory}))
"""


# The gradient of logits that are enlarged, as of ADE20K's configuration.
ENLARGED = """
import json, sys
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from tnt_jax.models.heads import resized
from tnt_jax.planning.gpus import gpu_devices
place = SingleDeviceSharding(gpu_devices(sys.argv[1])[0])
maps, targets = (jax.ShapeDtypeStruct((2, side, side, 150), jnp.float32, sharding=place) for side in (128, 512))
gradient = jax.jit(jax.grad(lambda maps, targets: ((resized(maps, (512, 512)) - targets) ** 2).sum()))
print(json.dumps({"bytes": gradient.lower(maps, targets).compile().memory_analysis().temp_size_in_bytes}))
"""


def compiled(program, topology, *arguments) -> dict:
    settings = environment_for(topology) | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    command = [sys.executable, "-c", program, topology, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("topology", "by"), [("h100:1", "handler"), ("h100:1", "xla"), ("h100:8", "handler"), ("a100:1", "handler")]
)
def test_a_block_has_the_kernels_for_its_own_sentences(topology, by):
    found = compiled(BLOCK, topology, by)
    calls = {"handler": found["by_handler"], "xla": found["by_xla"]}
    assert calls.pop(by) == 4, "forward, its gradient in two, and the gradient of words to sentence"
    assert [*calls.values()] == [0]
    assert found["words"], "the words of its own images"
    gradient = found["parameters"] if topology == "h100:8" else 0
    assert gradient <= found["sent"] <= 1.02 * gradient


@pytest.mark.parametrize(("topology", "cards"), [("h100:8", 8), ("h100:2x8", 16)])
def test_the_train_step_fits_and_sends_the_gradient_once(topology, cards):
    step = compiled(STEP, topology)
    assert step["fits"]
    assert 1 * 2**30 < step["memory"] < 4 * 2**30
    assert step["flops"] > 16 * 25e9
    sent = [Collective(**each) for each in step["collectives"] if each["kind"] == "all-reduce"]
    assert {each.group for each in sent} == {cards}
    # 23.8 M parameters in float32, and the stem's kernel as the matrix that it is multiplied as, 1.2% more.
    assert 0.99 * 4 * 23.8e6 < sum(each.bytes for each in sent) < 1.03 * 4 * 23.8e6


def test_each_card_has_its_own_images_alone_where_groups_of_128_do_not_fit_the_cards():
    """Else each computes the whole batch, in 6 GiB; of its own images it is less than one."""
    assert compiled(GROUPS, "h100:8")["memory"] < 1.5 * 2**30


def test_the_gradient_of_enlarged_logits_compiles():
    assert compiled(ENLARGED, "h100:8")["bytes"] > 0
