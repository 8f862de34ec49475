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

"""Checkpoints that lead out of their folder: by links, pipes, devices, and places in their index."""

import os
import socket

from absl.testing import absltest
from absl.testing import parameterized
from etils import epath
from linen_nnx_converter_hostile_attempts import HostileTestCase
from linen_nnx_converter_hostile_attempts import remove
import numpy as np
import pytest
import tensorstore as ts

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import ocdbt_index


@pytest.mark.integration
class PlacesTest(HostileTestCase):

  @parameterized.parameters(
      "manifest.ocdbt", "d", "_METADATA", "_sharding", "array_metadatas", "extra", "params.params.decoder.layers_1.w"
  )
  def test_symbolic_links(self, name):
    source = self.source(use_ocdbt="params" not in name)
    if (source / name).exists():
      (source / name).rename(self.outside / name)
    for target in (self.outside / name, "..", ".", "/dev/zero", "/etc/passwd", "nowhere"):
      (source / name).symlink_to(target)
      said = self.attempt(source)
      if name == "_METADATA" and not (source / name).exists():  # A link that leads nowhere is no metadata.
        self.assertRegex(said, "^UnfinishedCheckpointError: ")
      else:
        self.assertRegex(said, "^ForeignFileError: .* found a symbolic link to .* `cp -rL`")
      (source / name).unlink()

  def test_pipes_sockets_and_devices(self):
    source = self.source(use_ocdbt=False)
    chunk = source / "params.params.decoder.layers_1.w" / "0.0"
    chunk.unlink()
    os.mkfifo(chunk)
    self.assertRegex(self.attempt(source), "^ForeignFileError: .*0.0: .*found a pipe. Remove it")
    chunk.unlink()
    with socket.socket(socket.AF_UNIX) as server:
      server.bind(os.fspath(chunk))
      self.assertRegex(self.attempt(source), "^ForeignFileError: .*found a socket")
    chunk.unlink()
    try:
      os.mknod(chunk, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
      return
    self.assertRegex(self.attempt(source), "^ForeignFileError: .*found a device")

  def test_a_sibling_item_that_is_a_link(self):
    source = self.tmp / "source"
    step = source / "1"
    step.mkdir(parents=True)
    self.save("flat", {"params": {"params": {"w": np.ones(3)}}}).rename(step / "items")
    (step / "iter").symlink_to(self.outside)
    self.assertRegex(self.attempt(source), "^ForeignFileError: .*1/iter: ")

  @parameterized.parameters("../outside/secret", "/etc/passwd", "d/../../outside/secret", "%2e%2e/outside/secret")
  def test_a_place_outside(self, file):
    location = f"btreenode::{file}:0:10" if "%" in file else f"btreenode:{'../' if file[0] == '.' else ''}:{file}:0:10"
    with self.assertRaisesRegex(errors.ForeignFileError, "expected data files inside the checkpoint, found one at"):
      ocdbt_index._place(epath.Path("/source"), location)  # pylint: disable=protected-access

  def test_a_store_whose_nodes_lie_outside(self):
    """A manifest that TensorStore itself wrote for a store whose data files are elsewhere."""
    source = self.source()
    remove(source / "d")
    remove(source / "ocdbt.process_0")
    (source / "manifest.ocdbt").unlink()
    spec = {
        "driver": "ocdbt",
        "base": f"file://{source}/",
        "value_data_prefix": "../outside/",
        "btree_node_data_prefix": "../outside/",
    }
    try:
      store = ts.KvStore.open(spec).result()
      store.write("params.params.decoder.layers_1.w/.zarray", b"x" * 5000).result()
    except ValueError:  # TensorStore itself takes no such prefix.
      self.assertEqual(os.listdir(self.outside), ["secret"])
      return
    self.assertRegex(self.attempt(source), "^(ForeignFileError|UnfinishedCheckpointError)")


if __name__ == "__main__":
  absltest.main()
