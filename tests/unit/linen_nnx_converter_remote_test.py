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

"""Checkpoints in Google Cloud Storage, as an emulator on loopback stores them."""

import shutil

from absl.testing import absltest
from etils import epath
import linen_nnx_converter_cloud as cloud_lib
import linen_nnx_converter_util as util
import numpy as np
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import orbax_writer


class GoogleCloudStorageTest(util.CheckpointTestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.cloud = cls.enterClassContext(cloud_lib.Cloud().serving())

  @pytest.mark.integration
  def test_there_on_and_back(self):
    source = util.FIXTURES / "maxtext-0.2.4" / "linen_scan"
    with self.assertRaisesRegex(errors.TargetError, "found remote storage, which has no links"):
      converter.convert_checkpoint(source, "gs://bucket/refused", copy_mode="link")
    converter.convert_checkpoint(source, "gs://bucket/nnx", verify="full")
    converter.convert_checkpoint("gs://bucket/nnx", "gs://bucket/plain", direction="nnx_to_nnx", nnx_values="plain")
    flags = ("gs://bucket/plain", "gs://bucket/linen")
    plan = converter.convert_checkpoint(*flags, scan_layers=False, dry_run=True)
    self.assertRegex(plan.cost, "; about [1-9][0-9]* requests to gs://, .* by the store itself, time not measured")
    self.assertFalse(epath.Path("gs://bucket/linen").exists())
    sliced = converter.convert_checkpoint(*flags, scan_layers=False)
    self.assertTrue(sliced.verified)
    converter.convert_checkpoint("gs://bucket/linen", self.tmp / "linen", direction="linen_to_linen", scan_layers=True)
    self.assertEqual(
        util.flat(converter.load_checkpoint(self.tmp / "linen")), util.flat(converter.load_checkpoint(source))
    )

  @pytest.mark.integration
  def test_what_exists_is_refused(self):
    source = self.save("source", {"params": {"params": {"w": np.arange(3000.0)}}})
    converter.convert_checkpoint(source, "gs://bucket/exists")
    with self.assertRaisesRegex(errors.TargetError, "gs://bucket/exists: expected nothing there yet"):
      converter.convert_checkpoint(source, "gs://bucket/exists")
    shutil.rmtree(source)
    self.assertIn("w", converter.load_checkpoint("gs://bucket/exists")["model"])

  @pytest.mark.integration
  def test_one_checkpoint_is_replaced_and_nothing_else(self):
    source = util.FIXTURES / "maxtext-0.2.4" / "linen_scan"
    for name in ("1", "2"):
      shutil.copytree(source / "2", self.tmp / "run" / name)
    for name in ("1", "2"):
      converter.convert_checkpoint(self.tmp / "run" / name, "gs://bucket/20240501")
    lone = self.save("lone", {"params": {"params": {"w": np.arange(3.0)}}})
    steps, note = epath.Path("gs://bucket/20240501"), epath.Path("gs://bucket/20240501/2/note.txt")
    before = sorted(str(path) for path in steps.glob("*/*"))
    with self.assertRaisesRegex(errors.TargetError, "20240501: expected one checkpoint .* a folder of steps: 1, 2"):
      converter.convert_checkpoint(lone, steps, overwrite=True)
    converter.convert_checkpoint(self.tmp / "run", steps, overwrite=True)
    self.assertEqual(sorted(str(path) for path in steps.glob("*/*")), before)
    real = orbax_writer.save

    def save(*args, before_commit, **kwargs):
      def and_appear(*folders):
        before_commit(*folders)
        note.write_text("mine")

      real(*args, before_commit=and_appear, **kwargs)

    with (
        absltest.mock.patch.object(orbax_writer, "save", save),
        self.assertRaisesRegex(errors.TargetError, "20240501/2: expected one checkpoint .* note.txt, which"),
    ):
      converter.convert_checkpoint(self.tmp / "run", steps, overwrite=True)
    self.assertEqual(sorted(str(path) for path in steps.glob("*/*")), sorted([*before, str(note)]))

  def test_other_remote_storage_is_refused(self):
    """Orbax takes an s3:// URL for a relative path."""
    source = self.save("source", {"params": {"params": {"w": np.arange(3.0)}}})
    for arguments in ((source, "s3://bucket/nnx"), ("s3://bucket/linen", self.tmp / "out")):
      with self.assertRaisesRegex(errors.ConversionError, "s3://bucket/.*: expected a local path or gs://"):
        converter.convert_checkpoint(*arguments)


if __name__ == "__main__":
  absltest.main()
