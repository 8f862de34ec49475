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

"""Targets that are stored in another way than their source: other chunks, formats, data files, compression."""

import itertools
import json
import math
import shutil

from absl.testing import absltest
from absl.testing import parameterized
from etils import epath
import hypothesis
from hypothesis import strategies as st
import jax
import linen_nnx_converter_util as util
import numpy as np
import orbax.checkpoint as ocp
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import leaf_routes
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import streaming
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import target_chunks
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import atomic_target
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import chunk_keys
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import reader
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import storage_form
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import verify

FORMATS = list(itertools.product((True, False), (True, False)))
SAME = {"direction": "linen_to_linen"}
STREAMED, RAW = leaf_routes.Way.STREAMED, leaf_routes.Way.RAW


def weights(*shape):
  """Numbers that do not compress."""
  return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def state(params):
  return {"params": {"params": params}}


class StorageFormTest(util.CheckpointTestCase):

  def save_chunked(self, name, tree, nbytes, **options):
    """A checkpoint in chunks of at most so many bytes, as many devices would write it."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
      in_chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=nbytes), tree)
      checkpointer.save(self.tmp / name, args=ocp.args.PyTreeSave(tree, save_args=in_chunks))
    return self.tmp / name

  def convert(self, source, name="out", **options):
    """Converts; every element must be verified, have a digest, and be what Orbax restores."""
    done = converter.convert_checkpoint(source, self.tmp / name, verify="full", **options)
    self.assertEqual((done.verified, done.digests), (True, len(done.ways)))
    converter.verify_checkpoint(self.tmp / name)
    return done

  def assert_equal(self, name, tree):
    self.assertEqual(util.flat(ocp.PyTreeCheckpointer().restore(self.tmp / name)), util.flat(tree))

  def chunks(self, name="out"):
    """The chunk shape of each array, by the last key of its path."""
    checkpoint = reader.Checkpoint(epath.Path(self.tmp / name))
    return {path[-1]: leaf.chunk_shape for path, leaf in checkpoint.stored.items()}

  @parameterized.parameters(*((a, b) for a, b in itertools.product(FORMATS, FORMATS) if a != b))
  def test_any_format_becomes_any_other(self, old, new):
    tree = util.linen(util.unscanned_params(2))
    source = self.save("source", tree, use_ocdbt=old[0], use_zarr3=old[1])
    before = util.snapshot(source)
    self.convert(source, use_ocdbt=new[0], use_zarr3=new[1], **SAME)
    self.assert_equal("out", tree)
    self.assertEqual((self.tmp / "out" / "manifest.ocdbt").exists(), new[0])
    self.assertEqual(json.loads((self.tmp / "out" / "_METADATA").read_text())["use_zarr3"], new[1])
    self.assertEqual(util.snapshot(source), before)

  def test_what_is_as_asked_for_moves_no_byte(self):
    tree = state({"w": weights(64, 32), "v": weights(8)})
    source = self.save("source", tree, use_ocdbt=True, use_zarr3=True)
    options = {"use_ocdbt": True, "use_zarr3": True, "compression": "zstd", "chunk_byte_size": 2**13}
    self.assertEqual(converter.convert_checkpoint(source, self.tmp / "out", **options, **SAME).nbytes[STREAMED], 0)

  @parameterized.parameters(*FORMATS)
  def test_large_chunks_are_split_and_others_stay(self, use_ocdbt, use_zarr3):
    tree = state({"w": weights(64, 32), "v": weights(8)})
    source = self.save("source", tree, use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
    done = self.convert(source, chunk_byte_size=2**10, **SAME)
    self.assert_equal("out", tree)
    self.assertEqual(done.nbytes[STREAMED], 2**13)
    self.assertEqual(self.chunks()["v"], (8,))
    self.assertEqual(math.prod(self.chunks()["w"]) * 4, 2**10)

  @parameterized.parameters(*FORMATS)
  def test_small_chunks_are_joined(self, use_ocdbt, use_zarr3):
    tree = state({"w": weights(60, 32), "v": weights(8)})
    source = self.save_chunked("source", tree, 2**10, use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
    self.assertLessEqual(math.prod(self.chunks("source")["w"]) * 4, 2**10)
    self.convert(source, chunk_byte_size=2**12, **SAME)
    self.assert_equal("out", tree)
    self.assertBetween(math.prod(self.chunks()["w"]) * 4, 2**11, 2**12)
    self.convert(source, "whole", chunk_byte_size=2**20, **SAME)
    self.assertEqual(self.chunks("whole"), {"w": (60, 32), "v": (8,)})

  @parameterized.parameters((True,), (False,))
  def test_slicing_makes_no_more_chunks_than_there_were(self, use_ocdbt):
    """A chunk of the stack spans all layers, so each layer would get as many chunks as the stack has."""
    stack = weights(64, 8, 16)
    tree = state({"decoder": {"layers": {"w": stack}}})
    source = self.save_chunked("source", tree, 2**12, use_ocdbt=use_ocdbt, use_zarr3=True)
    old = self.chunks("source")["w"]
    self.assertEqual(old[1], 8)
    self.convert(source, scan_layers=False, **SAME)
    self.assert_equal("out", state({"decoder": {f"layers_{n}": {"w": stack[:, n]} for n in range(8)}}))
    checkpoints = [reader.Checkpoint(epath.Path(self.tmp / name)) for name in ("source", "out")]
    count = lambda checkpoint: sum(chunk_keys.count(leaf.document) for leaf in checkpoint.stored.values())
    self.assertEqual(*map(count, checkpoints))

  def test_memory_bounds_how_much_is_joined(self):
    """Joined chunks of 16 layers need a region of all of them at once."""
    move, leaf = util.slice_of(("w",), (0,), (0,)), jax.ShapeDtypeStruct((4096, 256), np.float32)
    document = {"zarr_format": 2, "shape": (16, 4096, 256), "chunks": (16, 8, 256)}
    origin = reader.StoredLeaf("w", reader.JAX_ARRAY, np.dtype("float32"), document)
    form = storage_form.StorageForm(True, False, chunk_byte_size=2**30)
    for room, rows in ((2**30, 4096), (2**20, 64), (2**17, 8), (1, 8)):
      self.assertEqual(target_chunks.streamed(move, origin, leaf, form, room), (rows, 256))

  @parameterized.parameters(*itertools.product(FORMATS, (2**10, 2**12, 2**20), (True, False)))
  @pytest.mark.integration
  def test_chunks_of_any_size_in_a_whole_conversion(self, form, nbytes, scan_layers):
    tree = util.linen(util.unscanned_params(3))
    source = self.save_chunked("source", tree, 2**10, use_ocdbt=form[0], use_zarr3=form[1])
    self.convert(source, chunk_byte_size=nbytes, scan_layers=scan_layers)
    self.convert(self.tmp / "out", "back", chunk_byte_size=2**10, scan_layers=False)
    self.assert_equal("back", tree)

  def test_data_files_of_a_size(self):
    tree = state({name: weights(64, 64) for name in "abcdefgh"})
    source = self.save("source", tree, use_ocdbt=True, use_zarr3=True)
    for name, options in (("raw", {}), ("streamed", {"compression": "none"})):
      done = self.convert(source, name, target_data_file_size=2**15, **options, **SAME)
      self.assertEqual(done.nbytes[RAW if name == "raw" else STREAMED], 2**17)
      self.assert_equal(name, tree)
      sizes = [path.stat().st_size for path in (self.tmp / name).rglob("d/*")]
      self.assertLessEqual(max(sizes), 2**15 + 2**14)  # One more value.
      self.assertGreaterEqual(len(sizes), 4)
    self.convert(source, "small", target_data_file_size=2**12, **SAME)
    self.assertLessEqual(max(math.prod(shape) * 4 for shape in self.chunks("small").values()), 2**12)

  @parameterized.parameters(*FORMATS)
  def test_compression(self, use_ocdbt, use_zarr3):
    tree = state({"w": np.zeros((64, 64), np.float32)})
    source = self.save("source", tree, use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
    size = {}
    for name, origin, compression in (("none", source, "none"), ("again", self.tmp / "none", "zstd")):
      done = self.convert(origin, name, compression=compression, **SAME)
      self.assertEqual(done.nbytes[STREAMED], 2**14)
      self.assert_equal(name, tree)
      (leaf,) = reader.Checkpoint(epath.Path(self.tmp / name)).stored.values()
      self.assertEqual(chunk_keys.compression(leaf.document), compression)
      size[name] = util.all_bytes(self.tmp / name)
    self.assertGreater(size["none"], 2**14)
    self.assertLess(size["again"], 2**14)

  def test_the_target_is_read_once(self):
    """Boxes that cut no chunk of either side: no chunk is decoded twice, and digests are taken on the way."""
    source = self.save_chunked("source", state({"w": weights(2304, 1024)}), 2**20)
    self.enter_context(absltest.mock.patch.object(verify.digests, "take", self.fail))
    for nbytes in (3 * 2**20, 2**19):
      options = {"chunk_byte_size": nbytes, "memory_budget_gib": 1 / 16} | SAME
      self.assertEqual(converter.convert_checkpoint(source, self.tmp / str(nbytes), **options).digests, 1)
      self.assertBetween(math.prod(self.chunks(str(nbytes))["w"]) * 4, nbytes // 2, nbytes)

  def test_resume_takes_only_what_is_stored_as_asked_for(self):
    source = self.save("source", state({"w": weights(64, 32), "v": weights(8)}), use_ocdbt=True)
    options = SAME | {"compression": "none", "use_zarr3": True}

    def stop(compared, source, items, *_, **__):
      shutil.copytree(items, self.tmp / "left")
      raise KeyboardInterrupt

    with absltest.mock.patch.object(verify, "verify_written", stop), self.assertRaises(KeyboardInterrupt):
      converter.convert_checkpoint(source, self.tmp / "out", **options)
    for changed, taken in (
        ({}, 2),
        ({"chunk_byte_size": 2**10}, 1),
        ({"compression": "zstd"}, 0),
        ({"use_zarr3": False}, 0),
    ):
      left = self.tmp / f"out{atomic_target.SUFFIX}" / "out.orbax-checkpoint-tmp"
      shutil.copytree(self.tmp / "left", left)
      done = self.convert(source, resume=True, overwrite=True, **(options | changed))
      expected = f"{taken} leaves taken" if taken else "nothing to resume"
      self.assertStartsWith(done.resumed, expected, f"{changed}")
      self.assert_equal("out", ocp.PyTreeCheckpointer().restore(source))

  @parameterized.parameters(
      ({"target_data_file_size": 2**20, "use_ocdbt": False}, "found a target without OCDBT"),
      ({"target_data_file_size": 2**20, "copy_mode": "link"}, "found --copy_mode=link"),
      ({"chunk_byte_size": 64}, "--chunk_byte_size: expected at least 1024, found 64"),
      ({"chunk_byte_size": "16MiB"}, "--chunk_byte_size: expected an integer or None, found '16MiB'"),
      ({"compression": "gzip"}, "--compression: expected zstd or none or None, found 'gzip'"),
  )
  def test_refuses(self, options, message):
    source = self.save("source", state({"w": weights(4)}), use_ocdbt=True)
    with self.assertRaisesRegex(errors.OptionError, message):
      converter.convert_checkpoint(source, self.tmp / "out", **options, **SAME)
    self.assert_nothing_left("source")


class AlgebraTest(absltest.TestCase):

  @hypothesis.given(
      st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=0, max_size=3), st.integers(0, 500)
  )
  def test_grown_chunks(self, axes, elements):
    bounds, chunk = (tuple(axis[i] for axis in axes) for i in (0, 1))
    shape = target_chunks.grown(bounds, chunk, elements)
    self.assertTrue(all(size % step == 0 for size, step in zip(shape, chunk)))
    self.assertLessEqual(math.prod(shape), max(elements, math.prod(chunk)))

  @hypothesis.given(st.data())
  def test_blocks_cut_no_chunk_and_cover_everything_once(self, data):
    """Of a stack that is sliced, in chunks of any shape on both sides."""
    shape = tuple(data.draw(st.integers(1, 6)) for _ in range(3))
    ours = tuple(data.draw(st.integers(1, size)) for size in shape)
    theirs = tuple(data.draw(st.integers(1, size)) for size in shape[1:])
    stacked = {("params", "params", "decoder", "layers", "w"): jax.ShapeDtypeStruct(shape, np.float32)}
    plan = util.plan_conversion(
        abstract_state.AbstractState(stacked), direction="linen_to_linen", scan_layers=False, param_scan_axis=0
    )
    seen, written = np.zeros(shape, int), {path: {} for path in plan.moves}
    with absltest.mock.patch.object(streaming, "BLOCK_BYTES", data.draw(st.integers(4, 600))):
      work = list(streaming.blocks(plan, dict.fromkeys(plan.moves, theirs), lambda _: ours))
    for number, block in enumerate(work):
      seen[block.region] += 1
      for part in block.parts:
        region = part.move.region(part.number, block.region)
        for at in itertools.product(*(range(side.start, side.stop) for side in region)):
          chunk = tuple(index // step for index, step in zip(at, theirs))
          self.assertEqual(written[part.target].setdefault(chunk, number), number)
    self.assertTrue((seen == 1).all())


if __name__ == "__main__":
  absltest.main()
