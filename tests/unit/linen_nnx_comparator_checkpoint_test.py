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

"""Whole comparisons of real checkpoints on disk."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import linen_nnx_converter_util as util
import ml_dtypes
import numpy as np
import pytest

from maxtext.checkpoint_conversion import linen_nnx_comparator as comparator
from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors

WI = "model/decoder/layers_1/mlp/wi_0/kernel"


def unequal(comparison):
  return {outcome.path: outcome.status for outcome in comparison.leaves if outcome.status != "equal"}


class ComparisonTest(util.CheckpointTestCase):

  @parameterized.parameters(*util.ALL)
  @pytest.mark.integration
  def test_a_checkpoint_is_equal_to_what_it_is_converted_into(self, name):
    source = util.FIXTURES / name
    before = util.snapshot(source)
    framework = converter.detect_format(converter.load_checkpoint(source))
    for i, options in enumerate(
        (
            {"direction": f"{framework}_to_nnx", "scan_layers": False, "nnx_values": "plain"},
            {"direction": f"{framework}_to_nnx", "scan_layers": False, "layer_naming": "flat", "nnx_values": "all_boxed"},
            {"direction": f"{framework}_to_linen", "scan_layers": False},
        )
    ):
      converter.convert_checkpoint(source, self.tmp / str(i), **options)
      comparison = comparator.compare_checkpoints(source, self.tmp / str(i))
      self.assertTrue(comparison.is_accepted, unequal(comparison))
      self.assertEqual(comparison.counts(), {"equal": len(comparison.leaves)})
      stored = sum(leaf.size for leaf in jax.tree.leaves(converter.load_checkpoint(source)))
      self.assertEqual(comparison.elements(), (0, stored))  # Every element was compared.
    self.assertEqual(util.snapshot(source), before)

  @parameterized.product(
      scan=((True, True), (True, False), (False, True), (False, False)), path=("params", "mu"), use_ocdbt=(True, False)
  )
  @pytest.mark.integration
  def test_a_flipped_bit_is_named(self, scan, path, use_ocdbt):
    linen = util.linen(util.unscanned_params())
    damaged = util.linen(util.unscanned_params())
    collection = damaged["params"] if path == "params" else damaged["opt_state"][0]["mu"]
    layer = collection["params"]["decoder"]["layers_1"]["mlp"]["wi_0"]
    layer["kernel"] = util.flipped(layer["kernel"], (2, 3))
    sides = []
    for name, state, scan_layers in zip("ab", (linen, damaged), scan):
      arranged = converter.convert_linen_to_nnx(state) if scan_layers else state
      sides.append(self.save(name, arranged, use_ocdbt=use_ocdbt))
    comparison = comparator.compare_checkpoints(*sides)
    where = WI if path == "params" else WI.replace("model", "optimizer/opt_state/0/mu")
    self.assertEqual(unequal(comparison), {where: "different"})
    (found,) = comparison.worst_first()
    self.assertEqual((found.values.first.index, found.values.differing, found.values.elements), ((2, 3), 1, 15))
    self.assertEqual(found.values.largest_ulp.value, 1)
    self.assertEqual(comparison.elements(), (1, sum(leaf.size for leaf in jax.tree.leaves(linen))))

  @parameterized.product(dtype=("bfloat16", "float8_e4m3fn", "int4", "int8", "bool", "float16", "uint32"))
  def test_dtypes(self, dtype):
    dtype = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    value = np.arange(64).reshape(8, 8).astype(dtype)
    other = util.flipped(value, (7, 1))
    state = lambda leaf: {"params": {"params": {"decoder": {"norm": {"w": leaf}}}}}
    a, same, b = (self.save(name, state(leaf)) for name, leaf in (("a", value), ("same", value), ("b", other)))
    self.assertTrue(comparator.compare_checkpoints(a, same).is_accepted)
    comparison = comparator.compare_checkpoints(a, b)
    self.assertEqual(comparison.worst_first()[0].values.first.index, (7, 1))
    self.assertEqual(comparison.elements(), (1, 64))

  def test_values_are_compared_though_other_leaves_differ_in_structure(self):
    a, b = util.linen(util.unscanned_params()), util.linen(util.unscanned_params())
    for state in (b["params"]["params"], *(b["opt_state"][0][name]["params"] for name in ("mu", "nu"))):
      del state["decoder"]["decoder_norm"]
      state["decoder"]["layers_0"]["norm"]["scale"] = np.ones(5, np.float32)
      state["decoder"]["layers_0"]["gain"] = state["decoder"]["layers_0"]["gain"].astype(ml_dtypes.bfloat16)
      state["decoder"]["new_norm"] = {"scale": np.ones(5, np.float32)}
    kernel = b["params"]["params"]["decoder"]["layers_1"]["mlp"]["wi_0"]
    kernel["kernel"] = kernel["kernel"] + np.float32(0.5)
    comparison = comparator.compare_checkpoints(self.save("a", a), self.save("b", b))
    expected = {WI: "different"}
    for prefix in ("model", "optimizer/opt_state/0/mu", "optimizer/opt_state/0/nu"):
      expected[f"{prefix}/decoder/decoder_norm/scale"] = "only in A"
      expected[f"{prefix}/decoder/new_norm/scale"] = "only in B"
      expected[f"{prefix}/decoder/layers_0/norm/scale"] = "shape"
      expected[f"{prefix}/decoder/layers_0/gain"] = "dtype"
    self.assertEqual(unequal(comparison), expected)
    self.assertEqual(comparison.worst_first()[-1].values.largest_absolute.value, 0.5)
    gain = next(outcome for outcome in comparison.leaves if outcome.path == "model/decoder/layers_0/gain")
    self.assertEqual(gain.values.differing, 0)  # The same number in another dtype.

  def test_a_damaged_tree_is_compared_path_by_path(self):
    a, b = util.linen(util.unscanned_params()), util.linen(util.unscanned_params())
    del b["params"]["params"]["decoder"]["layers_1"]["mlp"]["wi_0"]  # Its moments are still there.
    b["opt_state"][0]["count"] += 1
    comparison = comparator.compare_checkpoints(self.save("a", a), self.save("b", b))
    self.assertEqual(
        unequal(comparison),
        {"params/params/decoder/layers_1/mlp/wi_0/kernel": "only in A", "opt_state/0/count": "different"},
    )
    self.assertLen(comparison.notes, 1)
    self.assertRegex(
        comparison.notes[0], r"^Compared path by path .* refuses one: B: opt_state/0/mu/params/decoder/layers_1"
    )

  def test_a_damaged_tree_of_another_layout_is_refused(self):
    a, b = util.linen(util.unscanned_params()), util.linen(util.unscanned_params())
    del b["params"]["params"]["decoder"]["layers_1"]["mlp"]["wi_0"]
    nnx = self.save("a", converter.convert_linen_to_nnx(a))
    with self.assertRaisesRegex(
        errors.MomentError, r"^B: opt_state/0/mu/params/decoder/layers_1/mlp/wi_0/kernel: expected"
    ):
      comparator.compare_checkpoints(nnx, self.save("b", b))

  @pytest.mark.integration
  def test_an_unreadable_leaf_is_named_and_the_others_are_compared(self):
    a, b = util.linen(util.unscanned_params()), util.linen(util.unscanned_params())
    b["opt_state"][2]["count"] += 1
    sides = [self.save(name, tree, use_ocdbt=False) for name, tree in (("a", a), ("b", b))]
    chunk = sides[1] / "params.params.decoder.layers_1.mlp.wi_0.kernel" / "0.0"
    chunk.write_bytes(chunk.read_bytes()[:5])
    comparison = comparator.compare_checkpoints(*sides)
    self.assertEqual(unequal(comparison), {WI: "unreadable", "optimizer/opt_state/2/count": "different"})
    worst = comparison.worst_first()[0]
    self.assertRegex(
        worst.failure, r"^B: params/params/decoder/layers_1/mlp/wi_0/kernel: expected chunks that can be read"
    )
    self.assertFalse(comparison.is_accepted)

  def test_an_unreadable_layer_does_not_hide_the_others_of_its_stack(self):
    state = util.linen(util.unscanned_params())
    a = self.save("a", converter.convert_linen_to_nnx(state))
    b = self.save("b", state, use_ocdbt=False)
    chunk = b / "params.params.decoder.layers_1.mlp.wi_0.kernel" / "0.0"
    chunk.write_bytes(chunk.read_bytes()[:5])
    comparison = comparator.compare_checkpoints(a, b)
    self.assertEqual(unequal(comparison), {WI: "unreadable"})
    self.assertEqual(comparison.counts()["equal"], len(comparison.leaves) - 1)

  def test_other_scan_axes(self):
    linen = util.linen(util.unscanned_params())
    a = self.save("a", converter.convert_linen_to_nnx(linen, param_scan_axis=1))
    b = self.save("b", converter.convert_linen_to_nnx(linen, param_scan_axis=0))
    self.assertTrue(comparator.compare_checkpoints(a, b, param_scan_axes=(1, 0)).is_accepted)
    self.assertTrue(comparator.compare_checkpoints(b, a, param_scan_axes=(0, 1)).is_accepted)

  def test_scanned_layers_of_unknown_order_are_compared_whole(self):
    layers = {"pipeline_module": {"layers": {"wi": {"kernel": util.array(2, 4, 3)}}}}
    a = {"params": {"params": {"decoder": layers}}}
    b = converter.convert_linen_to_nnx(a)
    b["model"]["decoder"]["pipeline_module"]["layers"]["wi"]["kernel"]["value"] = util.flipped(
        util.array(2, 4, 3), (1, 3, 2)
    )
    comparison = comparator.compare_checkpoints(self.save("a", a), self.save("b", b))
    self.assertEqual(unequal(comparison), {"model/decoder/pipeline_module/layers/wi/kernel": "different"})
    self.assertEqual(comparison.worst_first()[0].values.first.index, (1, 3, 2))
    self.assertIn("order is unknown", comparison.notes[0])

  def test_scanned_layers_of_unknown_order_beside_layers_that_are_not_scanned(self):
    layers = {f"dense_layers_{i}": {"wi": {"kernel": util.array(4, 3)}} for i in range(2)}
    layers["pipeline_module"] = {"layers": {"wi": {"kernel": util.array(2, 4, 3)}}}
    a = self.save("a", {"params": {"params": {"decoder": layers}}})
    comparison = comparator.compare_checkpoints(a, a)
    self.assertEqual(comparison.counts(), {"equal": 3})
    self.assertIn("refuses one: A: params/params/decoder/pipeline_module/layers/wi/kernel", comparison.notes[0])
    nnx = self.save("b", {"model": {"decoder": layers}})
    with self.assertRaisesRegex(errors.LayerStackError, "^A: params/params/decoder/pipeline_module/layers/wi/kernel"):
      comparator.compare_checkpoints(a, nnx)

  @pytest.mark.integration
  def test_rng_state_that_only_one_side_has_is_reported_and_can_be_left_out(self):
    folder = util.FIXTURES / "maxtext-main-2026-05-14"
    comparison = comparator.compare_checkpoints(folder / "nnx_scan", folder / "nnx_unscan")
    self.assertEqual(comparison.counts("auxiliary")["only in A"], 24)
    self.assertEqual(comparison.counts("step"), {"equal": 1})
    dropped = comparator.compare_checkpoints(folder / "nnx_scan", folder / "nnx_unscan", nnx_aux="drop")
    self.assertEqual(dropped.counts("auxiliary"), {})
    self.assertGreater(len(dropped.trees[0].left_out), 0)
    only = comparator.compare_checkpoints(folder / "nnx_scan", folder / "nnx_unscan", params_only=True)
    self.assertCountEqual({outcome.part for outcome in only.leaves}, ["params"])

  @parameterized.parameters("sft", "rl")
  @pytest.mark.integration
  def test_a_checkpoint_of_tunix_and_what_it_is_converted_into(self, name):
    source = util.FIXTURES / "tunix" / name
    converter.convert_checkpoint(source, self.tmp / "out")
    comparison = comparator.compare_checkpoints(source, self.tmp / "out", nnx_aux="drop")
    self.assertTrue(comparison.is_accepted, unequal(comparison))
    parts = {outcome.part for outcome in comparison.leaves}
    self.assertEqual(parts, {"params", "optimizer", "step"})

  @parameterized.parameters(("linen_to_nnx", "equal"), ("linen_to_linen", "equal"), (None, "different"))
  @pytest.mark.integration
  def test_a_step_that_is_a_python_integer(self, direction, status):
    """Only its value counts, on whichever side it is, as for what the converter casts it to."""
    a = util.linen(util.unscanned_params(1)) | {"step": 11}
    sides = [self.save("a", a), self.tmp / "b"]
    if direction:
      converter.convert_checkpoint(*sides, direction=direction)
    else:
      self.save("b", a | {"step": np.array(12, np.int32)})
    for order in (sides, sides[::-1]):
      comparison = comparator.compare_checkpoints(*order)
      self.assertEqual(comparison.counts("step"), {status: 1})
      self.assertEqual(comparison.is_accepted, status == "equal", unequal(comparison))

  @pytest.mark.integration
  def test_a_tolerance(self):
    a, b = util.linen(util.unscanned_params()), util.linen(util.unscanned_params())
    kernel = b["params"]["params"]["decoder"]["layers_1"]["mlp"]["wi_0"]
    kernel["kernel"] = kernel["kernel"] * np.float32(1.001)
    sides = self.save("a", a), self.save("b", b)
    self.assertEqual(unequal(comparator.compare_checkpoints(*sides)), {WI: "different"})
    self.assertEqual(unequal(comparator.compare_checkpoints(*sides, rtol=0.01)), {WI: "within tolerance"})
    self.assertTrue(comparator.compare_checkpoints(*sides, rtol=0.01).is_accepted)
    self.assertFalse(comparator.compare_checkpoints(*sides, rtol=1e-6).is_accepted)
    self.assertFalse(comparator.compare_checkpoints(*sides, atol=0.0).is_accepted)


if __name__ == "__main__":
  absltest.main()
