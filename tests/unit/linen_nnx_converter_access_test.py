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

"""What says nothing of a checkpoint is not said of it: no permission, no network, and an error of the program's own."""

import ctypes
import json
import os
import pathlib
import subprocess
import sys
import time

from absl.testing import absltest
from absl.testing import parameterized
import jax
import linen_nnx_converter_util as util
import numpy as np
import pytest

from maxtext.checkpoint_conversion import linen_nnx_comparator as comparator
from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion import linen_nnx_inspector as inspector
from maxtext.checkpoint_conversion.linen_nnx_comparator import compare
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import resume
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import atomic_target
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import chunk_keys
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import locations
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import ocdbt_index
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import reader
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import remote_files
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import decoded

_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 24, 1, 2


def without_rights():
  """Takes from root, in a process that is about to start, the right to read what nobody may."""
  if os.geteuid() == 0:
    for right in (_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH):
      assert ctypes.CDLL(None).prctl(_PR_CAPBSET_DROP, right, 0, 0, 0) == 0


class PipeTest(util.CheckpointTestCase):
  """Whoever opens a pipe waits for a writer, which may never come."""

  @parameterized.parameters(
      *("_CHECKPOINT_METADATA", "items/_METADATA", "items/_sharding", "items/manifest.ocdbt"),
      *("items/array_metadatas/process_0", f"items/{locations.DIGESTS}"),
  )
  def test_none_is_opened(self, name):
    source = self.save("source/1/items", {"params": {"params": {"w": jax.numpy.zeros(2)}}}).parents[1]
    converter.convert_checkpoint(source, self.tmp / "target", verify="full")
    pipe = self.tmp / "target" / "1" / name
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    with self.assertRaises(errors.ConversionError):
      converter.convert_checkpoint(self.tmp / "target", self.tmp / "out")
    if name != "_CHECKPOINT_METADATA":  # Which digests do not cover.
      with self.assertRaisesRegex(errors.ConversionError, "is a pipe, not a file"):
        converter.verify_checkpoint(self.tmp / "target")
    if name not in ("_CHECKPOINT_METADATA", f"items/{locations.DIGESTS}"):
      with self.assertRaisesRegex(errors.ConversionError, "^A: .* is a pipe, not a file"):
        comparator.compare_checkpoints(self.tmp / "target", source)
    inspector.inspect_checkpoint(self.tmp / "target")


class PermissionTest(util.CheckpointTestCase):

  @pytest.mark.integration
  def test_what_may_not_be_read_is_named_and_not_called_damaged(self):
    params = util.unscanned_params(2) | {
        "embedding": np.random.default_rng(0).random((64, 64))
    }  # Not in the tree itself.
    tree = jax.tree.map(jax.numpy.asarray, util.linen(params))
    self.save("ocdbt", tree)
    self.save("plain", tree, use_ocdbt=False)
    (self.tmp / "steps" / "5").mkdir(parents=True)
    self.save("steps/5/items", tree)
    converter.convert_checkpoint(self.tmp / "ocdbt", self.tmp / "target", verify="full")
    folders = sorted(os.listdir(self.tmp))
    script = pathlib.Path(__file__).with_name("linen_nnx_converter_without_rights.py")
    command = [sys.executable, script, self.tmp]
    done = subprocess.run(command, capture_output=True, text=True, check=True, preexec_fn=without_rights)
    for task, name, pattern, error, message, denied, left in json.loads(done.stdout):
      with self.subTest(f"{task} {name} {pattern}"):
        self.assertEqual(left, folders)
        self.assertEqual(error, "AccessError", message)
        self.assertIn(denied, message)
        self.assertIn("permission denied", message.lower())
        self.assertNotIn("damaged", message)
        self.assertLen(message.splitlines(), 1)


class NetworkTest(parameterized.TestCase):

  def test_a_full_disk_is_no_store_that_fails(self):
    """TensorStore has one word for both."""

    @remote_files.answered
    def fails(target, said):
      raise ValueError(f'RESOURCE_EXHAUSTED: Error writing "{target}": {said}')

    with self.assertRaisesRegex(errors.AccessError, "^gs://bucket/x: expected a store that answers"):
      fails("gs://bucket/x", "HTTP response code: 429")
    with self.assertRaisesRegex(ValueError, "^RESOURCE_EXHAUSTED: .*No space left on device"):
      fails("/tmp/x", "No space left on device [os_error_code='28']")

  @parameterized.parameters("http://localhost:9", "https://no-such-host.invalid")
  @pytest.mark.integration
  def test_a_store_that_does_not_answer(self, endpoint):
    source = util.FIXTURES / "maxtext-0.2.4" / "linen_scan"
    begin = time.monotonic()
    with absltest.mock.patch.dict(os.environ, {"STORAGE_EMULATOR_HOST": endpoint}):
      for call in (
          lambda: converter.convert_checkpoint("gs://bucket/x", "/nowhere/out"),
          lambda: converter.convert_checkpoint(source, "gs://bucket/x"),
          lambda: converter.verify_checkpoint("gs://bucket/x"),
          lambda: converter.load_checkpoint("gs://bucket/x"),
          lambda: comparator.compare_checkpoints(source, "gs://bucket/x"),
      ):
        with self.assertRaisesRegex(errors.AccessError, "gs://bucket/x: expected .* found no connection to .*network"):
          call()
    self.assertLess(time.monotonic() - begin, 20)


class ProgramErrorTest(util.CheckpointTestCase):
  """An error that is planted in the program comes out as it is."""

  @parameterized.product(
      place=((ocdbt_index, "read_index"), (ocdbt_index, "_place"), (chunk_keys, "shape"), (reader, "StoredLeaf")),
      error=(AttributeError, KeyError, TypeError),
  )
  def test_in_a_conversion(self, place, error):
    source = self.save("source", util.linen(util.unscanned_params(1)))
    self._assert_planted(place, error, lambda: converter.convert_checkpoint(source, self.tmp / "out"))
    self.assert_nothing_left("source")

  @parameterized.parameters(AttributeError, KeyError, TypeError)
  def test_in_a_comparison(self, error):
    source = self.save("source", util.linen(util.unscanned_params(1)))
    place = compare._Reading, "_opened"  # pylint: disable=protected-access
    self._assert_planted(place, error, lambda: comparator.compare_checkpoints(source, source))

  @parameterized.parameters((resume, "_is_there"), (decoded, "_compare"))
  @pytest.mark.integration
  def test_in_what_looks_at_an_interrupted_run(self, *place):
    nnx = converter.convert_linen_to_nnx(util.linen(util.unscanned_params()), nnx_values="plain")
    source, options = self.save("source", nnx, use_ocdbt=False), {"direction": "nnx_to_nnx", "scan_layers": False}
    left = self.tmp / f"out{atomic_target.SUFFIX}" / "out.orbax-checkpoint-tmp"
    left.parent.mkdir()
    converter.convert_checkpoint(source, self.tmp / "whole", **options)
    (self.tmp / "whole").rename(left)
    resumed = lambda: converter.convert_checkpoint(source, self.tmp / "out", resume=True, verify=False, **options)
    self._assert_planted(place, KeyError, resumed)
    self.assertRegex(resumed().resumed, "^[0-9]+ leaves taken")

  def _assert_planted(self, place, error, call):
    with absltest.mock.patch.object(*place, side_effect=error("planted")), self.assertRaisesRegex(error, "planted"):
      call()


if __name__ == "__main__":
  absltest.main()
