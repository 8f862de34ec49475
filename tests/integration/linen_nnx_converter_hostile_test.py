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

"""Checkpoints that somebody made to do harm: nothing outside is read, linked or written, in bounded memory and time.

Each runs in a process of its own, with a limit on its memory and a time after which it is killed.
"""

import json
import os
import pathlib
import sys

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest
import tensorstore as ts

sys.path.append(str(pathlib.Path(__file__).parents[1] / "unit"))
from linen_nnx_converter_hostile_attempts import HostileTestCase
from linen_nnx_converter_hostile_attempts import remove
import linen_nnx_converter_util as util  # pylint: disable=wrong-import-position

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors


@pytest.mark.integration
class HostileTest(HostileTestCase):

  @parameterized.parameters(
      "..", "../../outside", "/etc", "a/b", "a/../../..", "", ".", "nul\0", "..\\..", "a.b", "%2e%2e"
  )
  def test_a_key(self, key):
    """Leaves that are named so in the metadata, and so in the store, where it is no file system."""
    for use_ocdbt in (True, False):
      source = self.source(use_ocdbt=use_ocdbt)

      def rename(document):
        for name, entry in list(document["tree_metadata"].items()):
          if "layers_1" in name:
            entry["key_metadata"][-1]["key"] = key
            document["tree_metadata"][name.replace("'w'", repr(key))] = document["tree_metadata"].pop(name)

      self.edit(source / "_METADATA", rename)
      if use_ocdbt:
        rename_keys(source, "params.params.decoder.layers_1.w", f"params.params.decoder.layers_1.{key}")
      else:
        folder = source / f"params.params.decoder.layers_1.{key}"
        if "\0" not in key and not folder.exists() and ".." not in key.split("/"):
          folder.parent.mkdir(parents=True, exist_ok=True)
          (source / "params.params.decoder.layers_1.w").rename(folder)
      said = self.attempt(source, scan_layers=False)
      if set("/\0" if use_ocdbt else "/\\\0") & set(key):
        self.assertRegex(said, "^LayoutError: .* expected keys that can be names of files")
      elif said == "converted":
        tree = converter.load_checkpoint(self.tmp / "target")
        self.assertIn(key, tree["model"]["decoder"]["layers"]["1"])
        for folder in ("target", "source"):
          remove(self.tmp / folder)
      remove(self.tmp / "source")
      remove(self.tmp / "target")

  @parameterized.parameters(
      "_METADATA", "_sharding", "_strings.json", "array_metadatas/process_0", "_CHECKPOINT_METADATA"
  )
  def test_a_json_bomb(self, name):
    source = self.source()
    for bomb in (
        '{"a":' * 200_000,
        "[" * 200_000,
        '{"tree_metadata": ' + "9" * 10_000 + "}",
        "[]",
        "null",
        "\ud800".encode("utf-8", "surrogatepass"),
    ):
      (source / name).parent.mkdir(exist_ok=True)
      (source / name).write_bytes(bomb if isinstance(bomb, bytes) else bomb.encode())
      said = self.attempt(source)
      if said == "converted":  # Orbax reads neither shardings nor array metadata that are empty.
        self.assertIn(name, ("array_metadatas/process_0",))
        remove(self.tmp / "target")
      else:
        self.assertRegex(said, "^UnfinishedCheckpointError: .* expected metadata that Orbax can read")

  def test_a_huge_file_of_metadata(self):
    """Of 8 GiB, all of them a hole."""
    source = self.source()
    for name in ("_METADATA", "_CHECKPOINT_METADATA", "array_metadatas/process_1"):
      (source / name).parent.mkdir(exist_ok=True)
      content = (source / name).read_bytes() if (source / name).exists() else None
      (source / name).touch()
      os.truncate(source / name, 2**33)
      with absltest.mock.patch.object(util, "snapshot", lambda _: None):
        self.assertRegex(self.attempt(source), "UnfinishedCheckpointError: .*are the most")
      (source / name).unlink() if content is None else (source / name).write_bytes(content)

  @parameterized.product(
      document=(
          {"shape": [2**62, 1]},
          {"shape": [2**31, 2**31], "chunks": [1, 1]},
          {"shape": [2**40, 100], "chunks": [2**40, 100]},
          {"shape": [2**30, 100], "chunks": [1, 1]},
          {"shape": [20, 2**36], "chunks": [20, 2**36]},
          {"shape": [-1, 100]},
          {"shape": ["20", 100]},
          {"shape": [20.0, 100]},
          {"shape": [20]},
          {"shape": None},
          {"chunks": [0, 100]},
          {"chunks": [20]},
          {"chunks": []},
          {"chunks": "x"},
          {"compressor": {"id": "nonsense"}},
          {"dtype": "<q9"},
          {"dtype": 5},
          {"dtype": [["a", "<f4"], ["b", "<f4"]]},
          {"order": "X"},
          {"zarr_format": 3},
          {"filters": [{"id": "delta"}]},
          {"nonsense": 1},
      ),
      may_lack_chunks=(False, True),
  )
  def test_a_nonsensical_array(self, document, may_lack_chunks):
    source = self.source(use_ocdbt=False)
    self.edit(source / "params.params.decoder.layers_1.w" / ".zarray", lambda d: d.update(document))
    if may_lack_chunks:
      self.edit(source / "_METADATA", lambda d: d.update(store_array_data_equal_to_fill_value=False))
    said = self.attempt(source, scan_layers=False, verify="full")
    self.assertRegex(said, "^(DamagedSourceError|LayerStackError): .*layers_1")

  def test_a_missing_document_or_key(self):
    source = self.source(use_ocdbt=False)
    path = source / "params.params.decoder.layers_1.w" / ".zarray"
    whole = path.read_text()
    for key in json.loads(whole):
      self.edit(path, lambda d, key=key: d.pop(key))
      said = self.attempt(source)
      if key == "dimension_separator":  # Which has a default.
        self.assertEqual(said, "converted")
        remove(self.tmp / "target")
      else:
        self.assertRegex(said, "^DamagedSourceError: .*layers_1")
      path.write_text(whole)
    path.write_text("[" * 100_000)
    self.assertRegex(self.attempt(source), "^DamagedSourceError: .*layers_1")

  def test_a_chunk_that_unpacks_to_a_gibibyte(self):
    source = self.source(use_ocdbt=False)
    array = source / "params.params.decoder.layers_1.w"
    spec = {"driver": "zarr", "kvstore": f"file://{self.tmp}/bomb/", "dtype": "uint8", "create": True}
    ts.open(spec, shape=[2**30], chunk_layout=ts.ChunkLayout(chunk_shape=[2**30])).result()[0:1].write(1).result()
    (array / "0.0").write_bytes((self.tmp / "bomb" / "0").read_bytes())
    remove(self.tmp / "bomb")
    self.assertRegex(
        self.attempt(source, scan_layers=False, verify="full"), "^DamagedSourceError: .*layers_1/w: expected chunks that"
    )

  @parameterized.parameters(
      ({"empty_nodes": 5},),
      ({"empty_nodes": [[["9" * 18], None]]},),
      ({"empty_nodes": [["0", "secret"]]},),
      ({"empty_nodes": [[[1], None]]},),
      ("nonsense",),
      ([],),
  )
  def test_a_record_of_nonsense(self, record):
    source = self.source()
    self.edit(source / "_CHECKPOINT_METADATA", lambda d: d.update(custom_metadata={"linen_nnx_converter": record}))
    said = self.attempt(source, direction="linen_to_nnx")
    self.assertRegex(said, "^converted|^[A-Za-z]*Error: ")

  def test_a_chain_of_a_trillion(self):
    for name in ("source", "target"):
      remove(self.tmp / name)
    adam = {"count": np.array(1, np.int32)}
    tree = {
        "model": {"w": np.ones(3)},
        "optimizer": {"step": np.array(1, np.uint32), "opt_state": {"0": adam, "9" * 12: adam}},
    }
    for place in ("²", "01", "٣"):
      tree["optimizer"]["opt_state"].pop("9" * 12, None)
      self.save("source", tree | {"optimizer": tree["optimizer"] | {"opt_state": {"0": adam, place: adam}}})
      self.assertEqual(self.attempt(self.tmp / "source"), "converted")
      for name in ("source", "target"):
        remove(self.tmp / name)
    tree["optimizer"]["opt_state"]["9" * 12] = adam
    self.assertRegex(self.attempt(self.save("source", tree)), "^LayoutError: opt_state/9{12}: expected at most 1000")

  def test_recursion(self):
    deep = np.ones(3)
    for _ in range(150):
      deep = {"a": deep}
    with self.assertRaisesRegex(errors.LayoutError, "expected a tree of at most 100 levels, found a deeper one"):
      converter.convert_linen_to_nnx({"params": {"params": deep}})
    for _ in range(100_000):
      deep = {"a": deep}
    with self.assertRaisesRegex(errors.LayoutError, "expected a tree of at most 100 levels, found a deeper one"):
      converter.convert_linen_to_nnx({"params": {"params": deep}})
    circle = {}
    circle["circle"] = circle
    with self.assertRaisesRegex(errors.LayoutError, "found a deeper one"):
      converter.convert_linen_to_nnx({"params": {"params": circle}})
    while isinstance(deep, dict):  # Python cannot free it all at once.
      deep = deep.pop("a")


def rename_keys(source, old, new):
  """Gives the keys of an array in an OCDBT store another prefix."""
  store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{source}/"}).result()
  for key in store.list().result():
    if key.startswith(old.encode()):
      store.write(new.encode() + key[len(old) :], store.read(key).result().value).result()
      store.delete_range(ts.KvStore.KeyRange(key, key + b"\0")).result()


if __name__ == "__main__":
  absltest.main()
