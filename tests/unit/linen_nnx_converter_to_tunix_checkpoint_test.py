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

"""Steps on disk for Tunix, and for MaxText's training engine: two items, in one commit."""

import os
import shutil

from absl.testing import absltest
from absl.testing import parameterized
import jax
import linen_nnx_converter_util as util
import numpy as np
import orbax.checkpoint as ocp
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import leaf_routes
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import atomic_target
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import orbax_writer

TUNIX = util.FIXTURES / "tunix" / "sft"
ENGINE = util.FIXTURES / "training_engine" / "complete"
ITEMS = ["model_params", "optimizer_state"]


class ToTunixTest(util.CheckpointTestCase):

  def setUp(self):
    super().setUp()
    self.tree = self.tree_of(TUNIX, 3)
    self.source = self.save_steps("source", self.tree)

  def tree_of(self, saved, step):
    """What MaxText has of a trainer's own checkpoint, with its RNG state, which MaxText itself would have drawn anew."""
    converter.convert_checkpoint(saved, self.tmp / "maxtext")
    tree = converter.load_checkpoint(self.tmp / "maxtext" / str(step))
    shutil.rmtree(self.tmp / "maxtext")
    decoder = converter.load_checkpoint(saved)["model_params"]["decoder"]
    plain = lambda boxed: jax.tree.map(lambda box: box["value"], boxed, is_leaf=lambda node: "value" in node)
    aux = {"rngs": plain(decoder["rngs"])}
    aux["layers"] = {"self_attention": {"rngs": plain(decoder["layers"]["self_attention"]["rngs"])}}
    return tree | {"nnx_aux": {"model": {"decoder": aux}}}

  def save_steps(self, name, tree, step=3):
    with ocp.CheckpointManager(self.tmp / name, item_names=("items", "iter")) as manager:
      items = ocp.args.Composite(items=ocp.args.PyTreeSave(tree), iter=ocp.args.JsonSave({"at": 3}))
      manager.save(step, args=items, custom_metadata={"scan_layers": True})
    return self.tmp / name

  def convert(self, source=None, target="out", **options):
    return converter.convert_checkpoint(source or self.source, self.tmp / target, target_layout="tunix", **options)

  def load(self, folder):
    return util.flat(converter.load_checkpoint(folder))

  def test_the_target_is_what_tunix_had_saved(self):
    before = util.snapshot(self.source)
    done = self.convert(verify="full")
    self.assertEqual(self.load(self.tmp / "out"), self.load(TUNIX))
    self.assertEqual(util.snapshot(self.source), before)
    self.assertCountEqual(os.listdir(self.tmp / "out"), ["4"])
    step = self.tmp / "out" / "4"
    self.assertCountEqual(os.listdir(step), [*ITEMS, "iter", "_CHECKPOINT_METADATA", "commit_success.txt"])
    self.assertEqual(os.fspath(done.target), os.fspath(step))
    self.assertTrue(done.verified)
    self.assertEmpty(done.plan.dropped)
    self.assertEqual(done.digests, len(done.ways))
    with ocp.CheckpointManager(self.tmp / "out") as manager:
      self.assertEqual(manager.latest_step(), 4)
      self.assertEqual(manager.metadata(4).custom_metadata["scan_layers"], True)

  def test_the_target_is_what_the_training_engine_had_saved(self):
    """`optimizer_state/step` is 2 in both, for the engine counts updates there, and Tunix micro-batches."""
    source = self.save_steps("engine", self.tree_of(ENGINE, 1), 1)
    done = converter.convert_checkpoint(source, self.tmp / "out", target_layout="training_engine", verify="full")
    self.assertTrue(done.verified)
    self.assertEqual(str(done.plan.target_layout), "MaxText's training engine, boxed everywhere")
    self.assertEqual(self.load(self.tmp / "out"), self.load(ENGINE))
    self.assertCountEqual(
        os.listdir(self.tmp / "out" / "2"), [*ITEMS, "iter", "_CHECKPOINT_METADATA", "commit_success.txt"]
    )
    with ocp.CheckpointManager(self.tmp / "out") as manager:
      metadata = manager.metadata(2).custom_metadata
    self.assertEqual((metadata["micro_step_count"], metadata["scan_layers"]), (0, True))
    converter.convert_checkpoint(self.tmp / "out", self.tmp / "back")  # It is read as the engine's own are.
    kept = {path: leaf for path, leaf in self.load(source).items() if not path.startswith("nnx_aux")}
    self.assertEqual(self.load(self.tmp / "back" / "1"), kept)

  def test_and_back(self):
    self.convert()
    converter.convert_checkpoint(self.tmp / "out", self.tmp / "back")
    given = self.load(self.source)
    kept = {path: leaf for path, leaf in given.items() if not path.startswith("nnx_aux")}
    self.assertEqual(self.load(self.tmp / "back" / "3"), kept)

  def test_unscanned(self):
    self.convert(scan_layers=False)
    weights = converter.load_checkpoint(self.tmp / "out")["model_params"]["decoder"]
    given = self.tree["params"]["params"]["decoder"]["layers"]["mlp"]["wo"]["kernel"]
    for i in range(3):
      np.testing.assert_array_equal(weights[f"layers_{i}"]["mlp"]["wo"]["kernel"]["value"], given[:, i])

  def test_without_rng_state_nothing_is_written(self):
    source = self.save_steps("linen", {name: part for name, part in self.tree.items() if name != "nnx_aux"})
    with self.assertRaisesRegex(errors.LayoutError, "^model_params: expected RNG state .* none in the source"):
      self.convert(source)
    self.assert_nothing_left("source", "linen")

  def test_files_of_both_are_linked_into_both(self):
    util.in_one_file(self.source / "3" / "items")
    with absltest.mock.patch.object(leaf_routes, "_DEAD_BYTES", 0):
      done = self.convert()
    ways = list(done.ways.values())
    self.assertLen([way for way in ways if way == "by reference"], len(ways) - 1)  # All but the step, which is cast.
    (file,) = {path.stat().st_ino for path in (self.source / "3" / "items" / "d").iterdir()}
    for item in ITEMS:
      self.assertIn(file, {path.stat().st_ino for path in (self.tmp / "out" / "4" / item / "d").iterdir()})
    self.assertEqual(self.load(self.tmp / "out"), self.load(TUNIX))

  @parameterized.parameters({"copy_mode": "copy"}, {"use_zarr3": True}, {"use_ocdbt": False}, {"chunk_byte_size": 1024})
  @pytest.mark.integration
  def test_other_ways(self, **options):
    util.in_one_file(self.source / "3" / "items")
    with absltest.mock.patch.object(leaf_routes, "_DEAD_BYTES", 0):
      done = self.convert(**options)
    self.assertNotIn("by reference", done.ways.values())
    self.assertEqual(self.load(self.tmp / "out"), self.load(TUNIX))
    inodes = lambda folder: {path.stat().st_ino for path in folder.rglob("*") if path.is_file()}
    self.assertEmpty(inodes(self.source) & inodes(self.tmp / "out"))

  def test_the_target_alone_is_verified(self):
    self.convert(verify="full")
    audit = converter.verify_checkpoint(self.tmp / "out")
    self.assertLen(audit.verified, len(self.load(TUNIX)))
    self.assertEmpty(audit.without_digest)
    for item in ITEMS:
      folder = self.tmp / "out" / "4" / item
      (folder / "linen_nnx_converter_digests.json").rename(self.tmp / "digests")
      with self.assertRaisesRegex(errors.NotACheckpointError, f"{item}: expected linen_nnx_converter_digests.json"):
        converter.verify_checkpoint(self.tmp / "out")
      (self.tmp / "digests").rename(folder / "linen_nnx_converter_digests.json")

  @parameterized.parameters(*ITEMS)
  @pytest.mark.integration
  def test_a_fault_in_either_prevents_both(self, item):
    real = orbax_writer.save

    def save(*args, before_commit, **kwargs):
      def damaged_first(folder):
        (folder / item / "_METADATA").unlink()
        before_commit(folder)

      real(*args, before_commit=damaged_first, **kwargs)

    with absltest.mock.patch.object(orbax_writer, "save", save), self.assertRaises(errors.ConversionError):
      self.convert()
    self.assert_nothing_left("source")

  @pytest.mark.integration
  def test_an_interrupted_conversion_is_resumed(self):
    staging, real = self.tmp / "out" / f"4{atomic_target.SUFFIX}", orbax_writer.save

    def save(*args, before_commit, **kwargs):
      def and_keep(folder):
        shutil.copytree(staging, self.tmp / "killed")
        before_commit(folder)

      real(*args, before_commit=and_keep, **kwargs)

    with absltest.mock.patch.object(orbax_writer, "save", save):
      self.convert(use_zarr3=True)
    shutil.rmtree(self.tmp / "out" / "4")
    (self.tmp / "killed").rename(staging)
    done = self.convert(use_zarr3=True, resume=True)
    self.assertEqual(set(done.ways.values()), {"resumed"})
    self.assertRegex(done.resumed, "^24 leaves taken from the interrupted run; 27 leaves taken from the interrupted run$")
    self.assertEqual(self.load(self.tmp / "out"), self.load(TUNIX))
    self.assertCountEqual(os.listdir(self.tmp / "out"), ["4"])

  def test_overwrite_replaces_a_step_of_tunixs_alone(self):
    shutil.copytree(TUNIX, self.tmp / "out")
    with self.assertRaisesRegex(errors.TargetError, "out/4: expected nothing there yet"):
      self.convert()
    (self.tmp / "out" / "4" / "model_params" / "mine").touch()
    with self.assertRaisesRegex(errors.TargetError, "in model_params, mine, which is no part of a checkpoint"):
      self.convert(overwrite=True)
    (self.tmp / "out" / "4" / "model_params" / "mine").unlink()
    self.convert(overwrite=True)
    self.assertTrue((self.tmp / "out" / "4" / "iter").exists())
    (self.tmp / "maxtext").mkdir()
    shutil.copytree(self.source / "3", self.tmp / "maxtext" / "4")
    with self.assertRaisesRegex(errors.TargetError, "expected one checkpoint to replace, a step, .* found items"):
      self.convert(target="maxtext", overwrite=True)

  @parameterized.parameters(
      ("source", "out", "out/4"),
      ("source/3/items", "out", "out/4"),
      ("source/3", "out/4", "out/4"),
      ("source/3", "checkpoints/4", "checkpoints/4"),
      ("source/3", "out/7", "out/7/4"),
      ("source/0003", "out", "out/0004"),
  )
  @pytest.mark.integration
  def test_spellings(self, source, target, step):
    if source.endswith("0003"):
      (self.source / "3").rename(self.tmp / source)
    done = self.convert(self.tmp / source, target, dry_run=True)
    self.assertEqual(os.fspath(done.target), os.fspath(self.tmp / step))

  def test_a_source_without_a_number(self):
    (self.source / "3").rename(self.source / "final")
    with self.assertRaisesRegex(errors.StepError, "final: expected a step's folder, named by its number, .* found final"):
      self.convert(self.source / "final")
    self.assert_nothing_left("source")

  def test_a_folder_of_another_step(self):
    (self.source / "3").rename(self.source / "8")
    with self.assertRaisesRegex(errors.StepError, "^step: expected 9, .* found 4. Name the folder: .*checkpoints/4"):
      self.convert()
    self.assert_nothing_left("source")
    self.convert(target="checkpoints/4")
    self.assertEqual(self.load(self.tmp / "checkpoints"), self.load(TUNIX))

  def test_an_item_of_the_same_name(self):
    (self.source / "3" / "optimizer_state").mkdir()
    with self.assertRaisesRegex(errors.TargetError, "3/optimizer_state: expected no other item of the name"):
      self.convert(self.source / "3" / "items")


if __name__ == "__main__":
  absltest.main()
