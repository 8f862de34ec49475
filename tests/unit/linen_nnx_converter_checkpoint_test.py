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

"""Checkpoints on disk: those that MaxText wrote, and tiny ones of every way that Orbax writes."""

import itertools
import json
import os
import shutil

from absl.testing import absltest
from absl.testing import parameterized
import linen_nnx_converter_util as util
import numpy as np
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import locations
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import digests


class MaxTextCheckpointTest(util.CheckpointTestCase):
  """Each checkpoint that MaxText's trainers wrote, there and back."""

  @parameterized.parameters(*itertools.product(util.LINEN + util.LINEN_LAYOUT_OF_NNX, ("boxed", "plain", "all_boxed")))
  @pytest.mark.integration
  def test_linen_there_and_back(self, name, nnx_values):
    source = util.FIXTURES / name
    before = util.snapshot(source)
    naming = "nested" if name == "maxtext-0.2.3/nnx_unscan" else "flat"  # Which that release wrote even in this layout.
    scan_layers = not name.endswith("unscan")
    converter.convert_checkpoint(source, self.tmp / "nnx", nnx_values=nnx_values, scan_layers=scan_layers)
    converter.convert_checkpoint(self.tmp / "nnx", self.tmp / "linen", layer_naming=naming)
    self.assertEqual(converter.detect_format(converter.load_checkpoint(self.tmp / "nnx")), "nnx")
    self.assertEqual(
        util.flat(converter.load_checkpoint(self.tmp / "linen")), util.flat(converter.load_checkpoint(source))
    )
    self.assertEqual(util.snapshot(source), before)

  @parameterized.parameters(*util.NNX)
  def test_nnx_there_and_back(self, name):
    source = util.FIXTURES / name
    converter.convert_checkpoint(source, self.tmp / "linen")
    converter.convert_checkpoint(
        self.tmp / "linen", self.tmp / "nnx", nnx_values="plain", scan_layers=name.endswith("/nnx_scan")
    )
    self.assertEqual(util.flat(converter.load_checkpoint(self.tmp / "nnx")), util.flat(converter.load_checkpoint(source)))

  @parameterized.parameters(*util.ALL)
  @pytest.mark.integration
  def test_the_other_arrangement_and_back(self, name):
    source, direction = util.FIXTURES / name, "nnx_to_nnx" if name in util.NNX else "linen_to_linen"
    is_scanned = not name.endswith("unscan")
    if name == "maxtext-main-2026-05-14/nnx_unscan":  # Its layers share RNG streams, which layer 0 alone holds.
      with self.assertRaisesRegex(errors.LayerStackError, "model/decoder/layers/1/.*/count: .* --nnx_aux=drop"):
        converter.convert_checkpoint(source, self.tmp / "other", direction=direction, scan_layers=True)
      converter.convert_checkpoint(source, self.tmp / "params", direction=direction, nnx_aux="drop")
      source = self.tmp / "params"
    naming = {"layer_naming": "nested"} if name == "maxtext-0.2.3/nnx_unscan" else {}
    converter.convert_checkpoint(source, self.tmp / "other", direction=direction, scan_layers=not is_scanned)
    converter.convert_checkpoint(
        self.tmp / "other", self.tmp / "back", direction=direction, scan_layers=is_scanned, **naming
    )
    self.assertEqual(
        util.flat(converter.load_checkpoint(self.tmp / "back")), util.flat(converter.load_checkpoint(source))
    )

  @parameterized.parameters(*util.ALL)
  @pytest.mark.integration
  def test_disk_and_memory_agree(self, name):
    """Both run the same plan."""
    tree = converter.load_checkpoint(util.FIXTURES / name)
    in_memory = (converter.convert_nnx_to_linen if name in util.NNX else converter.convert_linen_to_nnx)(tree)
    converter.convert_checkpoint(util.FIXTURES / name, self.tmp / "target")
    self.assertEqual(util.flat(converter.load_checkpoint(self.tmp / "target")), util.flat(in_memory))

  def test_the_target_is_a_step_that_orbax_frames(self):
    """The same files and metadata as Orbax's own save of the same tree."""
    source = util.FIXTURES / "maxtext-0.2.4" / "linen_scan"
    converter.convert_checkpoint(source, self.tmp / "target")
    step = self.tmp / "target" / "2"
    self.assertCountEqual(os.listdir(self.tmp / "target"), ["2"])
    files = lambda folder: set(os.listdir(folder)) - {"commit_success.txt"}  # Orbax writes it from 0.12 on.
    self.assertEqual(files(step), files(source / "2"))
    self.assertEqual(files(step / "items"), files(source / "2" / "items") | {digests.FILE})
    names = lambda folder: set(json.loads((folder / "2" / "items" / "_METADATA").read_text()))
    self.assertEqual(names(self.tmp / "target"), names(source))
    ours, theirs = (json.loads((f / "2" / "_CHECKPOINT_METADATA").read_text()) for f in (self.tmp / "target", source))
    self.assertEqual(ours["item_handlers"], theirs["item_handlers"])
    shardings = lambda folder: sorted(json.loads((folder / "2" / "items" / "_sharding").read_text()).values())
    self.assertEqual(shardings(self.tmp / "target"), shardings(source))

  @parameterized.parameters((True,), (False,))
  @pytest.mark.integration
  def test_custom_metadata_is_made_true(self, scan_layers):
    source = shutil.copytree(util.FIXTURES / "maxtext-0.2.4" / "linen_scan", self.tmp / "source")
    path = source / "2" / "_CHECKPOINT_METADATA"
    document = json.loads(path.read_text())
    document["custom_metadata"]["lora"] = {"rank": 0}
    path.write_text(json.dumps(document))
    converter.convert_checkpoint(source, self.tmp / "target", scan_layers=scan_layers)
    metadata = json.loads((self.tmp / "target" / "2" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    self.assertEqual(metadata["scan_layers"], scan_layers)
    self.assertEqual(metadata["lora"], {"rank": 0})
    record = metadata["linen_nnx_converter"]
    self.assertEqual(record["source"], str(source / "2" / "items"))
    self.assertEqual(record["source_layout"], "Linen TrainState")
    self.assertEqual(record["target_layout"], "NNX TrainStateNNX, boxed")
    self.assertTrue(record["verified"])
    self.assertEqual(
        record["leaves"],
        {"copy": 39 if scan_layers else 12, "stack": 0, "slice": 0 if scan_layers else 108, "transpose": 0, "dropped": 0},
    )

  def test_sibling_items_go_along(self):
    source = shutil.copytree(util.FIXTURES / "maxtext-0.2.4" / "linen_scan", self.tmp / "source")
    (source / "2" / "iter" / "deep").mkdir(parents=True)
    (source / "2" / "iter" / "deep" / "process_0-of-1.json").write_text('{"next": 3}')
    path = source / "2" / "_CHECKPOINT_METADATA"
    document = json.loads(path.read_text())
    document["item_handlers"]["iter"] = "some.Handler"
    path.write_text(json.dumps(document))
    converter.convert_checkpoint(source, self.tmp / "target")
    target = self.tmp / "target" / "2"
    self.assertEqual((target / "iter" / "deep" / "process_0-of-1.json").read_text(), '{"next": 3}')
    handlers = json.loads((target / "_CHECKPOINT_METADATA").read_text())["item_handlers"]
    self.assertEqual(handlers["iter"], "some.Handler")
    self.assertIn("items", handlers)

  def test_nnx_aux_can_be_left_out(self):
    conversion = converter.convert_checkpoint(
        util.FIXTURES / "maxtext-0.2.4" / "nnx_scan", self.tmp / "nnx", nnx_aux="drop"
    )
    self.assertNotIn("rngs", "/".join(util.flat(converter.load_checkpoint(self.tmp / "nnx"))))
    self.assertIn("left out 30 leaves (--nnx_aux=drop)", conversion.summary())
    self.assertLen(conversion.record()["dropped"], 30)


class RecordTest(util.CheckpointTestCase):

  def test_what_was_done_is_said_in_words(self):
    """Four layers of a pipeline of two repeats and two stages become one stack."""
    layers = {"norm": {"scale": util.array(2, 2, 3)}, "wi": {"kernel": util.array(2, 2, 3, 5)}}
    decoder = {"pipeline_module": {"layers": layers}, "final": {"scale": util.array(3)}}
    source = self.save("pipeline", {"params": {"params": {"decoder": decoder}}})
    done = converter.convert_checkpoint(source, self.tmp / "out", direction="linen_to_linen", scan_layers=True)
    self.assertIn(": 3 leaves (1 copied, 2 restacked), ", done.summary())

  def test_an_option_that_means_no_layers_is_said_to_change_nothing(self):
    source = self.save("source", {"params": {"params": {"decoder": {"block_0": {"w": util.array(3)}}}}})
    for name, scan_layers in (("scanned", True), ("unscanned", False), ("as_it_is", None)):
      done = converter.convert_checkpoint(source, self.tmp / name, scan_layers=scan_layers)
      self.assertEqual("; --scan_layers changes nothing: " in done.summary(), scan_layers is not None)

  def test_empty_nodes_that_nnx_does_not_write_come_back(self):
    """A chain whose empty ends no rule knows, and the mask of a weight decay."""
    params = {"w": util.array(2)}
    one = np.array(1, np.int32)
    adam = {"count": one, "mu": {"params": params}, "nu": {"params": params}}
    tree = {
        "params": {"params": params},
        "opt_state": [None, {"inner_state": None}, adam, {"inner_state": [None, {}, {"x": one}]}, None, (), []],
        "step": one,
    }
    converter.convert_checkpoint(self.save("source", tree), self.tmp / "nnx")
    converter.convert_checkpoint(self.tmp / "nnx", self.tmp / "plain", direction="nnx_to_nnx", nnx_values="plain")
    converter.convert_checkpoint(self.tmp / "plain", self.tmp / "linen")
    self.assertEqual(util.flat(converter.load_checkpoint(self.tmp / "linen")), util.flat(tree))
    self.assertNotIn(locations.RECORD, (self.tmp / "source" / "_CHECKPOINT_METADATA").read_text())


if __name__ == "__main__":
  absltest.main()
