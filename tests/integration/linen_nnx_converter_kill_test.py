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

"""A sample of the campaign that stops conversions at random."""

import pathlib
import subprocess
import sys

from absl.testing import absltest
import pytest

CAMPAIGN = pathlib.Path(__file__).parents[1] / "campaigns" / "linen_nnx_converter_kill_campaign.py"


@pytest.mark.integration
class KillTest(absltest.TestCase):

  def test_nothing_is_lost(self):
    command = [sys.executable, CAMPAIGN, "--runs=36", "--seed=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
    self.assertEndsWith(done.stdout, "36 runs with seed 1: 0 losses\n")


if __name__ == "__main__":
  absltest.main()
