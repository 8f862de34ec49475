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

"""Faults of the reader: the verifier, which opens both sides by itself, finds each of them."""

import ast
import asyncio
import itertools

from absl.testing import absltest
from absl.testing import parameterized
from etils import epath
import linen_nnx_converter_util as util
import numpy as np
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import leaf_routes
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import ocdbt_index
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import reader
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import reopen

PACKAGE = util.ROOT / "src" / "maxtext" / "checkpoint_conversion" / "linen_nnx_converter"
FORMATS = tuple(itertools.product((True, False), (True, False)))  # use_ocdbt, use_zarr3.
WAYS = ({}, {"copy_mode": "copy"}, {"copy_mode": "link", "verify": "full"}, {"scan_layers": False})


def params(start, names=("layers_0", "layers_1"), size=64):
  return {
      "params": {
          "params": {"decoder": {name: {"w": util.array(size, 16, start=start + i)} for i, name in enumerate(names)}}
      }
  }


class FaultyReaderTest(util.CheckpointTestCase):

  def setUp(self):
    super().setUp()
    self.init, self.spec, self.open = reader.Checkpoint.__init__, ocdbt_index.spec, reader.Checkpoint.open

  def plant(self, owner, name, replacement):
    self.enter_context(absltest.mock.patch.object(owner, name, replacement))

  def assert_found(self, path, **options):
    before = util.files(self.tmp)
    with self.assertRaisesRegex(errors.VerificationError, path):
      converter.convert_checkpoint(self.tmp / "source", self.tmp / "target", **options)
    self.assertEqual(util.files(self.tmp), before)

  def neighbours(self, kind, **other):
    for name, tree in (("source", params(0)), ("other", params(5000) if not other else params(0, **other))):
      self.save(name, tree, use_ocdbt=kind[0], use_zarr3=kind[1])

  def other(self, path):
    return epath.Path(str(path).replace(f"{self.tmp}/source", f"{self.tmp}/other"))

  @parameterized.parameters(*itertools.product(FORMATS, WAYS))
  @pytest.mark.integration
  def test_all_is_read_from_a_neighbour(self, kind, options):
    """As when the path was taken for a URL: metadata, index and arrays; the target is the neighbour's, to the bit."""
    self.neighbours(kind)
    self.plant(
        reader.Checkpoint, "__init__", lambda checkpoint, path, *values: self.init(checkpoint, self.other(path), *values)
    )
    self.assert_found("model/decoder/layers.*/w/value: expected .* at index", **options)

  @parameterized.parameters(
      ({"size": 32}, r"layers_./w: expected .*\(32, 16\).*found .*\[64, 16\]"),
      ({"names": ("layers_0",)}, "params.params.decoder.layers_1.w: expected no array, found one"),
      (
          {"names": ("layers_0", "layers_1", "layers_2")},
          "params.params.decoder.layers_2.w: expected an array, found none",
      ),
  )
  def test_a_neighbour_of_other_shapes_or_layers(self, other, path):
    self.neighbours((True, False), **other)
    self.plant(
        reader.Checkpoint, "__init__", lambda checkpoint, path, *values: self.init(checkpoint, self.other(path), *values)
    )
    self.assert_found(path)

  @parameterized.parameters(*FORMATS)
  def test_arrays_are_opened_in_a_neighbour(self, *kind):
    """What is streamed: the target is restored from a scanned source whose chunks hold several layers."""
    for name, start in (("source", 0), ("other", 5000)):
      tree = {"params": {"params": {"decoder": {"layers": {"w": util.array(16, 3, 8, start=start)}}}}}
      self.save(name, tree, use_ocdbt=kind[0], use_zarr3=kind[1])
    self.plant(ocdbt_index, "spec", lambda path, *args, **kwargs: self.spec(self.other(path), *args, **kwargs))
    self.assert_found("w/value: expected .* at index .* found 50", scan_layers=False)

  def test_another_leaf_is_opened(self):
    tree = {"params": {"params": {"decoder": {"layers": {name: util.array(16, 3, 8, start=ord(name)) for name in "ab"}}}}}
    self.save("source", tree)
    a, b = (("params", "params", "decoder", "layers", name) for name in "ab")
    self.plant(reader.Checkpoint, "open", lambda checkpoint, path: self.open(checkpoint, {a: b, b: a}.get(path, path)))
    self.assert_found("model/decoder/layers/\\d/[ab]/value: expected .* at index", scan_layers=False)

  def test_the_index_has_two_values_exchanged(self):
    """What is copied raw is taken from the places that the index says."""
    source = self.save("source", params(0))
    read_index = ocdbt_index.read_index
    names = [f"params.params.decoder.layers_{i}.w" for i in range(2)]

    async def exchanged(directory, **kwargs):
      index = await read_index(directory, **kwargs)
      if directory == epath.Path(source):
        rows = [index.values.arrays[name].rows for name in names]
        rows[0][:], rows[1][:] = rows[1].copy(), rows[0].copy()
      return index

    self.plant(ocdbt_index, "read_index", exchanged)
    self.plant(leaf_routes, "_has_dead_bytes", lambda *_: True)
    self.assert_found("model/decoder/layers.*/w/value: expected .* at index")


class ReopenTest(util.CheckpointTestCase):

  @parameterized.parameters(*FORMATS)
  def test_it_finds_what_the_reader_finds(self, *kind):
    """Two walks of one store, by code of their own."""
    tree = util.linen(util.unscanned_params()) | {"big": np.arange(2.0**15), "%2e|": np.zeros(3)}
    source = epath.Path(self.save("a%20:b", tree, use_ocdbt=kind[0], use_zarr3=kind[1]))
    theirs, ours = reader.Checkpoint(source), reopen.Arrays(source)
    asyncio.run(ours.read_places())
    self.assertEqual(
        {key: tuple(place) for key, place in ours.places.items()},
        {key: (v.file, v.offset, v.nbytes, v.inline) for key, v in theirs.index.values.items()},
    )
    documents = [asyncio.run(ours.document(path)) for path in theirs.stored]
    self.assertEqual(documents, [leaf.document for leaf in theirs.stored.values()])
    self.assertLen(set(map(id, documents)), len(set(map(str, documents))))  # Equal ones are parsed once.
    self.assertEqual(list(map(ours.name, theirs.stored)), [leaf.name for leaf in theirs.stored.values()])

  def test_the_verifier_imports_nothing_of_the_reader(self):
    allowed = {"abstract_state", "chunk_keys", "copied", "coroutines", "decoded", "digests", "errors"}
    allowed |= {"btree_leaves", "memory", "merged", "plan", "remote_files", "reopen", "rounding", "stored_values"}
    for module in ("reopen", "decoded", "encoded", "merged", "while_written"):
      tree = ast.parse((PACKAGE / "verification" / f"{module}.py").read_text())
      imports = [
          node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "linen_nnx" in (node.module or "")
      ]
      self.assertContainsSubset({alias.name for node in imports for alias in node.names}, allowed)
      self.assertNotEmpty(imports)


if __name__ == "__main__":
  absltest.main()
