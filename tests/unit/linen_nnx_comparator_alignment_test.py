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

"""Which leaf is compared with which, and what is read for it: pure, on literal trees."""

import math

from absl.testing import absltest
from absl.testing import parameterized
import jax
import linen_nnx_converter_util as util
import numpy as np

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_comparator import alignment
from maxtext.checkpoint_conversion.linen_nnx_comparator import blocks
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import options
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state


def tree(state, *, scan_layers=False, keys=(), **chosen):
  state = abstract_state.abstract(abstract_state.flatten(state))
  return alignment.by_plan(state, dict(keys), options.PlanOptions.of(**chosen), scan_layers)


def params(layers):
  """A Linen checkpoint of the params alone, of one kernel in each layer."""
  return {"params": {"params": {"decoder": layers}}}


def names(aligned):
  return {pair.path: pair.structure for pair in aligned}


SCANNED = params({"layers": {"wi": {"kernel": np.zeros((4, 6, 8))}}})
UNSCANNED = params({f"layers_{i}": {"wi": {"kernel": np.zeros((4, 8))}} for i in range(6)})


class CanonicalTest(parameterized.TestCase):

  def test_every_layout_and_arrangement_has_one_canonical_tree(self):
    linen = util.linen(util.unscanned_params())
    expected = set(tree(linen).leaves)
    self.assertIn(("optimizer", "opt_state", "0", "mu", "decoder", "layers_2", "mlp", "wi_0", "kernel"), expected)
    self.assertLen(expected, 3 * (3 * 4 + 2) + 2 + 1)  # Weights and their moments, two counts, the step.
    for scan_layers in (True, False):
      for nnx_values in ("boxed", "plain", "all_boxed"):
        nnx = converter.convert_linen_to_nnx(linen, scan_layers=scan_layers, nnx_values=nnx_values)
        found = tree(nnx)
        self.assertEqual(set(found.leaves), expected)
        self.assertEqual(found.is_scanned, scan_layers)

  def test_a_sliced_place(self):
    leaf = tree(SCANNED).leaves["model", "decoder", "layers_5", "wi", "kernel"]
    self.assertEqual(leaf.shape, (4, 8))
    self.assertEqual(leaf.place, "params/params/decoder/layers/wi/kernel[5 of axis 1]")

  def test_a_leaf_of_the_name_value(self):
    linen = util.linen({"decoder": {"gate": {"value": np.zeros(3, np.float32)}}})
    found = set(tree(linen).leaves)
    self.assertContainsSubset({("model", "decoder", "gate", "value"), ("optimizer", "step")}, found)
    self.assertEqual(set(tree(converter.convert_linen_to_nnx(linen, nnx_values="all_boxed")).leaves), found)

  @parameterized.parameters(
      ({"decoder": {"norm": {"scale": {"value": np.zeros(3)}}}},),
      ({"base": {"decoder": {"norm": {"scale": {"value": np.zeros(3)}}}}},),
      ({"params": {"params": {"decoder": {"norm": {"scale": np.zeros(3)}}}}},),
      ({"model": {"decoder": {"norm": {"scale": np.zeros(3)}}}},),
  )
  def test_params_alone_stand_where_a_train_state_has_them(self, state):
    self.assertEqual(list(tree(state).leaves), [("model", "decoder", "norm", "scale")])

  def test_parts(self):
    state = util.linen(
        util.unscanned_params(1),
        nnx_aux={"model": {"decoder": {"dropout": {"rngs": {"params": {"count": np.zeros((), np.uint32)}}}}}},
    )
    found = tree(state).leaves
    self.assertEqual(found["model", "decoder", "decoder_norm", "scale"].part, "params")
    self.assertEqual(found["model", "decoder", "dropout", "rngs", "params", "count"].part, "auxiliary")
    self.assertEqual(found["optimizer", "opt_state", "2", "count"].part, "optimizer")
    self.assertEqual(found["optimizer", "step"].part, "step")
    dropped = tree(state, nnx_aux="drop")
    self.assertNotIn("auxiliary", {leaf.part for leaf in dropped.leaves.values()})
    self.assertEqual(list(dropped.left_out.values()), ["--nnx_aux=drop"])

  def test_what_the_converter_refuses_is_refused(self):
    state = util.linen(util.unscanned_params())
    del state["params"]["params"]["decoder"]["layers_1"]
    with self.assertRaises(errors.ConversionError):
      tree(state)


class AlignTest(parameterized.TestCase):

  def test_structure(self):
    leaf = lambda *shape, dtype=np.float32: np.zeros(shape, dtype)
    a = params({"same": {"w": leaf(3)}, "gone": {"w": leaf(1)}, "shape": {"w": leaf(2)}, "dtype": {"w": leaf(2)}})
    b = params(
        {"same": {"w": leaf(3)}, "new": {"w": leaf(1)}, "shape": {"w": leaf(3)}, "dtype": {"w": leaf(2, dtype="i4")}}
    )
    found = alignment.align(tree(a), tree(b))
    self.assertEqual(
        names(found),
        {
            "model/decoder/same/w": None,
            "model/decoder/gone/w": "only in A",
            "model/decoder/shape/w": "shape",
            "model/decoder/dtype/w": "dtype",
            "model/decoder/new/w": "only in B",
        },
    )
    self.assertCountEqual([pair.keys[2] for pair in found if pair.is_array], ["same", "dtype"])

  def test_other_keys_and_strings(self):
    path = ("params", "params", "decoder", "rng", "key")
    state = params({"rng": {"key": np.zeros(2, np.uint32)}})
    found = alignment.align(tree(state, keys={path: "threefry2x32"}), tree(state, keys={path: "rbg"}))
    self.assertEqual(names(found), {"model/decoder/rng/key": "key type"})
    text = params({"rng": {"key": "text"}})
    self.assertEqual(names(alignment.align(tree(state), tree(text))), {"model/decoder/rng/key": "kind"})

  def test_the_steps_of_linen_and_nnx_are_alike_and_others_are_not(self):
    linen = util.linen(util.unscanned_params(1))
    nnx = converter.convert_linen_to_nnx(linen)
    self.assertEqual(nnx["optimizer"]["step"].dtype, np.uint32)
    self.assertEqual(set(names(alignment.align(tree(linen), tree(nnx))).values()), {None})
    wide = linen | {"step": np.array(11, np.int64)}  # As Orbax keeps a Python integer.
    for sides in ((linen, wide), (wide, linen), (nnx, wide), (wide, nnx)):
      self.assertEqual(set(names(alignment.align(*map(tree, sides))).values()), {None})
    counts = util.linen(util.unscanned_params(1))
    counts["opt_state"][0]["count"] = np.array(7, np.int64)
    self.assertEqual(names(alignment.align(tree(linen), tree(counts)))["optimizer/opt_state/0/count"], "dtype")

  def test_other_numbers_of_layers(self):
    fewer = params({"layers": {"wi": {"kernel": np.zeros((4, 5, 8))}}})
    found = names(alignment.align(tree(UNSCANNED), tree(fewer)))
    self.assertEqual(found["model/decoder/layers_5/wi/kernel"], "only in A")
    self.assertEqual(found["model/decoder/layers_4/wi/kernel"], None)


class BlocksTest(parameterized.TestCase):

  def blocks(self, a, b, chunks, most_bytes=2**20, **options):
    aligned = alignment.align(tree(a), tree(b, **options))
    batches = list(blocks.batches(aligned))
    return batches, list(blocks.blocks(aligned, lambda side, path: chunks[side], most_bytes))

  def data(self, block):
    """What a block reads, of arrays whose elements tell their place: at (1, 2, 3) stands 10203."""
    data = {}
    for read in block.reads:
      places = np.meshgrid(*(np.arange(part.start, part.stop) for part in read.region), indexing="ij")
      data[read] = sum(100 ** (len(places) - 1 - axis) * place for axis, place in enumerate(places))
    return data

  def test_scanned_against_unscanned_is_led_by_the_scanned_array(self):
    batches, found = self.blocks(UNSCANNED, SCANNED, [(4, 8), (4, 6, 8)])
    self.assertLen(batches, 1)
    ((side, pairs),) = batches
    self.assertEqual((side, "/".join(pairs[0].b.source)), (1, "params/params/decoder/layers/wi/kernel"))
    (block,) = found  # The scanned array, whose one chunk holds all layers, is read once, and each layer once.
    self.assertEqual([read.side for read in block.reads], [1, 0, 0, 0, 0, 0, 0])
    layers = [cell.values(self.data(block))[1] for cell in block.cells]
    self.assertEqual([values[0, 0] // 100 for values in layers], list(range(6)))

  def test_scanned_against_scanned_is_one_array_against_one(self):
    _, (block,) = self.blocks(SCANNED, SCANNED, [(4, 6, 8)] * 2)
    self.assertEqual([read.region for read in block.reads], [(slice(0, 4), slice(0, 6), slice(0, 8))] * 2)

  def test_other_scan_axes(self):
    moved = params({"layers": {"wi": {"kernel": np.zeros((6, 4, 8))}}})
    _, (block,) = self.blocks(SCANNED, moved, [(4, 6, 8), (6, 4, 8)], param_scan_axis=0)
    self.assertEqual(block.reads[1].region, (slice(0, 6), slice(0, 4), slice(0, 8)))
    data = self.data(block)
    a, b = block.cells[2].values(data)
    np.testing.assert_array_equal(a, data[block.reads[0]][:, 2, :])
    np.testing.assert_array_equal(b, data[block.reads[1]][2, :, :])

  @parameterized.product(
      sides=((SCANNED, UNSCANNED), (UNSCANNED, SCANNED), (SCANNED, SCANNED), (UNSCANNED, UNSCANNED)),
      scanned_chunk=((4, 6, 8), (4, 1, 8), (2, 4, 3), (1, 1, 1)),
      unscanned_chunk=((4, 8), (3, 5)),
      most_bytes=(8, 400, 2**20),
  )
  def test_every_element_is_in_one_block_and_each_chunk_of_the_leading_array_too(
      self, sides, scanned_chunk, unscanned_chunk, most_bytes
  ):
    chunks = [scanned_chunk if side is SCANNED else unscanned_chunk for side in sides]
    batches, found = self.blocks(*sides, chunks, most_bytes)
    counts = {pair.keys: np.zeros((4, 8), int) for _, pairs in batches for pair in pairs}
    for block in found:
      lead = block.reads[0]
      for part, width, size in zip(lead.region, chunks[lead.side], (4, 6, 8) if len(lead.region) == 3 else (4, 8)):
        self.assertEqual(part.start % width, 0)  # Whole chunks: none is decoded for two blocks.
        self.assertTrue(part.stop % width == 0 or part.stop == size)
      nbytes = 8 * math.prod(part.stop - part.start for part in lead.region)
      self.assertLessEqual(nbytes, max(most_bytes, 8 * math.prod(chunks[lead.side])))
      for cell in block.cells:
        shapes = [values.shape for values in cell.values(self.data(block))]
        self.assertEqual(*shapes)
        self.assertEqual(shapes[0], tuple(part.stop - part.start for part in cell.region))
        counts[cell.pair.keys][cell.region] += 1
    self.assertLen(counts, 6)
    for count in counts.values():
      np.testing.assert_array_equal(count, 1)

  def test_chunks_of_both_sides_are_kept_whole_where_there_is_room(self):
    # Chunks of a row against chunks of all rows: a box along the last axis would decode the latter once for each row.
    _, found = self.blocks(SCANNED, UNSCANNED, [(1, 6, 2), (4, 2)], most_bytes=400)
    self.assertLen(found, 4)
    for i, block in enumerate(found):
      self.assertEqual({read.region for read in block.reads[1:]}, {(slice(0, 4), slice(2 * i, 2 * i + 2))})

  def test_an_empty_array_needs_no_reading(self):
    empty = params({"wi": {"kernel": np.zeros((0, 3))}})
    self.assertEqual(self.blocks(empty, empty, [(1, 3)] * 2)[1], [])

  def test_blocks_by_position_against_blocks_with_local_layers(self):
    """Gemma 4 in MaxText 0.2.3 and in 0.2.4: six stacks of one axis, or one of two and one of one."""
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)
    by_position = params({"scanned_blocks": {f"layers_{j}": {"wi": {"kernel": leaf(4, 2, 8)}} for j in range(6)}})
    local = params(
        {
            "scanned_blocks": {
                "local_layers": {"wi": {"kernel": leaf(4, 2, 5, 8)}},
                "global_layer": {"wi": {"kernel": leaf(4, 2, 8)}},
            }
        }
    )
    aligned = alignment.align(tree(by_position), tree(local))
    self.assertLen(aligned, 12)
    self.assertEqual({pair.structure for pair in aligned}, {None})
    batches = list(blocks.batches(aligned))
    self.assertEqual([len(pairs) for _, pairs in batches], [10, 2])
    chunk_shape_of = lambda side, path: (4, 2, 5, 8) if "local_layers" in path else (4, 2, 8)
    block, _ = blocks.blocks(aligned, chunk_shape_of, 2**20)
    self.assertLen(block.reads, 6)
    self.assertLen(block.cells, 10)


if __name__ == "__main__":
  absltest.main()
