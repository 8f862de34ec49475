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

"""What a release reads: the trees that MaxText's trainers wrote with each optimizer, turned into another release's.

The trees are those of checkpoints that tiny runs of MaxText 0.2.3, 0.2.4 and 0.2.5 saved; `[]` marks the entry of a list.
"""

import dataclasses
import json
import pathlib
import re
import shutil
import tempfile
import types

from absl.testing import absltest
from absl.testing import parameterized
import jax
import linen_nnx_converter_util as util
import numpy as np
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import in_memory
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import decoder_families
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import releases
from maxtext.common import common_types

OPTIMIZERS = util.FIXTURES / "optimizers"
NAMES = sorted(path.stem for path in (OPTIMIZERS / "0.2.5").glob("*.txt"))


def read(path: pathlib.Path, with_aux: bool = True) -> abstract_state.AbstractState:
  leaves, lists = {}, set()
  for line in path.read_text().splitlines():
    name, leaf = line.split(" ", 1)
    keys = name.split("/")
    where = tuple(key.removesuffix("[]") for key in keys)
    lists.update(where[:i] for i, key in enumerate(keys) if key.endswith("[]"))
    if match := re.fullmatch(r"(\w+)\[(.*)\]", leaf):
      leaf = jax.ShapeDtypeStruct(tuple(map(int, re.findall(r"\d+", match[2]))), np.dtype(match[1]))
    else:
      leaf = {"None": None, "{}": {}, "Dict": {}}[leaf]
    if with_aux or where[0] != "nnx_aux":
      leaves[where] = leaf
  return abstract_state.AbstractState(leaves, frozenset(lists))


class ReleaseTest(parameterized.TestCase):
  maxDiff = 3000

  def assert_state(self, plan, wanted):
    self.assertEqual(*({"/".join(p): str(leaf) for p, leaf in s.leaves.items()} for s in (plan.target, wanted)))
    self.assertEqual(plan.target.lists, wanted.lists)

  @parameterized.parameters(*NAMES)
  def test_linen_for_0_2_5(self, name):
    """The form without which 0.2.5 raises, or silently starts nested moments at zero."""
    source = read(OPTIMIZERS / "0.2.4-linen" / f"{name}.txt")
    self.assert_state(
        util.plan_conversion(source, release=(0, 2, 5)), read(OPTIMIZERS / "0.2.5" / f"{name}.txt", with_aux=False)
    )

  @parameterized.parameters(*NAMES)
  def test_0_2_4_nnx_for_0_2_5(self, name):
    source = read(OPTIMIZERS / "0.2.4-nnx" / f"{name}.txt")
    self.assert_state(util.plan_conversion(source, release=(0, 2, 5)), source)

  @parameterized.parameters(*(name for name in NAMES if "mask" not in name or name == "tmask"))
  def test_nnx_for_the_linen_trainer(self, name):
    source = read(OPTIMIZERS / "0.2.4-nnx" / f"{name}.txt")
    wanted = read(OPTIMIZERS / "0.2.4-linen" / f"{name}.txt")
    leaves = wanted.leaves | {path: leaf for path, leaf in source.leaves.items() if path[0] == "nnx_aux"}
    plan = util.plan_conversion(source, release=(0, 2, 4), trainer="linen")
    self.assert_state(plan, abstract_state.AbstractState(leaves, wanted.lists))

  @parameterized.parameters("adamw_mask", "skip_adamw_mask", "tmask_adamw_mask")
  def test_the_config_tells_of_a_mask_of_the_weight_decay(self, name):
    """Which the Linen trainer needs, and which does not show in NNX."""
    source = read(OPTIMIZERS / "0.2.4-nnx" / f"{name}.txt", with_aux=False)
    nnx = util.plan_conversion(source, direction="linen_to_nnx", nnx_values="plain").target
    wanted = read(OPTIMIZERS / "0.2.4-linen" / f"{name}.txt")
    for state in (source, nnx):
      plan = util.plan_conversion(state, release=(0, 2, 4), trainer="linen", adamw_mask=True)
      self.assert_state(plan, wanted)

  @parameterized.parameters("muon", "adam_pax", "sgd", "adamw_mask")
  def test_a_mask_where_the_optimizer_has_none_or_shows_it(self, name):
    wanted = read(OPTIMIZERS / "0.2.4-linen" / f"{name}.txt")
    source = read(OPTIMIZERS / "0.2.4-nnx" / f"{name}.txt", with_aux=False)
    for state in (wanted, source):
      self.assert_state(util.plan_conversion(state, release=(0, 2, 4), trainer="linen", adamw_mask=True), wanted)

  @parameterized.parameters(*NAMES)
  def test_true_nnx_for_0_2_5(self, name):
    """A TrainStateNNX of spring 2026, which had no Linen layout."""
    source = read(OPTIMIZERS / "0.2.5" / f"{name}.txt")
    nnx = util.plan_conversion(source, direction="linen_to_nnx", nnx_values="plain").target
    self.assert_state(util.plan_conversion(nnx, release=(0, 2, 5)), source)

  @parameterized.parameters(*NAMES)
  def test_the_params_alone_for_a_release(self, name):
    plan = util.plan_conversion(read(OPTIMIZERS / "0.2.4-linen" / f"{name}.txt"), release=(0, 2, 5), params_only=True)
    self.assertTrue(all(path[:2] == ("params", "params") for path in plan.target.leaves))

  @parameterized.parameters("maxtext-0.2.4/linen_scan", "maxtext-0.2.5/nnx_scan", "maxtext-main-2026-05-14/nnx_scan")
  def test_the_params_alone_are_what_every_release_loads(self, name):
    source = abstract_state.abstract(abstract_state.flatten(converter.load_checkpoint(util.FIXTURES / name)))
    plan = util.plan_conversion(source, params_only=True)
    self.assertTrue(all(path[:2] == ("params", "params") for path in plan.target.leaves))
    self.assertEqual(plan.scan_layers, plan.source_scan_layers)
    if name.endswith("linen_scan"):
      nnx = util.plan_conversion(source, params_only=True, nnx_values="boxed")
      self.assertTrue(all(path[-1] == "value" for path in nnx.target.leaves))

  def test_integer_keys_of_0_2_3_become_names(self):
    source = util.FIXTURES / "maxtext-0.2.3" / "nnx_unscan"
    tree = converter.load_checkpoint(source)
    for release in ("0.2.4", "0.2.5"):
      plan = util.plan_conversion(abstract_state.abstract(abstract_state.flatten(tree)), release=releases.parse(release))
      self.assertIn(("params", "params", "decoder", "layers_3", "mlp", "wo", "kernel"), plan.target.leaves)
      self.assertFalse(any("3" in path for path in plan.target.leaves))
    same = util.plan_conversion(abstract_state.abstract(abstract_state.flatten(tree)), release=(0, 2, 3), trainer="nnx")
    self.assertEqual(same.target.leaves, same.source.leaves)

  def test_the_spring_2026_trainers_checkpoint_for_each_release(self):
    tree = converter.load_checkpoint(util.FIXTURES / "maxtext-main-2026-05-14" / "nnx_unscan")
    source = abstract_state.abstract(abstract_state.flatten(tree))
    for release, layer in (((0, 2, 3), ("layers", "3")), ((0, 2, 4), ("layers_3",)), ((0, 2, 5), ("layers_3",))):
      plan = util.plan_conversion(source, release=release, trainer="nnx")
      self.assertIn(("params", "params", "decoder", *layer, "mlp", "wo", "kernel"), plan.target.leaves)
      self.assertEqual(plan.target_layout.framework, "linen")

  @parameterized.parameters(("0.2.5", "nnx"), ("0.2.4", "linen"), ("0.3.0.dev1", "nnx"))
  def test_the_trainer_of_a_release(self, release, trainer):
    self.assertEqual(releases.find(releases.parse(release)).trainer, trainer)

  @parameterized.parameters(((0, 2, 5), "linen"), ((0, 2, 2), "nnx"))
  def test_a_trainer_that_a_release_lacks(self, version, trainer):
    with self.assertRaisesRegex(errors.DirectionError, f"expected a release with a trainer of {trainer}"):
      releases.find(version, trainer)

  def test_a_release_that_nobody_has_tried_is_said_to_be_one(self):
    self.assertEqual([*releases.notes(None), *releases.notes((0, 2, 3)), *releases.notes((0, 2, 5))], [])
    (note,) = releases.notes((0, 2, 6))
    self.assertStartsWith(note, "MaxText 0.2.6 is newer than 0.2.5, the last that was tried")

  def test_no_version(self):
    with self.assertRaisesRegex(errors.DirectionError, "--maxtext_release=new: expected a version such as 0.2.5"):
      releases.parse("new")


class ConfigTest(parameterized.TestCase):
  """A config's settings, on real checkpoints; `tests/integration` reads real configs with MaxText."""

  def setUp(self):
    super().setUp()
    self.tmp = pathlib.Path(tempfile.mkdtemp())
    self.addCleanup(shutil.rmtree, self.tmp)

  def config(self, **settings):
    """The settings of MaxText's config that matter here."""
    defaults = {
        "model_name": "default",
        "decoder_block": "llama2",
        "num_decoder_layers": 4,
        "scan_layers": True,
        "param_scan_axis": 1,
        "load_full_state_path": "",
        "load_parameters_path": "",
        "base_output_directory": "",
        "run_name": "",
    }
    return types.SimpleNamespace(**(defaults | settings))

  def convert(self, source, config, **options):
    return converter.convert_checkpoint(source, self.tmp / "out", config=config, check_model=False, **options)

  @parameterized.parameters(True, False)
  @pytest.mark.integration
  def test_the_config_gives_the_arrangement(self, scan_layers):
    source = util.FIXTURES / "maxtext-0.2.4" / "linen_scan"
    conversion = self.convert(source, self.config(scan_layers=scan_layers), maxtext_release="0.2.5")
    self.assertEqual(conversion.plan.scan_layers, scan_layers)
    self.assertEqual(str(conversion.plan.target_layout), "Linen layout of the NNX trainer")
    decoder = converter.load_checkpoint(self.tmp / "out")["params"]["params"]["decoder"]
    self.assertIn("layers" if scan_layers else "layers_3", decoder)

  def test_the_config_gives_the_paths(self):
    source = util.FIXTURES / "maxtext-0.2.4" / "linen_scan" / "2" / "items"
    config = self.config(load_full_state_path=str(source), base_output_directory=str(self.tmp), run_name="run")
    converter.convert_checkpoint(config=config, check_model=False, maxtext_release="0.2.4")
    self.assertTrue((self.tmp / "run" / "checkpoints" / "2" / "items" / "_METADATA").exists())

  @parameterized.parameters(
      ({}, {}, (True, True)),
      ({"checkpoint_storage_use_zarr3": False}, {}, (True, False)),
      ({"checkpoint_storage_use_ocdbt": False, "checkpoint_storage_use_zarr3": False}, {}, (False, False)),
      ({"checkpoint_storage_use_zarr3": False}, {"use_zarr3": True}, (True, True)),
      ({"checkpoint_storage_use_zarr3": True}, {"use_zarr3": False}, (True, False)),
  )
  def test_the_config_gives_the_format_unless_an_option_does(self, settings, options, expected):
    source = util.FIXTURES / "maxtext-0.2.4" / "linen_scan"
    self.convert(source, self.config(**settings), maxtext_release="0.2.5", **options)
    metadata = json.loads((self.tmp / "out" / "2" / "items" / "_METADATA").read_text())
    self.assertEqual((metadata["use_ocdbt"], metadata["use_zarr3"]), expected)

  @parameterized.parameters(
      ({"num_decoder_layers": 6}, {}, "decoder/layers: expected 6 layers, as the config says, found 4 in the checkpoint"),
      ({}, {"scan_layers": False}, "--scan_layers=False: expected scan_layers=True, as the config says, found False"),
      ({}, {"param_scan_axis": 0}, "--param_scan_axis=0: expected param_scan_axis=1"),
      ({"decoder_block": "deepseek", "first_num_dense_layers": 1}, {}, "decoder/dense_layers: expected 1 layers"),
  )
  def test_a_config_that_contradicts_the_checkpoint(self, settings, options, message):
    with self.assertRaisesRegex(errors.ConversionError, message):
      self.convert(util.FIXTURES / "maxtext-0.2.4" / "linen_scan", self.config(**settings), **options)
    self.assertEmpty(list(self.tmp.iterdir()))

  @parameterized.parameters(True, False)
  def test_a_scan_flag_that_is_not_true_of_the_checkpoint(self, scan_layers):
    source = self.tmp / "source"
    shutil.copytree(util.FIXTURES / "maxtext-0.2.4" / "linen_scan", source)
    metadata = source / "2" / "_CHECKPOINT_METADATA"
    metadata.write_text(metadata.read_text().replace('"scan_layers": true', '"scan_layers": false'))
    message = "_CHECKPOINT_METADATA: expected scan_layers=True, as the layers .* are written, found scan_layers=False"
    with self.assertRaisesRegex(errors.ConfigError, message):
      self.convert(source, self.config(scan_layers=scan_layers), maxtext_release="0.2.5")
    self.assertFalse((self.tmp / "out").exists())
    converter.convert_checkpoint(source, self.tmp / "out", direction="linen_to_linen")  # Nothing else is asked of it.
    self.assertIn('"scan_layers": true', (self.tmp / "out" / "2" / "_CHECKPOINT_METADATA").read_text())

  def test_a_routing_bias_is_transposed(self):
    """(experts, layers) among the params becomes (layers, experts) in nnx_aux, on disk and in memory, and is verified."""
    bias = np.arange(5 * 3, dtype=np.float32).reshape(5, 3)
    layers = {"gate": {"bias": bias, "kernel": util.array(4, 3, 5)}}
    tree = util.linen({"decoder": {"dense_layers": {"w": util.array(4, 1)}, "moe_layers": layers}})
    converter.save_checkpoint(tree, self.tmp / "source")
    config = self.config(
        decoder_block="deepseek", model_name="deepseek3-671b", num_decoder_layers=4, first_num_dense_layers=1
    )
    conversion = self.convert(self.tmp / "source", config, maxtext_release="0.2.5")
    out = converter.load_checkpoint(self.tmp / "out")
    np.testing.assert_array_equal(out["nnx_aux"]["model"]["decoder"]["moe_layers"]["gate"]["bias"], bias.T)
    self.assertNotIn("bias", out["opt_state"][0]["mu"]["params"]["decoder"]["moe_layers"]["gate"])
    self.assertEqual(conversion.plan.counts()["transpose"], 1)
    self.assertIn("left out 2 leaves (MaxText 0.2.5 trains no gate/bias)", conversion.summary())
    source = abstract_state.flatten(tree)
    moved = in_memory.apply(conversion.plan, source.leaves)
    np.testing.assert_array_equal(moved["nnx_aux", "model", "decoder", "moe_layers", "gate", "bias"], bias.T)

  def test_notes_are_in_the_summary_and_on_record(self):
    conversion = self.convert(util.FIXTURES / "maxtext-0.2.4" / "linen_scan", None)
    noted = dataclasses.replace(conversion, notes=("a note",))
    self.assertIn("; a note; digests of", noted.summary())
    self.assertEqual(noted.record()["notes"], ["a note"])

  @parameterized.parameters(
      ("linen_scan", "new_block", "0.2.5", True, ""),
      ("linen_scan", "new_block", "0.2.5", False, "found layers to unstack, of decoder_block=new_block"),
      ("linen_scan", "envy", "0.2.3", False, "found layers to unstack, of decoder_block=envy"),
      ("linen_unscan", "new_block", "0.2.5", False, ""),
      ("linen_unscan", "new_block", "0.2.5", True, "found layers to stack, of decoder_block=new_block"),
  )
  def test_an_unknown_decoder_block_keeps_its_arrangement(self, name, block, release, scan_layers, message):
    source = util.FIXTURES / "maxtext-main-2026-05-14" / name
    config = self.config(decoder_block=block, scan_layers=scan_layers)
    if not message:
      self.assertEqual(self.convert(source, config, maxtext_release=release).plan.scan_layers, scan_layers)
      return
    with self.assertRaisesRegex(errors.ConfigError, message):
      self.convert(source, config, maxtext_release=release)
    self.assertFalse((self.tmp / "out").exists())

  def test_every_decoder_block_of_the_installed_maxtext_is_known(self):
    blocks = {block.value for block in common_types.DecoderBlockType}
    self.assertEqual(blocks, set(decoder_families.DECODER_BLOCKS))


if __name__ == "__main__":
  absltest.main()
