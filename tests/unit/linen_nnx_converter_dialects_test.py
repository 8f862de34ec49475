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

"""Checkpoints of MaxText that are no plain train state: each converts, or is refused by name.

The trees are those that MaxText wrote, cut down to a weight or two.
"""

from absl.testing import absltest
from absl.testing import parameterized
import linen_nnx_converter_util as util
import numpy as np

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import locations

SCALE, STACKED, KERNEL = util.array(4), util.array(4, 3, 5), util.array(4, 5)
WEIGHTS = {"decoder": {"decoder_norm": {"scale": SCALE}, "layers": {"mlp": {"wi_0": {"kernel": STACKED}}}}}
STEP = np.array(3, np.int32)


def replicas(leaf):
  return np.stack([leaf, leaf + 1])


# MaxText 0.2.5 with enable_diloco and two replicas: the outer params are plain, the inner state is stacked.
DILOCO = {
    "inner_state": {
        "params": {"params": {"decoder": {"decoder_norm": {"scale": replicas(SCALE)}}}},
        "opt_state": [{"count": np.int32([3, 3])}, None],
        "step": np.int32([3, 3]),
        "nnx_aux": {"model": {"decoder": {"rngs": {"params": {"count": np.uint32([1, 1])}}}}},
    },
    "params": {"params": WEIGHTS},
    "outer_opt_state": [{"trace": WEIGHTS}, None],
    "step": np.array(3, np.uint32),
}
AQT = {"AqtDotGeneral_0": {"qrhs": {"frozen": {"qvalue": util.array(3, 4, 5, dtype=np.int8), "scale": [KERNEL]}}}}
AQT_LINEN = {
    "params": {
        "params": {"decoder": {"decoder_norm": {"scale": SCALE}, "layers": {"mlp": {"wi_0": {"kernel": {}}}}}},
        "aqt": {"decoder": {"layers": {"mlp": {"wi_0": AQT}}}},
    }
}
AQT_NNX = {
    "decoder": {
        "decoder_norm": {"scale": {"value": SCALE}},
        "layers": {"mlp": {"wi_0": {"AqtDotGeneral_0": {"qrhs": {"frozen": {"value": {"qvalue": STACKED}}}}}}},
    }
}
ADAPTERS = {"decoder": {"layers": {"mlp": {"wi_0": {"kernel_lora_a": STACKED, "kernel_lora_b": STACKED}}}}}


class DialectsTest(util.CheckpointTestCase):

  def assert_tree(self, found, expected):
    self.assertEqual(util.flat(found), util.flat(expected))

  @parameterized.named_parameters(
      (
          "diloco",
          DILOCO,
          "^inner_state: expected one train state, found a DiLoCo state: .*--params_only",
      ),
      (
          "aqt_linen",
          AQT_LINEN,
          "^params/aqt/decoder/.*/frozen/qvalue: .* AQT has quantized .*then quantize anew",
      ),
      ("aqt_nnx", AQT_NNX, "^decoder/.*/frozen/value/qvalue: expected weights as they are trained, found .* AQT"),
      (
          "lora",
          {"params": {"params": ADAPTERS}, "opt_state": [{"mu": {"params": ADAPTERS}}], "step": STEP},
          "^params/params/.*kernel_lora_a: expected the weights of a model, found LoRA adapters alone. Convert the base",
      ),
      ("lora_for_decoding", {"params": {"params": ADAPTERS}}, "found LoRA adapters alone. Convert the base checkpoint"),
      ("lora_without_adapters", {"step": STEP}, "^top level: expected model .* found step.*LoRA runs save the adapters"),
  )
  def test_refused_by_name(self, state, message):
    for convert in (converter.convert_linen_to_nnx, converter.convert_nnx_to_linen):
      with self.assertRaisesRegex(errors.LayoutError, message):
        convert(state)

  def test_the_outer_params_of_diloco(self):
    options = {"direction": "linen_to_nnx", "params_only": True}
    conversion = converter.convert_checkpoint(self.save("in", DILOCO), self.tmp / "out", **options)
    self.assert_tree(
        converter.load_checkpoint(self.tmp / "out"),
        {
            "decoder": {
                "decoder_norm": {"scale": {"value": SCALE}},
                "layers": {"mlp": {"wi_0": {"kernel": {"value": STACKED}}}},
            }
        },
    )
    dropped = {"/".join(path) for path in conversion.plan.dropped}
    self.assertIn("inner_state/params/params/decoder/decoder_norm/scale", dropped)
    self.assertIn("outer_opt_state/0/trace/decoder/decoder_norm/scale", dropped)
    linen = converter.convert_checkpoint(self.tmp / "in", self.tmp / "same", params_only=True)
    self.assert_tree(converter.load_checkpoint(linen.target), {"params": {"params": WEIGHTS}})
    self.assertEqual(str(linen.plan.target_layout), "Linen TrainState")

  def test_adapters_beside_the_base_are_weights(self):
    both = {"params": {"params": {"decoder": {"norm": {"scale": SCALE, "scale_lora_a": SCALE}}}}}
    self.assert_tree(converter.convert_nnx_to_linen(converter.convert_linen_to_nnx(both)), both)

  @parameterized.named_parameters(
      ("for_decoding", {"params": {"params": WEIGHTS}, "opt_state": {}, "step": np.array(0, np.int32)}),
      ("params_only", {"params": {"params": WEIGHTS}}),
  )
  def test_without_an_optimizer(self, linen):
    nnx = converter.convert_linen_to_nnx(linen, nnx_values="plain")
    self.assert_tree(nnx["model"], WEIGHTS)
    self.assert_tree(converter.convert_nnx_to_linen(nnx), linen)

  def test_a_decode_checkpoint_of_the_nnx_trainer(self):
    boxed = converter.convert_linen_to_nnx({"params": {"params": WEIGHTS}}, params_only=True)
    for bare in (boxed, WEIGHTS):
      self.assert_tree(converter.convert_nnx_to_linen(bare), {"params": {"params": WEIGHTS}})

  def test_the_persistent_part_of_an_emergency_checkpoint(self):
    """Orbax's emergency manager names the item `default`; it is the plain train state."""
    self.save("in/7/default", util.linen(WEIGHTS))
    conversion = converter.convert_checkpoint(self.tmp / "in", self.tmp / "out")
    self.assertEqual(conversion.target, locations.absolute(self.tmp / "out" / "7" / "default"))

  def test_the_local_part_of_an_emergency_checkpoint(self):
    self.save("in/7/state", util.linen(WEIGHTS))
    (self.tmp / "in" / "7" / "process_metadata").mkdir()
    for source in ("in", "in/7", "in/7/state"):
      with self.assertRaisesRegex(
          errors.NotACheckpointError, "/7: expected a whole checkpoint, found process_metadata, .* emergency .*persistent"
      ):
        converter.convert_checkpoint(self.tmp / source, self.tmp / "out")
    self.assert_nothing_left("in")


if __name__ == "__main__":
  absltest.main()
