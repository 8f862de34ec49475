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

"""Sources at which somebody works while they are converted."""

import os
import shutil
import threading

from absl.testing import absltest
from absl.testing import parameterized
from linen_nnx_converter_faulty_sources import FaultTestCase
from linen_nnx_converter_faulty_sources import params
from linen_nnx_converter_faulty_sources import SCAN
from linen_nnx_converter_faulty_sources import scanned
from linen_nnx_converter_faulty_sources import UNSCAN
import orbax.checkpoint as ocp

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import atomic_target
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import orbax_writer


class ChangingSourceTest(FaultTestCase):
  """Somebody else works on the source while it is converted."""

  def at_half_time(self, action):
    """Does something to the source when all metadata are read and the data files are about to be."""
    real = orbax_writer.save

    def save(*args, **kwargs):
      action()
      return real(*args, **kwargs)

    return absltest.mock.patch.object(orbax_writer, "save", save)

  def _replace(self, source):
    shutil.rmtree(source)
    tree = {
        "params": {
            "params": {
                "decoder": {name: {k: v + 1 for k, v in layer.items()} for name, layer in params()["decoder"].items()}
            }
        }
    }
    self.save(source.name, tree, use_ocdbt=(source.name != "plain"))

  @parameterized.parameters("unscanned", "plain")
  def test_a_source_that_is_replaced(self, name):
    """Its data files may have the same names: without OCDBT they are those of the leaves."""
    source = self.source if name == "unscanned" else self.save("plain", {"params": {"params": params()}}, use_ocdbt=False)
    with (
        self.at_half_time(lambda: self._replace(source)),
        self.assertRaisesRegex(errors.SourceChangedError, "expected the file that stood there when the conversion"),
    ):
      converter.convert_checkpoint(source, self.tmp / "out")
    self.assertFalse((self.tmp / "out").exists())
    self.assertNotIn(f"out{atomic_target.SUFFIX}", os.listdir(self.tmp))

  @parameterized.parameters(SCAN, UNSCAN)
  def test_a_source_that_is_deleted(self, **options):
    source = self.save("doomed", scanned())
    with (
        self.at_half_time(lambda: shutil.rmtree(source)),
        self.assertRaisesRegex(errors.SourceChangedError, "doomed/.*found no such file or directory"),
    ):
      converter.convert_checkpoint(source, self.tmp / "out", **options)
    self.assert_nothing_left("unscanned")

  def test_a_file_that_is_changed_in_place(self):
    source = self.save("source", scanned(), use_ocdbt=False)
    chunk = max((p for p in source.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    with (
        self.at_half_time(lambda: chunk.write_bytes(chunk.read_bytes())),
        self.assertRaisesRegex(errors.SourceChangedError, f"{chunk}: .*, found another one"),
    ):
      converter.convert_checkpoint(source, self.tmp / "out")
    self.assert_nothing_left("unscanned", "source")

  def test_a_save_under_way_is_no_source(self):
    """Orbax, stopped while it writes a step."""
    reached, go_on = threading.Event(), threading.Event()

    handler = ocp.PyTreeCheckpointHandler()
    finalize = handler.finalize

    def slow_finalize(directory):
      reached.set()
      go_on.wait()
      finalize(directory)

    handler.finalize = slow_finalize

    def save():
      with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(self.tmp / "run" / "3", args=ocp.args.PyTreeSave({"params": {"params": params()}}))

    thread = threading.Thread(target=save)
    thread.start()
    try:
      reached.wait(60)
      for source in ("run", "run/3.orbax-checkpoint-tmp"):
        self.assert_refused(errors.UnfinishedCheckpointError, "expected a finished checkpoint", self.tmp / source)
    finally:
      go_on.set()
      thread.join()
    converter.convert_checkpoint(self.tmp / "run", self.tmp / "out")


if __name__ == "__main__":
  absltest.main()
