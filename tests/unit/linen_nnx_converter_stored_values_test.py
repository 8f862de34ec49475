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

"""Leaves of OCDBT's B-trees and the values of their keys, against what TensorStore says of stores that it wrote."""

import tempfile
import time
from urllib import parse

from absl.testing import absltest
from absl.testing import parameterized
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import tensorstore as ts

from maxtext.checkpoint_conversion.linen_nnx_converter.storage import btree_leaves
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import stored_values

KEYS = st.text(st.sampled_from("ab0é/."), min_size=1, max_size=6)
STORES = st.dictionaries(KEYS, st.binary(max_size=40), min_size=1, max_size=60)
# Compressed or not, values inline or not, one leaf or many.
CONFIGS = st.fixed_dictionaries(
    {
        "compression": st.sampled_from([None, {"id": "zstd"}, {"id": "zstd", "level": 19}]),
        "max_inline_value_bytes": st.sampled_from([0, 20, 100]),
        "max_decoded_node_bytes": st.sampled_from([300, 10**8]),
    }
)


def written(folder: str, values: dict[str, bytes], config=None) -> ts.KvStore:
  """A folder in which TensorStore has written an OCDBT store, and the base of that."""
  base = {"driver": "file", "path": f"{folder}/"}
  store = ts.KvStore.open({"driver": "ocdbt", "base": base, "config": config or {}}).result()
  with ts.Transaction(atomic=True) as transaction:
    for key, value in values.items():
      store.with_transaction(transaction)[key.encode()] = value
  return ts.KvStore.open(base).result()


def leaves(base: ts.KvStore):
  """What the nodes above say of each leaf, with what its keys begin with."""

  def below(node, height, prefix):
    if not height:
      return [(node, prefix)]
    entries = ts.ocdbt.dump(base, node["location"]).result()["entries"]
    return [leaf for entry in entries for leaf in below(entry, height - 1, prefix + entry["subtree_common_prefix"])]

  newest = ts.ocdbt.dump(base).result()["versions"][-1]
  return below(newest["root"], newest["root_height"], b"")


def encoded(folder: str, node) -> tuple[bytes, str]:
  """The bytes of a node, and the base of its data files."""
  _, own_base, file, offset, nbytes = map(parse.unquote, node["location"].split(":"))
  with open(f"{folder}/{own_base}{file}", "rb") as data:
    return data.read()[int(offset) :][: int(nbytes)], own_base


def decoded(folder: str, base: ts.KvStore) -> list[tuple[str, stored_values.Value]]:
  return [
      entry
      for node, prefix in leaves(base)
      for entry in btree_leaves.entries(*encoded(folder, node), prefix, node["statistics"])
  ]


class LeavesTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = self.enter_context(tempfile.TemporaryDirectory())

  @settings(deadline=None, max_examples=60)
  @given(STORES, CONFIGS)
  def test_as_tensorstore_has_it(self, values, config):
    with tempfile.TemporaryDirectory() as folder:
      base = written(folder, values, config)
      dumped = [
          ((prefix + entry["key"]).decode(), entry.get("inline_value"), entry.get("indirect_value"))
          for node, prefix in leaves(base)
          for entry in ts.ocdbt.dump(base, node["location"]).result()["entries"]
      ]
      found = decoded(folder, base)
      location = lambda value: f"value::{value.file}:{value.offset}:{value.nbytes}" if value.file else None
      self.assertEqual([(key, value.inline, location(value)) for key, value in found], dumped)
      for key, value in found:
        if value.file:
          with open(f"{folder}/{value.file}", "rb") as data:
            self.assertEqual(data.read()[value.offset :][: value.nbytes], values[key])

  def test_data_files_of_another_store(self):
    """As after Orbax's merge: values of a process's store, in the store above it."""
    values = {f"a/{i}": bytes([i] * 30) for i in range(5)}
    config = {"max_inline_value_bytes": 10}
    written(f"{self.folder}/own", values, config)
    base = {"driver": "file", "path": f"{self.folder}/"}
    context = ts.Context()
    own, above = (
        ts.KvStore.open({"driver": "ocdbt", "base": base | {"path": f"{self.folder}/{name}"}}, context=context).result()
        for name in ("own/", "")
    )
    with ts.Transaction(atomic=True) as transaction:
      own.experimental_copy_range_to(above.with_transaction(transaction)).result()
    found = dict(decoded(self.folder, ts.KvStore.open(base).result()))
    self.assertEqual(found.keys(), values.keys())
    for key, value in found.items():
      self.assertStartsWith(value.file, "own/")
      with open(f"{self.folder}/{value.file}", "rb") as data:
        self.assertEqual(data.read()[value.offset :][: value.nbytes], values[key])

  def test_any_byte_that_differs_is_found(self):
    base = written(self.folder, {f"a/{i}": bytes(i) for i in range(20)})
    ((node, prefix),) = leaves(base)
    data, own_base = encoded(self.folder, node)
    for place in range(len(data)):
      damaged = bytearray(data)
      damaged[place] ^= 1
      with self.assertRaises(ValueError):
        list(btree_leaves.entries(bytes(damaged), own_base, prefix, node["statistics"]))

  def test_any_length_that_differs_is_found(self):
    base = written(self.folder, {"a": b"1", "b": b"2"})
    ((node, prefix),) = leaves(base)
    data, own_base = encoded(self.folder, node)
    for part in (*(data[:end] for end in range(len(data))), data + b"\0"):
      with self.assertRaises(ValueError):
        list(btree_leaves.entries(part, own_base, prefix, node["statistics"]))

  @parameterized.parameters("num_keys", "num_indirect_value_bytes")
  def test_another_leaf_than_the_node_above_means(self, name):
    base = written(self.folder, {"a": bytes(200), "b": b"2"})
    ((node, prefix),) = leaves(base)
    statistics = node["statistics"] | {name: node["statistics"][name] + 1}
    with self.assertRaisesRegex(ValueError, "is not what the node above says"):
      list(btree_leaves.entries(*encoded(self.folder, node), prefix, statistics))


class ValuesTest(parameterized.TestCase):

  @given(
      st.dictionaries(KEYS, st.tuples(st.sampled_from(["", "x", "y/z"]), st.integers(0, 99), st.integers(0, 9))),
      st.integers(0, 1),
  )
  def test_as_a_dict(self, places, slashes):
    expected = {
        key: stored_values.Value(file, offset if file else 0, nbytes, None if file else bytes(nbytes))
        for key, (file, offset, nbytes) in places.items()
    }
    values = stored_values.Values(expected.items(), slashes=slashes)
    self.assertEqual(dict(values), expected)
    self.assertLen(values, len(expected))
    for key in {"", "a", "a/", "b/0", *expected}:
      self.assertEqual((key in values, values.get(key)), (key in expected, expected.get(key)))
    ends = {}
    for value in expected.values():
      if value.file:
        ends[value.file] = max(ends.get(value.file, 0), value.offset + value.nbytes)
    self.assertEqual({file: end for file, (end, _) in values.ends().items()}, ends)
    for file, (end, key) in values.ends().items():
      self.assertEqual((expected[key].file, expected[key].offset + expected[key].nbytes), (file, end))

  @given(st.dictionaries(KEYS, st.sampled_from(["", "x", "y"])))
  def test_all_of_an_array(self, files):
    values = stored_values.Values((key, stored_values.Value(file, 0, len(key))) for key, file in files.items())
    for name in values.arrays:
      below = {key for key in files if key == name or key.startswith(f"{name}/")}
      self.assertEqual(set(values.keys_of(f"{name}/")), below)
      self.assertEqual(values.count_of(f"{name}/"), len(below))
      self.assertEqual(values.files_of(f"{name}/"), {files[key] for key in below} - {""})
      self.assertEqual(values.nbytes_of(f"{name}/"), sum(len(key) for key in below if files[key]))

  def test_arrays_in_equal_chunks_share_what_tells_their_chunks_apart(self):
    keys = [f"{name}/c/{i}" for name in "ab" for i in range(3)]
    values = stored_values.Values((key, stored_values.Value("x", i, 1)) for i, key in enumerate(keys))
    self.assertIs(values.arrays["a"].rows_of, values.arrays["b"].rows_of)
    np.testing.assert_array_equal(values.arrays["b"].rows[:, 1], [3, 4, 5])

  def test_telling_how_many_there_are_takes_no_time(self):
    """It is asked for each array: counting them each time took 20 of 36 s of 20,000 leaves."""
    values = stored_values.Values((f"{number}/c/0", stored_values.Value("x", number, 1)) for number in range(4000))
    begin = time.process_time()
    self.assertEqual({len(values) for _ in range(4000)}, {4000})
    self.assertLess(time.process_time() - begin, 0.2)

  def test_a_key_twice(self):
    value = stored_values.Value("x", 0, 1)
    with self.assertRaisesRegex(ValueError, "a key of a is there twice"):
      stored_values.Values([("a/0", value), ("a/0", value)])


if __name__ == "__main__":
  absltest.main()
