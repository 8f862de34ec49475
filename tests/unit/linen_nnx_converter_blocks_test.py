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

"""Layers in blocks that repeat, and under old names."""

from absl.testing import absltest
from absl.testing import parameterized
from linen_nnx_converter_layer_trees import LayersTestCase
from linen_nnx_converter_layer_trees import state
import linen_nnx_converter_util as util
import numpy as np

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import decoder_families
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import layer_stacks
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state

PARAMS = ("params", "params", "decoder", "layers")


class BlocksTest(LayersTestCase):

  def test_blocks_by_position(self):
    """Gemma 3, Llama 4, GPT-OSS, OLMo 3: `layers/layers_<j>` holds layer j of each block; a remainder comes last."""
    layers = [util.array(3, 5, start=100 * n) for n in range(8)]
    blocks = {f"layers_{j}": {"w": np.stack([layers[j], layers[3 + j]], 1)} for j in range(3)}
    remainder = {f"layers_{r}": {"w": layers[6 + r]} for r in range(2)}
    self.assert_unstacked({"layers": blocks, "layers_remainder": remainder}, layers)

  def test_singular_names(self):
    """Qwen3-Next up to 0.2.4, Qwen3.5."""
    layers = [util.array(3, 5, start=100 * n) for n in range(4)]
    self.assert_unstacked(
        {"layers": {f"layer_{j}": {"w": np.stack([layers[j], layers[2 + j]], 1)} for j in range(2)}}, layers
    )

  @parameterized.parameters("layers", "scanned_blocks")
  def test_local_and_global_layers(self, name):
    """Gemma 4 from 0.2.4, Qwen3-Next from 0.2.5: two layer axes, block and local layer, then the block's global layer."""
    layers = [util.array(3, 5, start=100 * n) for n in range(8)]
    local = np.stack([np.stack(layers[4 * b : 4 * b + 3], 1) for b in range(2)], 1)
    self.assertEqual(local.shape, (3, 2, 3, 5))
    blocks = {"local_layers": {"w": local}, "global_layer": {"w": np.stack([layers[3], layers[7]], 1)}}
    self.assert_unstacked({name: blocks}, layers)

  def test_a_prefix_before_the_blocks(self):
    """DeepSeek 4: three layers for themselves, then blocks of two."""
    layers = [util.array(3, 5, start=100 * n) for n in range(7)]
    blocks = {f"layers_{j}": {"w": np.stack([layers[3 + j], layers[5 + j]], 1)} for j in range(2)}
    self.assert_unstacked({**{f"layers_{n}": {"w": layers[n]} for n in range(3)}, "scanned_blocks": blocks}, layers)

  def test_old_names_of_deepseek(self):
    """NNX up to 0.2.3: `dense_layer_<n>`, then `layers/<n>` for the MoE layers, numbered on."""
    layers = [util.array(3, 5, start=100 * n) for n in range(5)]
    decoder = {f"dense_layer_{n}": {"w": layers[n]} for n in range(2)}
    decoder["layers"] = {str(n): {"w": layers[n]} for n in range(2, 5)}
    nnx = {"model": {"decoder": decoder}}
    wanted = {f"dense_layers_{n}": {"w": layers[n]} for n in range(2)}
    wanted |= {f"moe_layers_{n}": {"w": layers[2 + n]} for n in range(3)}
    self.assert_tree(converter.convert_nnx_to_linen(nnx), state(wanted))

  def assert_unstacked(self, decoder, layers):
    wanted = {f"layers_{n}": {"w": layer} for n, layer in enumerate(layers)}
    self.assert_tree(converter.convert_nnx_to_linen({"model": {"decoder": decoder}}, scan_layers=False), state(wanted))
    # Where the layers are scanned already, they stay as they are: the blocks are another model's than a plain stack.
    for options in ({}, {"scan_layers": True}):
      self.assert_tree(converter.convert_nnx_to_linen({"model": {"decoder": decoder}}, **options), state(decoder))

  def test_layers_of_unknown_order_are_never_guessed(self):
    for name in ("pipeline_module", "layers_outside_pipeline"):  # No scale.
      decoder = {name: {"layers": {"w": util.array(3, 4)}}}
      model = converter.convert_linen_to_nnx(state(decoder), nnx_values="plain")["model"]
      self.assert_tree(model, {"decoder": decoder})
      with self.assertRaisesRegex(errors.LayerStackError, f"{name}/layers/w: expected layers whose order is known"):
        converter.convert_linen_to_nnx(state(decoder), scan_layers=False)

  @parameterized.parameters(
      ({"dense_layers_0_1": 2, "moe_layers_3_4": 2}, "moe_layers_3_4/w: expected layers from 2 on, 2 of them"),
      ({"dense_layers_0_1": 3, "moe_layers_2_4": 3}, "dense_layers_0_1/w: expected layers from 0 on, 2 of them"),
      ({"dense_layers_0_1": 2, "moe_layers_1_3": 3}, "moe_layers_1_3/w: expected layers from 2 on, 3 of them"),
      ({"dense_layers_1_1": 1}, "dense_layers_1_1/w: expected layers from 0 on, 1 of them"),
      ({"moe_layers_3_2": 1}, "moe_layers_3_2/w: expected layers from 0 on, 0 of them"),
  )
  def test_engrams_chunks_that_do_not_follow_on_each_other(self, chunks, message):
    decoder = {name: {"w": util.array(3, size, 5)} for name, size in chunks.items()}
    with self.assertRaisesRegex(errors.LayerStackError, message):
      converter.convert_linen_to_nnx(state(decoder))

  def test_a_proven_order_is_that_of_the_proven_arrangements_alone(self):
    """Layers in a plain stack are not those that MaxText's models, which prove an order, have in blocks."""
    unscanned = layer_stacks.unscanned(("decoder", "layers"), 4, layer_stacks.FLAT)
    blocks = decoder_families.Decoder("olmo3", 4, cycle=2)
    scanned = decoder_families.schedule(blocks, True, "nnx", (0, 2, 5))
    decoder = decoder_families.Decoder("new_block", 4, proven=(unscanned, scanned))
    options = {"decoder": decoder, "release": (0, 2, 5), "trainer": "nnx", "scan_layers": False}
    in_blocks = {"layers": {f"layers_{j}": {"w": util.array(3, 2, 5)} for j in range(2)}}
    plan = util.plan_conversion(abstract_state.flatten(state(in_blocks)), **options)
    self.assertEqual(plan.moves["params", "params", "decoder", "layers_3", "w"].sources, [(*PARAMS, "layers_1", "w")])
    with self.assertRaisesRegex(errors.ConfigError, "MaxText's models have them in neither arrangement"):
      util.plan_conversion(abstract_state.flatten(state({"layers": {"w": util.array(3, 4, 5)}})), **options)

  @parameterized.parameters(
      ({"local_layers": {"w": util.array(3, 2, 3, 5)}, "global_layer": {"w": util.array(3, 3, 5)}},),
      ({"layers_0": {"w": util.array(3, 2, 5)}, "layers_1": {"w": util.array(3, 3, 5)}},),
      ({"layers_0": {"w": util.array(3, 2, 5)}, "layers_2": {"w": util.array(3, 2, 5)}},),
      ({"local_layers": {"w": util.array(3, 2, 3, 5)}},),
  )
  def test_refuses_blocks_that_do_not_hold_each_layer_once(self, blocks):
    with self.assertRaises(errors.ConversionError):
      converter.convert_linen_to_nnx(state({"scanned_blocks": blocks}), scan_layers=False)


if __name__ == "__main__":
  absltest.main()
