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

"""A base, LoRA adapters for it, and what the two make together."""

import linen_nnx_converter_util as util
import numpy as np
import orbax.checkpoint as ocp

from maxtext.checkpoint_conversion import linen_nnx_converter as converter

# inputs, outputs: as `DenseGeneral` has them in an MLP, a query, and the projection out of attention.
KERNELS = {"wi": ((6,), (10,)), "query": ((6,), (2, 5)), "out": ((2, 5), (6,))}
LAYERS, RANK, ALPHA = 3, 2, 8.0


def draw(seed, *shape):
  """Small integers, of which all sums are exact in float32, and in bfloat16 too."""
  return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)


def stacked(layers, axis):
  return np.stack(layers, axis) if axis is not None else layers[0]


def trees(axis):
  """A base, its adapters, and the weights of each layer with these added, as a literal sum over the indices."""
  base, adapters, expected = {}, {}, {}
  for number, (name, (ins, outs)) in enumerate(KERNELS.items()):
    size = lambda sizes: int(np.prod(sizes))
    weights = [draw((number, i, 0), *ins, *outs) for i in range(LAYERS)]
    a = [draw((number, i, 1), size(ins), RANK) for i in range(LAYERS)]
    b = [draw((number, i, 2), RANK, size(outs)) for i in range(LAYERS)]
    base[name] = {"kernel": stacked(weights, axis)}
    adapters[name] = {"kernel_lora_a": stacked(a, axis), "kernel_lora_b": stacked(b, axis)}
    expected[name] = [np.zeros((*ins, *outs), np.float32) for _ in range(LAYERS)]
    for i, into in enumerate(expected[name]):
      for at in np.ndindex(*ins, *outs):
        row = int(np.ravel_multi_index(at[: len(ins)], ins))
        column = int(np.ravel_multi_index(at[len(ins) :], outs))
        into[at] = weights[i][at] + sum(a[i][row, k] * b[i][k, column] for k in range(RANK)) * ALPHA / RANK
  return base, adapters, expected


def model(layers):
  return {"decoder": {"layers": layers, "norm": {"scale": draw(9, 6, LAYERS)}}}


def boxed(tree):
  return {name: boxed(node) if isinstance(node, dict) else {"value": node} for name, node in tree.items()}


class LoraTestCase(util.CheckpointTestCase):

  def setUp(self):
    super().setUp()
    self.base, self.adapters, self.expected = trees(1)
    self.source = self.save("base", {"params": {"params": model(self.base)}})
    self.save_adapters(self.adapters)

  def save_adapters(self, adapters, name="adapters", **metadata):
    """As Tunix's trainer does: boxed, as the item `model_params` of a step."""
    with ocp.CheckpointManager(self.tmp / name, item_names=("model_params",)) as manager:
      tree = boxed({"decoder": {"layers": adapters}})
      manager.save(2, args=ocp.args.Composite(model_params=ocp.args.PyTreeSave(tree)), custom_metadata=metadata)

  def convert(self, target="out", adapters="adapters", **options):
    options = {"direction": "linen_to_linen", "lora_alpha": ALPHA} | options
    return converter.convert_checkpoint(
        self.source, self.tmp / target, lora_restore_path=str(self.tmp / adapters), **options
    )

  def layers(self, target="out"):
    return converter.load_checkpoint(self.tmp / target)["params"]["params"]["decoder"]

  def assert_merged(self, axis=1, dtype=np.float32, target="out"):
    found = self.layers(target)["layers"]
    for name, layers in self.expected.items():
      np.testing.assert_array_equal(found[name]["kernel"], stacked(layers, axis).astype(dtype), name)
      self.assertEqual(found[name]["kernel"].dtype, dtype)
