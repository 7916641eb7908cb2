"""What `--plan` says of a run before it is started, from the compiled train step."""

import json
import os
import re
import subprocess
import sys
import types

import pytest
import rich
from commands import ROOT, run
from small_runs import config_file, tiny_run

from tnt_jax.chips import GIB, Chip, chip_of
from tnt_jax.planning import gpus, plan
from tnt_jax.planning.collectives import Collective, collectives, loops
from tnt_jax.planning.compiling import Compiled, costs_of, largest_batch, largest_batch_by_memory, memory_wanted
from tnt_jax.planning.plan import _chip, environment_for

# Prints what a train step of the tiny run sends between devices, the bytes of its parameters, and how many more the
# stem's gradient has as the matrix that it is computed with (1.2% of a TNT-S).
SENT = """
import dataclasses, json, sys
sys.path.insert(0, "tests")
import jax
from small_runs import tiny_run
from tnt_jax.planning import plan
from tnt_jax.planning.compiling import compile_step
from tnt_jax.models.tnt import words_per_side
from tnt_jax.training.mesh import make_mesh
from tnt_jax.training.program import Program
config, _ = plan._resolved(tiny_run("unused", batch_size={batch}, fsdp={fsdp}))
devices = plan._devices("{topology}")
step = compile_step(config, devices)
params = Program(config, make_mesh(1, devices), 10).abstract_state.params
kernel, model = params["word_embedding"]["conv"]["kernel"], config.model
matrix = model.patch_size**2 * model.in_channels * words_per_side(model) ** 2 * model.inner_dim
print(json.dumps({{
    "devices": len(devices),
    "sent": [dataclasses.astuple(each) for each in step.collectives],
    "parameters": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)),
    "stem": (matrix - kernel.size) * 4,
}}))
"""


def sent(topology, batch, fsdp=1) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", SENT.format(topology=topology, batch=batch, fsdp=fsdp)],
        cwd=ROOT,
        env=os.environ | environment_for(topology) | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    return result | {"sent": [Collective(*each) for each in result["sent"]]}


@pytest.mark.slow  # takes libtpu
def test_256_chips_exchange_the_gradient_and_nothing_that_grows_with_the_pod():
    step = sent("v5e:16x16", batch=4 * 256)
    assert step["devices"] == 256
    reduced = [each.bytes for each in step["sent"] if each.kind == "all-reduce"]
    gradient = step["parameters"] + step["stem"]
    assert 0.99 * gradient < sum(reduced) < gradient + 64  # the loss and the accuracy with it
    for other in (each for each in step["sent"] if each.kind != "all-reduce"):
        # Mixup: the images and targets of one device go to another one.
        assert other.kind == "collective-permute"
        assert other.bytes <= 4 * 16 * 16 * 4


@pytest.mark.nightly
def test_what_is_sent_is_the_same_for_8_and_for_256_chips():
    small, large = (sent(topology, batch)["sent"] for topology, batch in (("v5e:2x4", 4 * 8), ("v5e:16x16", 4 * 256)))
    assert [(each.kind, each.bytes) for each in small] == [(each.kind, each.bytes) for each in large]
    for all_devices, found in ((8, small), (256, large)):
        assert {each.group for each in found if each.kind == "all-reduce"} == {all_devices}


@pytest.mark.slow
def test_plan_of_eight_processors_is_a_table(tmp_path):
    arguments = ["--plan", "cpu:8", "--config", config_file(tmp_path), "--run-dir", tmp_path / "run"]
    done = subprocess.run([sys.executable, "train.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "on cpu:8 (8 x cpu): batch 128" in done.stdout
    (row,) = [line.split() for line in done.stdout.splitlines() if "all-reduce" in line]
    assert row[2] in ("all", "8")
    # 3,030 parameters in float32, the stem's 196 as a matrix of 1,024.
    assert 15_300 < int(row[-1].replace(",", "")) < 15_600
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5e", "'v5e' is no topology; there are v5e:2x4"),
        ("cpu:0", "'cpu:0' is no topology"),
        ("8", "'8' is no top"),
        ("h300:8", "'h300:8' is no topology; there are v5e:2x4"),
        ("h300:8", "a100:8, a100-40gb:8, h100:8, h200:8, b200:8, l4:8, rtx4090:8, or h100:4x8 for 4 hosts of 8"),
        ("h300:8", "another card by its numbers is gpu,capability=8.6,"),
        ("h100:0", "'h100:0' is no topology"),
        ("gpu,capability=8.6:8", "does not say capability, multiprocessors, memory, bandwidth, flops of a card"),
    ],
)
def test_what_is_no_topology(topology, message):
    code, _, err = run("train.py", "--plan", topology)
    assert code == 2
    assert message in err


def test_libtpu_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run("train.py", "--plan", "v5e:2x4")
    assert code == 2
    assert "pip install -e '.[plan]'" in err


def test_the_compiler_for_gpus_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run("train.py", "--plan", "h100:4x8")
    assert code == 2
    assert "pip install -e '.[plan-gpu]'" in err


@pytest.mark.parametrize("topology", ["h100:8", "a100-40gb:4x8", gpus.BY_NUMBERS])
def test_a_card_is_described_to_the_compiler(topology):
    card, chip = gpus.card_of(topology)
    text = gpus.target_config(card, chip)
    assert f"core_count: {card.multiprocessors} " in text
    assert f"major: {int(card.capability)} " in text
    assert f"device_memory_size: {int(chip.memory)} " in text
    # What XLA multiplies to the speed of products of bfloat16.
    clock, units, per_cycle = re.search(
        r"matrix_unit_description.*key: 16 value \{ clock_rate_ghz: (\S+) units_per_core: (\d+) ops_per_clock: (\d+)",
        text,
    ).groups()
    assert 2 * card.multiprocessors * float(clock) * 1e9 * int(units) * int(per_cycle) == pytest.approx(chip.flops)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--plan", "v9x:2x4"], "libtpu knows no topology 'v9x:2x4'", marks=pytest.mark.nightly),
        (["--plan", "v5e:2x4", "--batch-size", "100"], "batch_size 100 cannot be divided among 8 devices"),
    ],
)
def test_what_cannot_be_planned_is_a_message(arguments, message):
    done = subprocess.run([sys.executable, "train.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("first", "then"),
    [(4, [256, 240]), (40, [304, 240]), (400, [240])],
)
def test_search_for_the_largest_batch_that_fits(first, then):
    """A compiler with which each image takes 0.1 GiB, or 0.0625 where it computes things again for lack of memory.

    It says so in seconds of a batch that does not fit, and takes minutes for one that does: a single one of those.
    """
    tried = []

    def compile_at(batch):
        tried.append(batch)
        memory = max(0.0625 * batch, min(0.1 * batch, 14.0))
        return Compiled(batch, int((1 + memory) * GIB), memory <= 15, 0.0)

    too_large = {4: 256, 40: 304, 400: 400}[first]
    assert largest_batch(compile_at(first), 16 * GIB, GIB, 8, compile_at) == (240, too_large, len(then))
    assert tried == [first, *then]


@pytest.mark.parametrize(("first", "then"), [(40, [592, 600]), (1024, [512, 592, 600]), (8, [512, 592, 600])])
def test_search_where_every_batch_compiles(first, then):
    """A compiler with which each image takes 0.1 GiB, and that makes what takes more than 67 GiB take just that."""
    tried = []

    def compile_at(batch):
        tried.append(batch)
        memory = min(1 + 0.0984 * batch, 67)
        return Compiled(batch, int(memory * GIB), memory <= 60, 0.0)

    found = largest_batch_by_memory(compile_at(first), 60 * GIB, GIB, 8, compile_at)
    assert found == (592, 600, len(then))
    assert tried == [first, *then]


def test_search_where_not_one_image_fits():
    found = largest_batch(Compiled(1, None, fits=False, seconds=0.0), 16 * GIB, GIB, 1, pytest.fail)
    assert found == (0, 1, 0)


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ("RESOURCE_EXHAUSTED: Used 27.50G of 15.75G hbm. Exceeded", 27.5),
        ("the total memory required for HLO temporaries (19.50G) exceeds available HBM (15.75G)", 20.5),
        ("RESOURCE_EXHAUSTED: something else", None),
    ],
)
def test_what_a_program_that_does_not_fit_would_take(message, wanted):
    """Temporaries are without the arguments, here a gibibyte."""
    assert memory_wanted(message, arguments=GIB) == (wanted and wanted * GIB)


HLO = """
  %all-reduce.1 = (f32[16,12]{1,0:T(8,128)}, f32[]{:T(128)}) all-reduce(%a, %b), channel_id=1, replica_groups=[1,8]<=[8]
  %ag = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%c), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %agd = bf16[8,4]{1,0} all-gather-done(%ag)
  ROOT %rs = f32[2,3]{1,0} reduce-scatter(%d), replica_groups=[2,4]<=[8], dimensions={0}
  %cp = (u8[5]{0}, u8[5]{0}, u32[], u32[]) collective-permute-start(%e), source_target_pairs={{0,1},{1,0}}
  %ars = ((f32[6]{0}, f32[2]{0}), (f32[6]{0}, f32[2]{0})) all-reduce-start(%g), replica_groups=mesh['a'=8] {'a'}
  %ard = (f32[6]{0}, f32[2]{0}) all-reduce-done(%ars)
  %one = f32[6]{0} all-reduce-start(%h), replica_groups=mesh['data'=4,'fsdp'=2] {'data'}, use_global_device_ids=true
  %w = (s32[]) while(%t), condition=%c1, body=%b1, backend_config={"known_trip_count":{"n":"12"}}
  %f = f32[2] fusion(%all-reduce.1), kind=kLoop
"""


def test_collectives_are_read_from_the_text_of_a_program():
    assert collectives(HLO) == [
        Collective("all-reduce", 16 * 12 * 4 + 4, 8),
        Collective("all-gather", 8 * 4 * 2, 4),
        Collective("reduce-scatter", 2 * 3 * 4 * 4, 4),
        Collective("collective-permute", 5, None),
        Collective("all-reduce", 8 * 4, 8),
        Collective("all-reduce", 6 * 4, 4),
    ]
    assert loops(HLO) == [12]


def test_a_count_that_jax_does_not_give_is_missed(monkeypatch, capsys):
    """XLA's count of a program for a GPU that is not there has no public name."""
    monkeypatch.setitem(sys.modules, "jax._src.lib", None)
    program = types.SimpleNamespace(cost_analysis=dict)
    assert costs_of(program) == {}
    config, _ = plan._resolved(tiny_run("unused"))
    step = Compiled(32, GIB, True, 1.0)
    rich.print(plan._table(config, step, chip_of("NVIDIA H100 80GB HBM3"), 60 * GIB))
    out = " ".join(capsys.readouterr().out.split())  # a long version breaks the line
    assert re.search(r"as compiled not known: JAX [\d.]+ does not count them", out)


def test_chips_are_known_under_what_jax_calls_them():
    assert chip_of("TPU v5 lite").memory == 16 * GIB
    assert chip_of("TPU v5e") == chip_of("TPU v5 lite")
    assert chip_of("abacus") is None
    devices = [types.SimpleNamespace(device_kind="TPU v4")]
    assert _chip("v4:2x2x2", 16 * devices).memory == 16 * GIB
    assert _chip("v4:2x2x2", 8 * devices).memory == 32 * GIB


@pytest.mark.parametrize(("traffic", "said"), [(4e9, "133, by FLOPs"), (4e11, "8, by memory traffic")])
def test_the_rate_at_the_peaks_is_bound_by_what_takes_longer(traffic, said, capsys):
    """FLOPs take 60 ms of a step of 8 images, its traffic 10 ms or a second."""
    chip, step = Chip("a chip", 16 * GIB, 1e14, 4e11), Compiled(8, GIB, True, 1.0, 6e12, traffic)
    config, _ = plan._resolved(tiny_run("unused"))
    rich.print(plan._table(config, step, chip, None))
    assert f"at most {said}" in capsys.readouterr().out
