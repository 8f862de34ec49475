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

"""The comparator's options: checked before anything is read, and what they leave out or leave unread."""

import math
import types

from absl.testing import absltest
from absl.testing import parameterized
import jax
import linen_nnx_converter_util as util
import numpy as np

from maxtext.checkpoint_conversion import linen_nnx_comparator as comparator
from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_comparator import difference
from maxtext.checkpoint_conversion.linen_nnx_comparator import report
from maxtext.checkpoint_conversion.linen_nnx_converter import errors


def unequal(comparison):
  return {pair.path: pair.status for pair in comparison.leaves if pair.status != "equal"}


class OptionsTest(util.CheckpointTestCase):

  @parameterized.parameters(
      ({"scan_axis": 1}, "--scan_axis: expected one of param_scan_axes, .* found no such option. Check its spelling."),
      ({"param_scan_axes": 1}, "--param_scan_axis: expected two axes, of A and of B, found 1. "),
      ({"param_scan_axes": (1, -1)}, "--param_scan_axis: expected at least 0, found -1. "),
      ({"nnx_aux": "Drop"}, "--nnx_aux: expected keep or drop, found 'Drop'. "),
      ({"ignore_rngs": 1}, "--ignore_rngs: expected True or False, found 1. "),
      ({"structure_only": "no"}, "--structure_only: expected True or False, found 'no'. "),
      ({"params_only": "no"}, "--params_only: expected True or False, found 'no'. "),
      ({"atol": -1}, "--atol: expected at least 0.0, found -1. "),
      ({"atol": True}, "--atol: expected a number or None, found True. "),
      ({"rtol": "0.1"}, "--rtol: expected a number or None, found '0.1'. "),
      ({"rtol": float("nan")}, "--rtol: expected at least 0.0, found nan. "),
      ({"memory_budget_gib": 0}, "--memory_budget_gib: expected at least 0.0625, found 0. "),
  )
  def test_options_are_checked_before_anything_is_read(self, chosen, message):
    with self.assertRaisesRegex(errors.OptionError, "^" + message):
      comparator.compare_checkpoints(self.tmp / "nowhere", self.tmp / "nowhere", **chosen)

  def test_the_config_gives_the_scan_axis_unless_it_is_given(self):
    linen = util.linen(util.unscanned_params())
    a, b = (
        self.save(str(axis), converter.convert_linen_to_nnx(linen, param_scan_axis=axis, scan_layers=True))
        for axis in (0, 1)
    )
    config = types.SimpleNamespace(param_scan_axis=0)
    self.assertTrue(comparator.compare_checkpoints(a, a, config=config).is_accepted)
    self.assertTrue(comparator.compare_checkpoints(a, b, config=config, param_scan_axes=(0, 1)).is_accepted)
    wrong = comparator.compare_checkpoints(a, b, config=config)
    self.assertRegex(wrong.notes[0], "refuses one: B: .*--param_scan_axis")

  def test_every_number_is_taken(self):
    a = self.save("a", {"params": {"params": {"decoder": {"norm": {"scale": np.ones(3, np.float32)}}}}})
    for atol in (0, 0.5, np.float32(0.5), math.inf):
      comparison = comparator.compare_checkpoints(a, a, atol=atol)
      self.assertEqual(comparison.tolerance, difference.Tolerance(atol, 0.0))

  def test_rng_streams_alone_are_ignored(self):
    streams = {"rngs": {"dropout": {"count": np.zeros((), np.uint32), "key": np.zeros(4, np.uint32)}}}
    state = converter.convert_linen_to_nnx(util.linen(util.unscanned_params(1)), nnx_values="plain")
    a, b = ({**state, "model": {**state["model"], **of_side}} for of_side in (streams, {"bn": {"mean": np.zeros(2)}}))
    comparison = comparator.compare_checkpoints(self.save("a", a), self.save("b", b), ignore_rngs=True)
    self.assertEqual(unequal(comparison), {"model/bn/mean": "only in B"})
    self.assertEqual([set(tree.left_out.values()) for tree in comparison.trees], [{"--ignore_rngs"}, set()])

  def test_the_structure_alone(self):
    state = util.linen(util.unscanned_params(1))
    same = self.save("a", state), self.save("b", jax.tree.map(lambda leaf: np.asarray(leaf) + 1, state))
    alike = comparator.compare_checkpoints(*same, structure_only=True)
    self.assertTrue(alike.is_accepted)
    self.assertEqual(alike.counts(), {"alike in structure": len(alike.leaves)})
    self.assertRegex(
        report.summary(alike), r"^of one structure: 21 leaves \(21 alike in structure\), no values compared, "
    )
    state["params"]["params"]["decoder"]["layers_0"]["mlp"]["wi_0"]["kernel"] = np.zeros((2, 2), np.float32)
    other = comparator.compare_checkpoints(same[0], self.save("c", state), structure_only=True)
    self.assertEqual(unequal(other)["params/params/decoder/layers_0/mlp/wi_0/kernel"], "shape")
    self.assertFalse(other.is_accepted)


if __name__ == "__main__":
  absltest.main()
