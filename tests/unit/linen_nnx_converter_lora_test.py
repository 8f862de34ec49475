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

"""LoRA adapters merged into the weights that they were trained on: values."""

from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import linen_nnx_converter_lora_trees as lora_trees
import linen_nnx_converter_util as util
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import lora
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import merged


class LoraTest(lora_trees.LoraTestCase):

  @parameterized.parameters(True, "full", False)
  def test_values(self, verify):
    before = util.snapshot(self.source), util.snapshot(self.tmp / "adapters")
    done = self.convert(verify=verify)
    self.assert_merged()
    self.assertEqual((util.snapshot(self.source), util.snapshot(self.tmp / "adapters")), before)
    what = f"merged LoRA adapters (rank 2, alpha 8) of {self.tmp}/adapters/2 into 3 weights"
    note = f"{what}, which are no longer the source's"
    self.assertIn(note, done.summary())
    self.assertIn(note, done.record()["notes"])
    np.testing.assert_array_equal(self.layers()["norm"]["scale"], lora_trees.draw(9, 6, lora_trees.LAYERS))

  @parameterized.parameters({"chunk_byte_size": 1024}, {"use_ocdbt": False}, {"use_zarr3": True}, {"copy_mode": "link"})
  def test_however_it_is_stored(self, **options):
    self.convert(**options)
    self.assert_merged()

  def test_in_strips(self):
    with mock.patch.object(lora, "_STRIP", 7), mock.patch.object(merged, "_ELEMENTS", 11):
      self.convert(verify="full")
    self.assert_merged()

  def test_unscanned_at_once(self):
    self.convert(scan_layers=False)
    for name, layers in self.expected.items():
      for i, weight in enumerate(layers):
        np.testing.assert_array_equal(self.layers()[f"layers_{i}"][name]["kernel"], weight)

  def test_some_layers_of_a_stack(self):
    """Layers of which one alone has adapters, stacked at once."""
    layers = {f"layers_{i}": {name: {"kernel": of["kernel"][:, i]} for name, of in self.base.items()} for i in range(3)}
    scales = {f"layers_{i}": {"norm": {"scale": lora_trees.draw(i, 6)}} for i in range(3)}
    tree = {"decoder": {name: layers[name] | scales[name] for name in layers}}
    self.source = self.save("unscanned", {"params": {"params": tree}})
    with ocp.CheckpointManager(self.tmp / "one", item_names=("items",)) as manager:
      adapters = {name: {leaf: of[:, 2] for leaf, of in self.adapters[name].items()} for name in self.adapters}
      manager.save(
          0, args=ocp.args.Composite(items=ocp.args.PyTreeSave(lora_trees.boxed({"decoder": {"layers_2": adapters}})))
      )
    self.convert(adapters="one", scan_layers=True)
    for name, of in self.base.items():
      wanted = np.stack([of["kernel"][:, 0], of["kernel"][:, 1], self.expected[name][2]], 1)
      np.testing.assert_array_equal(self.layers()["layers"][name]["kernel"], wanted)

  @parameterized.parameters((True, 1), (False, 1), (True, 0))
  def test_experts(self, is_scanned, axis):
    """Weights of an einsum, as in a dense MoE: A has the axes that are summed over, or that the data has too."""
    sizes = {"e": 4, "m": 6, "h": 10, "r": lora_trees.RANK}
    shaped = lambda seed, axes: [lora_trees.draw((seed, i), *(sizes[axis] for axis in axes)) for i in range(3)]
    base, adapters, expected = {}, {}, {}
    for number, (name, weight, a, b) in enumerate(
        (("wi_0", "emh", "mr", "reh"), ("wo", "ehm", "ehr", "rm"), ("scale", "m", "mr", "r"))
    ):
      weights, of_a, of_b = (shaped(10 * number + at, axes) for at, axes in enumerate((weight, a, b)))
      added = [np.einsum(f"{a},{b}->{weight}", x, y) * lora_trees.ALPHA / lora_trees.RANK for x, y in zip(of_a, of_b)]
      at = axis if is_scanned else None
      base[name], expected[name] = lora_trees.stacked(weights, at), lora_trees.stacked(np.add(weights, added), at)
      adapters |= {f"{name}_lora_a": lora_trees.stacked(of_a, at), f"{name}_lora_b": lora_trees.stacked(of_b, at)}
    layers = "layers" if is_scanned else "layers_0"
    self.source = self.save("experts", {"params": {"params": {"decoder": {layers: {"moe": base}}}}})
    saved = lora_trees.boxed({"decoder": {layers: {"moe": adapters}}})
    with ocp.CheckpointManager(self.tmp / "of_experts", item_names=("items",)) as manager:
      manager.save(0, args=ocp.args.Composite(items=ocp.args.PyTreeSave(saved)))
    with mock.patch.object(lora, "_STRIP", 7), mock.patch.object(merged, "_ELEMENTS", 11):
      self.convert(adapters="of_experts", param_scan_axis=axis, verify="full")
    for name, wanted in expected.items():
      np.testing.assert_array_equal(self.layers()[layers]["moe"][name], wanted, name)

  def test_to_nnx(self):
    converter.convert_checkpoint(
        self.source, self.tmp / "out", lora_restore_path=str(self.tmp / "adapters"), lora_alpha=lora_trees.ALPHA
    )
    found = converter.load_checkpoint(self.tmp / "out")["model"]["decoder"]["layers"]["out"]["kernel"]["value"]
    np.testing.assert_array_equal(found, lora_trees.stacked(self.expected["out"], 1))

  @parameterized.parameters(0, None)
  def test_other_layer_axes(self, axis):
    base, adapters, self.expected = lora_trees.trees(axis)
    if axis is None:
      tree = {"decoder": {"layers_0": base, "norm": {"scale": lora_trees.draw(9, 6)}}}
    else:
      tree = {"decoder": {"layers": base, "norm": {"scale": lora_trees.draw(9, lora_trees.LAYERS, 6)}}}
    self.source = self.save("other", {"params": {"params": tree}})
    with ocp.CheckpointManager(self.tmp / "theirs", item_names=("items",)) as manager:  # As MaxText's trainer saves.
      inside = {"decoder": {"layers" if axis is not None else "layers_0": adapters}}
      items = {"params": {"params": inside}, "step": np.array(3), "opt_state": [{"mu": {"params": inside}}]}
      saved = {"lora": {"lora_rank": lora_trees.RANK, "lora_alpha": lora_trees.ALPHA}}
      manager.save(3, args=ocp.args.Composite(items=ocp.args.PyTreeSave(items)), custom_metadata=saved)
    self.convert(adapters="theirs", param_scan_axis=axis, lora_alpha=None)
    if axis is None:
      found = self.layers()["layers_0"]
      for name, layers in self.expected.items():
        np.testing.assert_array_equal(found[name]["kernel"], layers[0])
    else:
      self.assert_merged(axis)

  @parameterized.parameters((np.float32, "bfloat16"), (ml_dtypes.bfloat16, None), (ml_dtypes.bfloat16, "float32"))
  def test_is_rounded_once(self, stored, weight_dtype):
    """Halfway from 1 to the next bfloat16, and a little more: were the product rounded too, the sum would become 1."""
    base = {name: {"kernel": of["kernel"].astype(stored)} for name, of in self.base.items()}
    base["wi"]["kernel"][:] = stored(1)
    adapters = {name: {leaf: of.copy() for leaf, of in self.adapters[name].items()} for name in self.adapters}
    adapters["wi"] = {leaf: np.zeros_like(of) for leaf, of in adapters["wi"].items()}
    adapters["wi"]["kernel_lora_a"][..., 0] = 2**-8 + 2**-20
    adapters["wi"]["kernel_lora_b"][0] = 1 / 4
    self.source = self.save("of_dtype", {"params": {"params": lora_trees.model(base)}})
    self.save_adapters(adapters, "small")
    self.convert(adapters="small", weight_dtype=weight_dtype, verify="full")
    found = self.layers()["layers"]["wi"]["kernel"]
    rounded = np.float32(1 + 2**-8 + 2**-20).astype(weight_dtype or stored)
    self.assertEqual(found.dtype, rounded.dtype)
    np.testing.assert_array_equal(found, np.full_like(found, rounded))

  def test_numbers_that_are_none_stay(self):
    self.base["wi"]["kernel"][0, 0, :3] = np.nan, np.inf, -np.inf
    self.source = self.save("nan", {"params": {"params": lora_trees.model(self.base)}})
    self.convert(verify="full")
    np.testing.assert_array_equal(self.layers()["layers"]["wi"]["kernel"][0, 0, :3], [np.nan, np.inf, -np.inf])

  def test_random_numbers_are_within_the_leeway(self):
    draw_normal = np.random.default_rng(0).standard_normal
    for name in self.base:
      self.base[name]["kernel"] = draw_normal(self.base[name]["kernel"].shape).astype(ml_dtypes.bfloat16)
      for leaf, of in self.adapters[name].items():
        self.adapters[name][leaf] = draw_normal(of.shape).astype(np.float32)
    self.source = self.save("random", {"params": {"params": lora_trees.model(self.base)}})
    self.save_adapters(self.adapters, "normal")
    self.assertTrue(self.convert(adapters="normal").verified)

  def test_a_dry_run(self):
    lines = list(self.convert(dry_run=True).lines())
    self.assertLen([line for line in lines if "LoRA adapter merged, streamed" in line], 3)
    self.assert_nothing_left("base", "adapters")


if __name__ == "__main__":
  absltest.main()
