"""The idioms of Flax's own guides work on our models, and what cannot work says what to write."""

import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from commands import ROOT
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from small_models import small_model, small_pyramid

import tnt_jax
from tnt_jax.models.formulations import devices
from tnt_jax.models.tnt import TNT
from tnt_jax.models.variants import build_model, model_config

IMAGES = jnp.asarray(np.random.default_rng(0).standard_normal((4, 32, 32, 3)), jnp.float32)
LABELS = jnp.array([0, 1, 2, 0])


def make(kind, **changes):
    return {"tnt": small_model, "pyramid": small_pyramid}[kind](drop_path_rate=0.5, drop_rate=0.1, **changes)


def loss_of(model, images, labels, rngs=None):
    return optax.softmax_cross_entropy_with_integer_labels(model(images, rngs=rngs), labels).mean()


@pytest.mark.parametrize("kind", ["tnt", pytest.param("pyramid", marks=pytest.mark.nightly)])
class TestRandomness:
    @pytest.mark.slow
    def test_rngs_are_a_key(self, kind):
        model = make(kind)
        key = nnx.Rngs(0).dropout()
        np.testing.assert_array_equal(make(kind)(IMAGES, rngs=nnx.Rngs(0)), make(kind)(IMAGES, key))
        assert not np.array_equal(model(IMAGES, rngs=nnx.Rngs(dropout=1)), model(IMAGES))
        with pytest.raises(tnt_jax.InputError, match="a key or rngs, and got both"):
            model(IMAGES, key, rngs=nnx.Rngs(0))

    @pytest.mark.slow
    def test_train_and_eval_do_what_flax_says(self, kind):
        model = make(kind)
        plain = model(IMAGES)
        model.train()
        with pytest.raises(tnt_jax.InputError, match=r"model\(images, key\) or model\(images, rngs=rngs\)"):
            model(IMAGES)
        with pytest.raises(tnt_jax.InputError, match="needs randomness"):
            model.forward_features(IMAGES)
        rngs = nnx.Rngs(0)
        first, second = model(IMAGES, rngs=rngs), model(IMAGES, rngs=rngs)
        assert not np.array_equal(first, second)
        model = make(kind)
        model.eval()
        np.testing.assert_array_equal(model(IMAGES, rngs=rngs), plain)
        np.testing.assert_array_equal(nnx.view(model, deterministic=True)(IMAGES), plain)


@pytest.mark.slow
def test_training_moves_the_averages_of_batch_norm():
    model = small_pyramid()
    before = np.asarray(model.stem.common.norm.mean[...])
    model.train()
    model(IMAGES, rngs=nnx.Rngs(0))
    assert not np.array_equal(model.stem.common.norm.mean[...], before)


@pytest.mark.slow
def test_a_model_is_made_as_flax_makes_modules():
    config = model_config("tnt_ti_patch16_224", image_size=32, depth=1, num_classes=3)
    model = TNT(config, rngs=nnx.Rngs(0))
    assert model(IMAGES).shape == (4, 3)
    np.testing.assert_array_equal(model(IMAGES), TNT(config, rngs=nnx.Rngs(0))(IMAGES))
    assert not np.array_equal(model(IMAGES), TNT(config, rngs=nnx.Rngs(1))(IMAGES))
    shapes = nnx.eval_shape(lambda: TNT(config, rngs=nnx.Rngs(0)))
    assert shapes.head.kernel.shape == (192, 3)

    @nnx.vmap(in_axes=0, out_axes=0)
    def ensemble(key):
        return TNT(config, rngs=nnx.Rngs(key))

    models = ensemble(jax.random.split(jax.random.key(0), 2))
    logits = nnx.vmap(lambda model, images: model(images), in_axes=(0, None))(models, IMAGES)
    assert logits.shape == (2, 4, 3)
    assert not np.array_equal(logits[0], logits[1])


def test_a_parameter_does_not_change_the_initial_values_of_the_others():
    def parameters(**changes):
        config = model_config("tnt_ti_patch16_224", image_size=32, num_classes=3, **changes)
        return dict(nnx.to_flat_state(nnx.state(build_model(config, seed=3))))

    few = parameters(depth=1, word_positions=False)
    many = parameters(depth=2, squeeze_excitation=True)
    assert few.keys() < many.keys()
    for path, value in few.items():
        np.testing.assert_array_equal(value.get_value(), many[path].get_value())
    kernels = [many["blocks", index, "outer", "mlp", "fc1", "kernel"].get_value() for index in (0, 1)]
    assert not np.array_equal(*kernels)
    np.testing.assert_allclose(np.std(kernels[0]), 0.02, rtol=0.02)


def test_optimizer_and_value_and_grad_lower_the_loss():
    model = small_model()
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, rngs):
        loss, grads = nnx.value_and_grad(loss_of)(model, IMAGES, LABELS, rngs)
        optimizer.update(model, grads)
        return loss

    model.train()
    rngs = nnx.Rngs(0)
    losses = [float(step(model, optimizer, rngs)) for _ in range(10)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
def test_a_new_head_is_trained_alone_and_the_rest_is_frozen():
    model = small_model()
    model.head = nnx.Sequential(nnx.Linear(12, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 5, rngs=nnx.Rngs(1)))
    in_head = nnx.All(nnx.Param, nnx.PathContains("head"))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=in_head)
    before = jax.tree.map(jnp.copy, nnx.state(model))
    graphdef, head, rest = nnx.split(model, in_head, ...)
    grads = jax.grad(lambda head: loss_of(nnx.merge(graphdef, head, rest), IMAGES, LABELS % 5))(head)
    optimizer.update(model, grads)
    for path, value in nnx.to_flat_state(nnx.state(model)):
        moved = not np.array_equal(value.get_value(), dict(nnx.to_flat_state(before))[path].get_value())
        assert moved == (path[0] == "head"), path


@pytest.mark.slow
def test_parameters_and_averages_are_split_by_their_kind():
    graphdef, parameters, averages = nnx.split(small_pyramid(), nnx.Param, nnx.BatchStat)
    assert {path[-1] for path, _ in nnx.to_flat_state(averages)} == {"mean", "var"}
    assert nnx.merge(graphdef, parameters, averages)(IMAGES).shape == (4, 3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tnt", pytest.param("pyramid", marks=pytest.mark.nightly)])
def test_the_reference_is_differentiated_in_every_way(kind):
    graphdef, state = nnx.split(make(kind, inner="reference"))
    direction = jnp.ones_like(IMAGES[:1])

    def along(step):
        return loss_of(nnx.merge(graphdef, state), IMAGES[:1] + step * direction, LABELS[:1])

    @jax.jit
    def derivatives(step):
        _, forward = jax.jvp(along, (step,), (1.0,))
        return forward, jax.grad(along)(step), jax.hessian(along)(step), jax.grad(jax.grad(along))(step)

    forward, backward, forward_of_backward, twice_backward = derivatives(0.0)
    np.testing.assert_allclose(forward, backward, rtol=1e-4)
    np.testing.assert_allclose(forward_of_backward, twice_backward, rtol=1e-3)


def test_forward_mode_elsewhere_says_to_take_the_reference():
    model = small_model()
    with pytest.raises(tnt_jax.InputError, match='inner="reference"'):
        jax.jvp(model, (IMAGES,), (IMAGES,))


def test_an_empty_batch_is_refused():
    with pytest.raises(tnt_jax.InputError, match=r"\(0, 32, 32, 3\), and a batch has at least one image"):
        small_model()(jnp.zeros((0, 32, 32, 3)))


def test_pixels_are_refused():
    with pytest.raises(tnt_jax.InputError, match=r"images are uint8 pixels; normalise them, for example"):
        small_model()(jnp.zeros((1, 32, 32, 3), jnp.uint8))


MESHES = """
import jax, numpy as np, sys
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from small_models import small_model
import tnt_jax

images = np.random.default_rng(0).standard_normal((4, 32, 32, 3)).astype(np.float32)
model = small_model(inner=sys.argv[1])
expected = np.asarray(model(images))
auto = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
sharded = jax.device_put(images, NamedSharding(auto, PartitionSpec("data")))
with jax.set_mesh(auto):
    np.testing.assert_allclose(jax.jit(model)(sharded), expected, atol=1e-5)
rows = PartitionSpec("data")
parts = jax.shard_map(model, mesh=auto, in_specs=rows, out_specs=rows, check_vma=False)
np.testing.assert_allclose(jax.jit(parts)(images), expected, atol=1e-5)
assert ("ffi_call" in str(jax.make_jaxpr(parts)(images))) == (sys.argv[1] != "reference")
explicit = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
with jax.set_mesh(explicit):
    try:
        model(jax.device_put(images, NamedSharding(explicit, PartitionSpec("data"))))
    except tnt_jax.InputError as error:
        assert "axis_types=(AxisType.Auto,)" in str(error), error
    else:
        raise AssertionError
"""


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["native", "reference"])
def test_meshes_and_shard_map(inner):
    """Kernels run under a mesh with Auto axes and inside of a user's shard_map; Explicit axes are refused."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    paths = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", MESHES, inner], env=os.environ | paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.nightly
@pytest.mark.parametrize(("graph_mode", "graph_updates"), [("true", "false"), ("false", "true")])
def test_in_a_mode_of_flax_between_the_two(graph_mode, graph_updates):
    modes = {"NNX_GRAPH_MODE": graph_mode, "NNX_GRAPH_UPDATES": graph_updates}
    # The usual mode, both true, is that of the suite; both false is that of another line of `make nightly`.
    tests = ["tests/models/test_flax.py", "tests/storage/test_folder.py"]
    which = "not slow and not nightly and not gpu and not demo"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-m", which, *tests]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | modes, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def parts_of(layer):
    return {
        "qkv": (layer.attn, "qkv"),
        "proj": (layer.attn, "proj"),
        "fc1": (layer.mlp, "fc1"),
        "fc2": (layer.mlp, "fc2"),
    }


PARTS = ["qkv", "proj", "fc1", "fc2", "words"]


@pytest.mark.parametrize(
    ("lora", "kind", "part"),
    [
        ("LoRALinear", "tnt", "words"),
        *(pytest.param("LoRALinear", "tnt", part, marks=pytest.mark.nightly) for part in PARTS[:-1]),
        *(
            pytest.param("LoRA", "tnt", part, marks=pytest.mark.slow if part == "fc2" else pytest.mark.nightly)
            for part in PARTS
        ),
        *(pytest.param("LoRA", "pyramid", part, marks=pytest.mark.nightly) for part in PARTS),
        *(pytest.param("LoRALinear", "pyramid", part, marks=pytest.mark.nightly) for part in PARTS),
    ],
)
def test_lora_is_computed_wherever_it_is_put_and_has_a_gradient(kind, part, lora, caplog):
    """A kernel reads the parameters of the maps that it was made with, and would not call another."""
    devices.say_once.cache_clear()
    model = {"tnt": small_model, "pyramid": small_pyramid}[kind]()
    block = model.blocks[0] if kind == "tnt" else model.stages[0].blocks[0]
    before = model(IMAGES)
    layers = [block.inner, block.outer]
    places = [(block.words_to_sentence, "proj")] if part == "words" else [parts_of(layer)[part] for layer in layers]
    for owner, name in places:
        linear = getattr(owner, name)
        rngs = nnx.Rngs(params=0)
        if lora == "LoRA":
            changed = nnx.LoRA(linear.in_features, 2, linear.out_features, base_module=linear, rngs=rngs)
        else:
            use_bias = linear.bias is not None
            changed = nnx.LoRALinear(linear.in_features, linear.out_features, use_bias=use_bias, lora_rank=2, rngs=rngs)
            changed.kernel[...] = linear.kernel[...]
            if use_bias:
                changed.bias[...] = linear.bias[...]
        setattr(owner, name, changed)
    # LoRA's second matrix is zero at first.
    np.testing.assert_allclose(model(IMAGES), before, rtol=1e-4, atol=1e-4)
    assert part == "words" or "no kernel knows" in caplog.text  # CPUs have no kernel for words to sentence
    graphdef, of_lora, rest = nnx.split(model, nnx.LoRAParam, ...)
    gradients = jax.grad(lambda of_lora: loss_of(nnx.merge(graphdef, of_lora, rest), IMAGES, LABELS))(of_lora)
    second = [leaf for path, leaf in jax.tree.leaves_with_path(gradients) if "lora_b" in jax.tree_util.keystr(path)]
    assert len(second) == len(places)
    assert all(np.abs(leaf).max() > 0 for leaf in second)


def test_a_norm_of_others_is_computed():
    model = small_model()
    norm = nnx.RMSNorm(4, rngs=nnx.Rngs(0))
    before = model(IMAGES)
    model.blocks[0].inner.norm1 = norm
    assert not np.allclose(model(IMAGES), before)


def test_the_program_says_the_platform_and_not_the_process():
    """A mesh that names no device, and a default device, as on a host with an accelerator that is not used."""
    model = small_model()
    abstract = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(abstract):
        assert jax.eval_shape(model, IMAGES).shape == (4, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "tpu")
        patch.setattr(jax, "devices", lambda *_: [types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")])
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            assert (devices.platform(), devices.device_kind()) == ("cpu", "cpu")
        with jax.default_device("cpu"):
            assert devices.platform() == "cpu"
        with jax.default_device(None):
            assert devices.platform() == "tpu"


def test_images_of_an_explicit_mesh_are_refused_with_the_line_to_write():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4])
    images = jax.device_put(IMAGES, NamedSharding(mesh, PartitionSpec("data")))
    with pytest.raises(tnt_jax.InputError, match=r"Explicit.*make it with jax.make_mesh\(shape, names, axis_types"):
        nnx.jit(lambda model, images: model(images))(small_model(), images)


def test_a_shard_map_over_some_axes_of_a_mesh():
    model = small_model()
    expected = model(IMAGES)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        over_data = jax.shard_map(
            lambda images: model(images),
            in_specs=PartitionSpec("data"),
            out_specs=PartitionSpec("data"),
            axis_names={"data"},
            check_vma=False,
        )
        np.testing.assert_allclose(jax.jit(over_data)(IMAGES), expected, rtol=1e-4, atol=1e-4)
