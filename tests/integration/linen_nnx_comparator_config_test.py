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

"""The comparator with a MaxText config, run by MaxText 0.2.5's own Python.

Needs a Python with MaxText 0.2.5, its trainer's dependencies and this package in MAXTEXT_0_2_5_PYTHON.
"""

import os
import pathlib
import shutil
import subprocess
import tempfile

from absl.testing import absltest
import linen_nnx_converter_trainer as trainer
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter

SOURCE = pathlib.Path(__file__).parents[1] / "assets" / "linen_nnx_converter" / "maxtext-0.2.4" / "linen_scan"


@pytest.mark.integration
class ConfigTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.tmp = pathlib.Path(tempfile.mkdtemp())
    self.addCleanup(shutil.rmtree, self.tmp)

  def compare(self, *flags, **settings):
    settings = trainer.TINY | {"base_output_directory": self.tmp} | settings
    command = [os.environ["MAXTEXT_0_2_5_PYTHON"], "-m", "maxtext.checkpoint_conversion.linen_nnx_comparator"]
    command += [
        self.tmp / "a",
        self.tmp / "b",
        *flags,
        "base.yml",
        *(f"{name}={value}" for name, value in settings.items()),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)

  def test_the_config_gives_the_scan_axis(self):
    converter.convert_checkpoint(SOURCE, self.tmp / "unscanned", scan_layers=False)
    for name, target in (("a", "linen"), ("b", "nnx")):
      converter.convert_checkpoint(
          self.tmp / "unscanned",
          self.tmp / name,
          direction=f"nnx_to_{target}",
          scan_layers=True,
          param_scan_axis=0,
      )
    done = self.compare(param_scan_axis=0)
    self.assertEqual((done.returncode, done.stderr), (0, ""), done.stdout)
    self.assertIn("equal to the bit: 120 leaves", done.stdout)
    done = self.compare(param_scan_axis=1)
    self.assertEqual(done.returncode, 2)
    self.assertIn("check the checkpoint and --param_scan_axis", done.stderr)

  def test_a_config_that_cannot_be_read_is_refused(self):
    converter.convert_checkpoint(SOURCE, self.tmp / "a")
    converter.convert_checkpoint(SOURCE, self.tmp / "b")
    done = self.compare(no_such_setting=1)
    self.assertEqual((done.returncode, done.stdout), (2, ""))
    last = done.stderr.splitlines()[-1]  # MaxText itself warns before.
    self.assertStartsWith(last, "linen_nnx_comparator: base.yml ")
    self.assertIn("expected a config that the installed MaxText can read", last)


if __name__ == "__main__":
  absltest.main()
