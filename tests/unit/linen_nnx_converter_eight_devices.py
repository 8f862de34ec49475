# Copyright 2026 Google LLC
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#    https://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Saves and restores on eight CPU devices, in a process of its own: `… FOLDER save|restore_sharded`."""

import pathlib
import sys

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import orbax.checkpoint as ocp

LAYERS = 11


def main(folder, task):
  mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
  random = np.random.default_rng(0)

  def put(array, *spec):
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

  def bfloat16(*shape):
    return random.integers(0, 2**16, shape, np.uint16).view(jax.numpy.bfloat16.dtype)

  if task == "save":
    layers = {
        f"layers_{i}": {"kernel": put(bfloat16(16, 24), "fsdp", "tensor"), "scale": put(bfloat16(24), "tensor")}
        for i in range(LAYERS)
    }
    tree = {"params": {"params": {"decoder": layers, "embedding": put(bfloat16(8, 16), None, "fsdp")}}}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      checkpointer.save(pathlib.Path(folder), args=ocp.args.PyTreeSave(tree))
    return
  # The shardings that the converter wrote are true of the scanned arrays: Orbax restores with them.
  kernel = ocp.PyTreeCheckpointer().restore(pathlib.Path(folder))["params"]["params"]["decoder"]["layers"]["kernel"]
  assert kernel.shape == (16, LAYERS, 24), kernel.shape
  assert kernel.sharding.spec == PartitionSpec("fsdp", None, "tensor"), kernel.sharding
  assert kernel.addressable_shards[0].data.shape == (4, LAYERS, 12)


if __name__ == "__main__":
  main(*sys.argv[1:])
