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

"""Conversions that move no array byte: what the target refers to, what it weighs, and what outlives the source."""

import itertools
import json
import os
import pathlib
import shutil
import subprocess
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
from etils import epath
import jax
import linen_nnx_converter_util as util
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import by_reference
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import leaf_routes
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import streaming
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import leaf_moves
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import ocdbt_index
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import reader
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import storage_form
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import digests
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import reopen

REFERENCE, RAW, STREAMED = leaf_routes.Way.REFERENCE, leaf_routes.Way.RAW, leaf_routes.Way.STREAMED
FORMATS = tuple(itertools.product((True, False), (True, False)))  # use_ocdbt, use_zarr3.


def large(layers=3, size=2**16, dtype=np.uint16):
  """Params of incompressible layers, so that their values are too large to stand in the tree."""
  random = np.random.default_rng(0)
  array = lambda: np.frombuffer(random.bytes(size * np.dtype(dtype).itemsize), dtype).reshape(-1, 256).copy()
  return {"decoder": {f"layers_{i}": {"wi_0": array(), "wi_0_scale": array()} for i in range(layers)}}


async def documents_alone(arrays, key, read=reopen.Arrays.read):
  if not key.endswith(("/.zarray", "/zarr.json")):
    raise AssertionError(f"{key} was read")
  return await read(arrays, key)


class ByReferenceTest(util.CheckpointTestCase):

  def setUp(self):
    super().setUp()
    self.real = streaming._write_batch  # pylint: disable=protected-access
    self.enter_context(absltest.mock.patch.object(streaming, "_write_batch", self.fail))

  def assert_equal(self, checkpoint, tree):
    self.assertEqual(util.flat(converter.load_checkpoint(checkpoint)), util.flat(tree))

  @parameterized.parameters(*FORMATS)
  def test_renamed_and_stacked(self, use_ocdbt, use_zarr3):
    tree = {"params": {"params": large()}}
    source = self.save("source", tree, use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
    before = util.snapshot(source)
    for name, scan_layers in (("scanned", True), ("unscanned", False)):
      done = converter.convert_checkpoint(source, self.tmp / name, scan_layers=scan_layers, copy_mode="link")
      self.assertEqual(done.nbytes, {REFERENCE: 6 * 2**17, RAW: 0, STREAMED: 0})
      self.assertTrue(done.verified)
      self.assertLess(util.own_bytes(self.tmp / name), 2**15)
      self.assert_equal(self.tmp / name, converter.convert_linen_to_nnx(tree, scan_layers=scan_layers))
    self.assertEqual(util.snapshot(source), before)

  @parameterized.parameters(*FORMATS)
  def test_links_are_proven_without_reading_a_value(self, use_ocdbt, use_zarr3):
    source = self.save("source", {"params": {"params": large()}}, use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
    self.enter_context(absltest.mock.patch.object(reopen.Arrays, "open", self.fail))
    self.enter_context(absltest.mock.patch.object(reopen.Arrays, "read", documents_alone))
    self.assertTrue(converter.convert_checkpoint(source, self.tmp / "target", copy_mode="link").verified)

  @parameterized.parameters(*itertools.product(FORMATS, (0, 1, 2)))
  @pytest.mark.integration
  def test_slices_of_what_was_stacked(self, way, axis):
    """A stack has one layer in each chunk, so the way back moves no byte either, and gives the very chunks."""
    use_ocdbt, use_zarr3 = way
    tree = {"params": {"params": large()}}
    source = self.save("source", tree, use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
    options = {"direction": "linen_to_linen", "param_scan_axis": axis, "copy_mode": "link"}
    converter.convert_checkpoint(source, self.tmp / "stacked", scan_layers=True, **options)
    done = converter.convert_checkpoint(self.tmp / "stacked", self.tmp / "again", scan_layers=False, **options)
    self.assertEqual(done.nbytes[REFERENCE], 6 * 2**17)
    self.assert_equal(self.tmp / "again", tree)
    first, again = (reader.Checkpoint(epath.Path(path)) for path in (source, self.tmp / "again"))
    self.assertEqual(first.index.values.keys(), again.index.values.keys() - {digests.FILE})
    self.assertEqual(first.stored, again.stored)

  def test_what_is_held_in_memory_is_streamed(self):
    """As RNG state that MaxText's model makes."""
    made = (plan_lib.MADE, "b")
    source = self.save("source", {"params": {"params": large(1)}})
    checkpoint = reader.Checkpoint(epath.Path(source)).with_arrays({made: np.arange(3)})
    path = next(iter(checkpoint.stored))
    leaves = {("a",): checkpoint.state.leaves[path], ("b",): checkpoint.state.leaves[made]}
    moves = {("a",): leaf_moves.copy(path), ("b",): leaf_moves.copy(made)}
    target = abstract_state.AbstractState(leaves, frozenset())
    plan = plan_lib.Plan(checkpoint.state, target, moves, {}, layouts.LINEN, layouts.LINEN)
    form = storage_form.StorageForm(use_ocdbt=True, use_zarr3=checkpoint.use_zarr3)
    lengths = ocdbt_index.file_lengths(checkpoint.directory, checkpoint.index)
    routes = leaf_routes.choose(plan, checkpoint, lengths, form, room=2**20, copy_mode="link")
    self.assertEqual({path: route.way for path, route in routes.items()}, {("a",): REFERENCE, ("b",): STREAMED})

  def test_scalars_and_small_values(self):
    """Values of up to 1 KiB stand in the tree itself."""
    tree = util.linen(util.unscanned_params())
    with absltest.mock.patch.object(streaming, "_write_batch", self.real):
      converter.convert_checkpoint(self.save("source", tree), self.tmp / "target", scan_layers=True)
    self.assert_equal(self.tmp / "target", converter.convert_linen_to_nnx(tree))

  def test_chained_conversions_whose_sources_are_deleted(self):
    tree = {"params": {"params": large()}}
    source = self.save("0", tree)
    for i in range(4):
      direction = ("linen_to_nnx", "nnx_to_linen")[i % 2]
      converter.convert_checkpoint(source, self.tmp / str(i + 1), direction=direction, scan_layers=i % 4 < 2)
      shutil.rmtree(source)
      source = self.tmp / str(i + 1)
    self.assert_equal(source, tree)
    self.assertLess(util.all_bytes(source), 1.1 * 6 * 2**17)

  def test_overwriting_the_source_leaves_the_target_alone(self):
    source = self.save("source", {"params": {"params": large()}})
    converter.convert_checkpoint(source, self.tmp / "target")
    before = util.snapshot(self.tmp / "target")
    with ocp.PyTreeCheckpointer() as checkpointer:
      checkpointer.save(source, {"params": {"params": jax.tree.map(np.zeros_like, large())}}, force=True)
    self.assertEqual(util.snapshot(self.tmp / "target"), before)

  @parameterized.parameters(*itertools.product(FORMATS, ("auto", "copy")))
  @pytest.mark.integration
  def test_copying_another_checkpoint_over_the_source_leaves_the_target_alone(self, kind, copy_mode):
    """In place, as `cp -r new/. source/` does: without OCDBT, it writes into the files of the same names."""
    tree = {"params": {"params": large()}}
    options = {"use_ocdbt": kind[0], "use_zarr3": kind[1]}
    source = self.save("source", tree, **options)
    new = self.save("new", {"params": {"params": jax.tree.map(np.zeros_like, large())}}, **options)
    converter.convert_checkpoint(source, self.tmp / "target", copy_mode=copy_mode)
    before = util.snapshot(self.tmp / "target")
    subprocess.run(["cp", "-r", f"{new}/.", source], check=True)
    self.assertEqual(util.flat(converter.load_checkpoint(source)), util.flat(converter.load_checkpoint(new)))
    self.assertEqual(util.snapshot(self.tmp / "target"), before)
    self.assert_equal(self.tmp / "target", converter.convert_linen_to_nnx(tree))

  @parameterized.parameters(True, False)
  def test_what_writes_into_a_linked_file_changes_both(self, use_ocdbt):
    """The price of links: with OCDBT no saving writes into data files, but other tools may."""
    source = self.save("source", {"params": {"params": large()}}, use_ocdbt=use_ocdbt)
    converter.convert_checkpoint(source, self.tmp / "target", copy_mode="auto" if use_ocdbt else "link")
    largest = max((p for p in source.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    self.assertEqual(largest.stat().st_nlink, 2)
    before = util.snapshot(self.tmp / "target")
    largest.write_bytes(bytes(largest.stat().st_size))
    self.assertNotEqual(util.snapshot(self.tmp / "target"), before)

  def test_overwriting_the_target_leaves_the_source_alone(self):
    source = self.save("source", {"params": {"params": large()}})
    before = util.snapshot(source)
    for _ in range(2):
      converter.convert_checkpoint(source, self.tmp / "target", overwrite=True)
    self.assertEqual(util.snapshot(source), before)

  @parameterized.parameters(*FORMATS)
  def test_copies_are_independent(self, use_ocdbt, use_zarr3):
    tree = {"params": {"params": large()}}
    source = self.save("source", tree, use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
    done = converter.convert_checkpoint(source, self.tmp / "target", copy_mode="copy")
    self.assertTrue(done.verified)
    self.assertEqual(util.own_bytes(self.tmp / "target"), util.all_bytes(self.tmp / "target"))
    self.assert_equal(self.tmp / "target", converter.convert_linen_to_nnx(tree))

  @parameterized.parameters(*itertools.product(FORMATS, ("auto", "copy", "link")))
  @pytest.mark.integration
  def test_another_file_system(self, way, copy_mode):
    """Links are refused if they were asked for; otherwise files are copied."""
    shared_memory = "/dev/shm"
    if not os.path.isdir(shared_memory) or os.stat(shared_memory).st_dev == os.stat(self.tmp).st_dev:
      self.skipTest("needs two file systems")
    use_ocdbt, use_zarr3 = way
    source = self.save("source", {"params": {"params": large()}}, use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
    target = pathlib.Path(tempfile.mkdtemp(dir=shared_memory))
    self.addCleanup(shutil.rmtree, target)
    if copy_mode == "link":
      with self.assertRaisesRegex(errors.TargetError, "expected a file system on which .* can be linked"):
        converter.convert_checkpoint(source, target / "out", copy_mode=copy_mode)
      self.assertEqual(os.listdir(target), [])
      return
    converter.convert_checkpoint(source, target / "out", copy_mode=copy_mode)
    self.assert_equal(target / "out", converter.convert_linen_to_nnx({"params": {"params": large()}}))

  @parameterized.parameters("auto", "copy")
  @pytest.mark.integration
  def test_what_is_dropped_does_not_lie_dead_in_the_target(self, copy_mode):
    params = large(4)
    source = self.save("source", util.linen(params))
    util.in_one_file(source)
    options = {"direction": "linen_to_nnx", "params_only": True}
    done = converter.convert_checkpoint(source, self.tmp / "target", copy_mode=copy_mode, **options)
    self.assertEqual(done.nbytes, {REFERENCE: 0, RAW: 8 * 2**17, STREAMED: 0})
    self.assertTrue(done.verified)
    self.assertLess(util.all_bytes(self.tmp / "target"), 1.1 * 8 * 2**17)
    self.assert_equal(self.tmp / "target", converter.convert_linen_to_nnx(util.linen(params), params_only=True))
    done = converter.convert_checkpoint(source, self.tmp / "linked", copy_mode="link", **options)
    self.assertEqual(done.nbytes[REFERENCE], 8 * 2**17)

  @pytest.mark.integration
  def test_a_deep_tree(self):
    """A store whose B-tree has several levels, of another configuration than Orbax's."""
    tree = {"params": {"params": large(20, size=2**10)}}
    source = self.save("source", tree)
    old = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{source}/"}).result()
    config = {"max_decoded_node_bytes": 500, "max_inline_value_bytes": 20}
    new = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{self.tmp}/deep/", "config": config}).result()
    for key in old.list().result():
      new.write(key, old.read(key).result().value).result()
    for folder in ("d", "ocdbt.process_0"):
      shutil.rmtree(source / folder)
      if (self.tmp / "deep" / folder).exists():
        (self.tmp / "deep" / folder).rename(source / folder)
    (self.tmp / "deep" / "manifest.ocdbt").rename(source / "manifest.ocdbt")
    self.assertGreater(len(reader.Checkpoint(epath.Path(source)).index.tree_files), 5)
    for name, scan_layers in (("scanned", True), ("unscanned", False)):
      converter.convert_checkpoint(source, self.tmp / name, scan_layers=scan_layers)
      self.assert_equal(self.tmp / name, converter.convert_linen_to_nnx(tree, scan_layers=scan_layers))

  @parameterized.parameters(*FORMATS)
  def test_a_missing_data_file(self, use_ocdbt, use_zarr3):
    source = self.save("source", {"params": {"params": large()}}, use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
    max((p for p in source.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size).unlink()
    with self.assertRaisesRegex(errors.DamagedSourceError, "wi_0.*found no such (file|key)"):
      converter.convert_checkpoint(source, self.tmp / "target")
    self.assert_nothing_left("source")

  def test_two_leaves_of_one_name(self):
    tree = {"params": {"params": {"a": {"b.c": np.zeros(3)}, "a.b": {"c": np.ones(3)}}}}
    with self.assertRaisesRegex(errors.PathCollisionError, "expected a name of its own in storage, found .*a.b.c"):
      converter.convert_checkpoint(self.save("source", tree), self.tmp / "target")

  def test_a_damaged_reference_is_found(self):
    """Whatever moved the chunks: each key of the target is traced to the source."""
    source = self.save("source", {"params": {"params": large()}})
    self.enter_context(absltest.mock.patch.object(by_reference, "rename", util.swapped))
    with self.assertRaisesRegex(errors.VerificationError, "wi_0"):
      converter.convert_checkpoint(source, self.tmp / "target", scan_layers=False)
    self.assert_nothing_left("source")


class MetadataTest(parameterized.TestCase):

  @parameterized.parameters(*util.ALL)
  @pytest.mark.integration
  def test_what_is_read_is_what_orbax_reads(self, name):
    """Orbax opens every array; this reads the same off the store's index."""
    items = util.FIXTURES / name / os.listdir(util.FIXTURES / name)[0] / "items"
    ours = reader.Checkpoint(epath.Path(items))
    theirs = ocp.PyTreeCheckpointHandler().metadata(epath.Path(items)).tree
    leaves = {
        tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(theirs)[0]
    }
    self.assertEqual(set(ours.stored), set(leaves))
    for path, leaf in leaves.items():
      stored = ours.stored[path]
      self.assertEqual((stored.name, stored.shape, stored.dtype), (leaf.name, leaf.shape, leaf.dtype))
      self.assertEqual(stored.chunk_shape, leaf.storage.chunk_shape)
      self.assertEqual(stored.write_shape, leaf.storage.write_shape)
      self.assertEqual(json.loads(stored.sharding or "null") is None, leaf.sharding is None)


if __name__ == "__main__":
  absltest.main()
