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

"""After a conversion that was killed, calls that are refused leave what it had finished."""

import os
import shutil

from absl.testing import absltest
from absl.testing import parameterized
from linen_nnx_converter_target_places import TargetsTestCase
import linen_nnx_converter_util as util
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import atomic_target
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import orbax_writer


class RefusedCallTest(TargetsTestCase):
  """After a conversion that was killed, calls that are refused leave what it had finished."""

  def setUp(self):
    super().setUp()
    self.source = util.FIXTURES / "maxtext-0.2.4" / "linen_scan"
    self.out = self.tmp / "out"
    self.staging = self.out / f"2{atomic_target.SUFFIX}"
    real = orbax_writer.save

    def save(*args, before_commit, **kwargs):
      def and_keep(*folders):
        shutil.copytree(self.staging, self.tmp / "killed")
        before_commit(*folders)

      real(*args, before_commit=and_keep, **kwargs)

    with absltest.mock.patch.object(orbax_writer, "save", save):
      converter.convert_checkpoint(self.source, self.out, scan_layers=False)
    shutil.rmtree(self.out / "2")
    (self.tmp / "killed").rename(self.staging)

  @parameterized.named_parameters(
      ("direction", {"direction": "nnx_to_linen"}),
      ("release", {"maxtext_release": "0.1.0", "direction": "nnx_to_nnx"}),
      ("layers", {"scan_layers": False, "param_scan_axis": 7}),
      ("resumed", {"resume": True, "direction": "nnx_to_linen"}),
      ("dry_run", {"dry_run": True}),
  )
  @pytest.mark.integration
  def test_it_is_resumed(self, options):
    before = util.snapshot(self.staging)
    try:
      converter.convert_checkpoint(self.source, self.out, **options)
      self.assertTrue(options.get("dry_run"))
    except errors.ConversionError:
      self.assertNotIn("dry_run", options)
    self.assertEqual(util.snapshot(self.staging), before)
    conversion = converter.convert_checkpoint(self.source, self.out, scan_layers=False, resume=True)
    self.assertRegex(conversion.summary(), "; [0-9]+ leaves taken from the interrupted run;")
    self.assertEqual(os.listdir(self.out), ["2"])

  def test_a_target_that_has_appeared(self):
    (self.out / "2").mkdir()
    (self.out / "2" / "a.txt").write_text("mine")
    before = util.snapshot(self.out)
    for options in ({}, {"overwrite": True}, {"resume": True}):
      with self.assertRaises(errors.TargetError):
        converter.convert_checkpoint(self.source, self.out, **options)
    self.assertEqual(util.snapshot(self.out), before)

  def test_one_that_is_not_refused_begins_anew(self):
    conversion = converter.convert_checkpoint(self.source, self.out, scan_layers=False)
    self.assertNotIn("interrupted", conversion.summary())
    self.assertEqual(os.listdir(self.out), ["2"])


if __name__ == "__main__":
  absltest.main()
