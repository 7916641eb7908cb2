"""Where the rows of a batch lie on devices whose order is not that of their processes."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from commands import ROOT
from small_runs import free_port

from tnt_jax.config import InputError
from tnt_jax.planning.plan import environment_for
from tnt_jax.training import mesh as mesh_module
from tnt_jax.training.mesh import make_mesh, rows_of_process

TOPOLOGIES = """
import json, sys
from jax.experimental import topologies
from tnt_jax.training.mesh import make_mesh, over_batch, rows_of_process
for topology in sys.argv[1:]:
    devices = list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    mesh, batch = make_mesh(1, devices), 2 * len(devices)
    processes = sorted({device.process_index for device in devices})
    rows = [rows_of_process(batch, mesh, process) for process in processes]
    held = {p: set() for p in processes}
    for device, (place,) in over_batch(mesh).devices_indices_map((batch,)).items():
        held[device.process_index] |= set(range(batch)[place])
    assert [set(each) for each in rows] == [held[p] for p in processes]
    assert sorted(row for each in rows for row in each) == list(range(batch))
    print(json.dumps(rows[0]))
"""


@pytest.mark.slow  # takes libtpu
def test_rows_are_those_that_the_topology_of_a_tpu_slice_gives_a_host():
    topologies = ["v5e:4x4", "v5e:16x16", "v6e:4x4", "v5p:2x2x4"]
    environment = os.environ | environment_for(topologies[0]) | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", TOPOLOGIES, *topologies]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Places 0, 1, 6 and 15 of the mesh are the first host's on v5e:4x4, with two rows each.
    assert done.stdout.splitlines()[0] == "[0, 1, 2, 3, 12, 13, 30, 31]"


# Two devices of each of two processes, which alternate in the mesh.
ALTERNATING = """
import sys
import jax, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh
from tnt_jax.training.mesh import rows_of_process, to_devices
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
devices = np.array(jax.devices())[[0, 2, 1, 3]].reshape(4, 1)
mesh = Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
rows = rows_of_process(8, mesh)
print(list(rows))
whole = to_devices({"row": np.array(rows, np.int32)}, mesh)["row"]
assert multihost_utils.process_allgather(whole, tiled=True).tolist() == list(range(8))
"""


def test_every_row_lies_at_its_place_where_the_devices_of_two_processes_alternate():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ALTERNATING, port, str(index)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert [out.splitlines()[0] for out, _ in results] == ["[0, 1, 4, 5]", "[2, 3, 6, 7]"]


def test_devices_that_make_no_mesh_are_one_message(monkeypatch):
    def refuse(*arguments, **named):
        raise ValueError("multi-slice topologies are not supported")

    monkeypatch.setattr(mesh_module.jax, "make_mesh", refuse)
    with pytest.raises(InputError, match="a run trains on one slice: multi-slice"):
        make_mesh()


def test_one_process_has_all_rows():
    assert rows_of_process(6, make_mesh(1, jax.devices()[:1])) == tuple(range(6))
    assert np.asarray(rows_of_process(6, make_mesh(1, jax.devices()[:1]))).dtype.kind == "i"
