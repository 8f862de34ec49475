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

"""Chunk keys, documents and renamings, checked by TensorStore: what was renamed is opened and read as an array."""

import itertools
import json

from absl.testing import absltest
from absl.testing import parameterized
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import linen_nnx_converter_util as util
import numpy as np
import pytest
import tensorstore as ts

from maxtext.checkpoint_conversion.linen_nnx_converter.layers import leaf_moves
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import chunk_keys

LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}


def zarr2(chunk_shape, **metadata):
  return {"driver": "zarr", "metadata": {"dtype": "<i4", "chunks": chunk_shape, **metadata}}


def zarr3(chunk_shape, **metadata):
  grid = {"name": "regular", "configuration": {"chunk_shape": chunk_shape}}
  return {"driver": "zarr3", "metadata": {"data_type": "int32", "chunk_grid": grid, **metadata}}


def sharded(chunk_shape, inner=None):
  """As Orbax writes zarr 3: each shard holds one chunk."""
  configuration = {"chunk_shape": inner or chunk_shape, "codecs": [LITTLE, {"name": "zstd"}]}
  return zarr3(chunk_shape, codecs=[{"name": "sharding_indexed", "configuration": configuration}])


SPECS = {
    "zarr2": lambda chunk: zarr2(chunk, compressor={"id": "zstd", "level": 3}),
    "zarr2_slashes": lambda chunk: zarr2(chunk, compressor=None, dimension_separator="/"),
    "zarr3": zarr3,
    "zarr3_sharded": sharded,
    "zarr3_keys_of_zarr2": lambda chunk: zarr3(chunk, chunk_key_encoding={"name": "v2"}),
}


class Store:
  """A store in memory that TensorStore reads and writes, seen as a dict."""

  def __init__(self):
    self._context = ts.Context()
    self._values = ts.KvStore.open("memory://", context=self._context).result()

  def write(self, name, spec, array):
    """Writes an array, and returns its document."""
    spec = spec | {"kvstore": f"memory://{name}/", "store_data_equal_to_fill_value": True}
    spec["metadata"] = spec["metadata"] | {"shape": array.shape}
    ts.open(spec, create=True, context=self._context).result().write(array).result()
    values = self.values()
    return json.loads(
        next(values[f"{name}/{file}"] for file in chunk_keys.DOCUMENT_NAMES.values() if f"{name}/{file}" in values)
    )

  def read(self, name, driver):
    spec = {"driver": driver, "kvstore": f"memory://{name}/", "fill_missing_data_reads": False}
    return ts.open(spec, context=self._context).result().read().result()

  def values(self):
    return {key.decode(): self._values.read(key).result().value for key in self._values.list().result()}

  def put(self, key, value):
    self._values.write(key, value).result()


def move_chunks(store, move, documents, names, target_name):
  """Puts the target there by renaming keys alone."""
  values = store.values()
  for old, new in chunk_keys.renamed(move, documents, names, target_name):
    store.put(new, values[old])
  document = chunk_keys.restated(documents[0], move)
  file = chunk_keys.DOCUMENT_NAMES[document["zarr_format"]]
  store.put(f"{target_name}/{file}", json.dumps(document).encode())


class ChunksTest(parameterized.TestCase):

  @parameterized.parameters(*itertools.product(SPECS, ([5, 4], [6], [])))
  def test_keys_are_those_that_tensorstore_writes(self, spec, shape):
    store = Store()
    document = store.write("a", SPECS[spec]([2] * len(shape)), np.zeros(shape, np.int32))
    keys = set(chunk_keys.keys("a", document))
    file = chunk_keys.DOCUMENT_NAMES[document["zarr_format"]]
    self.assertEqual(keys | {f"a/{file}"}, set(store.values()))

  @parameterized.parameters(*itertools.product(SPECS, ([5, 4], [6], []), (((0,), (3,)), ((1,), (3,)), ((0, 2), (2, 3)))))
  def test_stack_and_slice(self, spec, shape, stack):
    axes, sizes = stack
    axes = tuple(min(axis, len(shape) + i) for i, axis in enumerate(axes))
    store, driver = Store(), SPECS[spec]([])["driver"]
    places = list(itertools.product(*map(range, sizes)))
    names = [f"layer_{i}" for i in range(len(places))]
    layers = [np.arange(np.prod(shape), dtype=np.int32).reshape(shape) + 100 * i for i in range(len(places))]
    documents = [store.write(name, SPECS[spec]([2] * len(shape)), a) for name, a in zip(names, layers)]
    move = util.stack(tuple((name,) for name in names), axes, sizes)
    self.assertTrue(chunk_keys.keeps_chunks(move, documents))
    move_chunks(store, move, documents, names, "stacked")
    expected = np.zeros(leaf_moves.insert(shape, axes, sizes), np.int32)
    for place, layer in zip(places, layers):
      expected[leaf_moves.insert([slice(None)] * len(shape), axes, place)] = layer
    np.testing.assert_array_equal(store.read("stacked", driver), expected)
    stacked = chunk_keys.restated(documents[0], move)
    for place, name, layer in zip(places, names, layers):
      move = util.slice_of(("stacked",), axes, place)
      self.assertTrue(chunk_keys.keeps_chunks(move, [stacked]))
      move_chunks(store, move, [stacked], ["stacked"], f"{name}_again")
      np.testing.assert_array_equal(store.read(f"{name}_again", driver), layer)
    self.assertEqual(chunk_keys.restated(stacked, move), documents[0])

  @parameterized.named_parameters(
      ("several_layers_in_a_chunk", util.slice_of("a", (0,), (0,)), [zarr3([2, 2])]),
      ("another_axis", util.slice_of("a", (1,), (0,)), [zarr3([1, 2])]),
      ("fortran_order", util.slice_of("a", (0,), (0,)), [zarr2([1, 2], order="F")]),
      ("layers_in_other_chunks", util.stack(("a", "b"), (0,), (2,)), [zarr3([2, 2]), zarr3([4, 2])]),
      ("layers_of_other_codecs", util.stack(("a", "b"), (0,), (2,)), [zarr3([4, 4]), sharded([4, 4])]),
      ("chunks_in_shards", util.stack(("a",), (0,), (1,)), [sharded([4, 4], inner=[2, 4])]),
      ("dimension_names", util.stack(("a",), (0,), (1,)), [zarr3([4, 4], dimension_names=["x", "y"])]),
      (
          "a_codec_that_knows_axes",
          util.stack(("a",), (0,), (1,)),
          [zarr3([4, 4], codecs=[{"name": "transpose", "configuration": {"order": [1, 0]}}, LITTLE])],
      ),
      ("transposed", leaf_moves.Move((("a", ()),), order=(1, 0)), [zarr3([4, 4])]),
  )
  def test_chunks_that_change(self, move, specs):
    store = Store()
    documents = [store.write(str(i), spec, np.zeros((4, 4), np.int32)) for i, spec in enumerate(specs)]
    self.assertFalse(chunk_keys.keeps_chunks(move, documents))

  def test_a_sibling_whose_name_begins_alike_stays(self):
    keys = ["a.wi_0/c/0", "a.wi_0/zarr.json", "a.wi_0_scale/c/0", "a.wi_0_scale/zarr.json"]
    pairs = [("a.wi_0/c/0", "b.wi_0/c/0"), ("a.wi_0/zarr.json", "b.wi_0/zarr.json")]
    self.assertEqual(chunk_keys.ranges(pairs, keys), [("a.wi_0/", "b.wi_0/", True)])

  def test_whole_subtrees_are_one_range(self):
    """76,800 keys one by one took 21 s; so many leaves have a few ranges."""
    keys = [f"{tree}.layers.w{i}/c/{j}" for tree in ("params", "opt_state.0.mu") for i in range(100) for j in range(20)]
    pairs = [(key, f"model.{key}") for key in keys if key.startswith("params")]
    self.assertEqual(chunk_keys.ranges(pairs, keys), [("params.", "model.params.", True)])
    pairs += [(key, key) for key in keys if not key.startswith("params")]
    self.assertEqual(
        chunk_keys.ranges(pairs, keys), [("opt_state.", "opt_state.", True), ("params.", "model.params.", True)]
    )

  @settings(deadline=None)
  @given(st.data())
  @pytest.mark.integration
  def test_ranges_rename_what_pairs_do(self, data):
    piece = st.text("ab0_", min_size=1, max_size=2)
    key = st.lists(piece, min_size=1, max_size=4).flatmap(
        lambda pieces: st.tuples(*[st.sampled_from("./")] * (len(pieces) - 1)).map(
            lambda separators: "".join(itertools.chain(*itertools.zip_longest(pieces, separators, fillvalue="")))
        )
    )
    keys = data.draw(st.lists(key, unique=True, max_size=20))
    some = data.draw(st.lists(st.sampled_from(keys), unique=True)) if keys else []
    prefix = data.draw(st.sampled_from(["", "x.", "a.b/"]))
    cut = data.draw(st.integers(0, 3))
    pairs = {old: prefix + old[cut:] + ("" if cut < len(old) else old) for old in some}
    renamed = {}
    for old, new, is_prefix in chunk_keys.ranges(pairs.items(), keys):
      for name in keys:
        if name == old or (is_prefix and name.startswith(old)):
          self.assertNotIn(name, renamed)
          renamed[name] = new + name[len(old) :]
    self.assertEqual(renamed, pairs)


if __name__ == "__main__":
  absltest.main()
