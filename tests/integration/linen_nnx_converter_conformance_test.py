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

"""Every model of MaxText 0.2.4 at its real size, abstractly: each state planned into the others lands on MaxText's own.

Nothing is shrunk, cached or sampled: MaxText traces every layer of every model, for both trainers, scanned and
unscanned, optimizer included, in the script beside this file. The table that it prints is that of `docs/conformance.md`.

Needs a Python with MaxText 0.2.4, its trainer's dependencies and this package in MAXTEXT_PYTHON.
"""

import os
import pathlib
import subprocess
import unittest

from absl.testing import absltest
import pytest

SCRIPT = pathlib.Path(__file__).parent / "linen_nnx_converter_conformance.py"
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "conformance.md"


@pytest.mark.integration
class ConformanceTest(unittest.TestCase):
  maxDiff = None

  def test_every_model(self):
    done = subprocess.run([os.environ["MAXTEXT_PYTHON"], SCRIPT], capture_output=True, text=True, check=False)
    self.assertEqual(done.returncode, 0, done.stderr[-5000:])
    print(done.stdout)
    self.assertNotIn("FAILED", done.stdout)
    page = PAGE.read_text().splitlines()
    self.assertEqual([line for line in done.stdout.splitlines() if line not in page], [])


if __name__ == "__main__":
  absltest.main()
