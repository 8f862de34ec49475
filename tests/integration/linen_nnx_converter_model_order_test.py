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

"""The order of layers is derived from MaxText's own models where our tables of decoder families have it not.

Needs a Python with MaxText 0.2.5, its trainer's dependencies and this package in MAXTEXT_0_2_5_PYTHON.
"""

import os
import pathlib
import subprocess
import unittest

from absl.testing import absltest
import pytest

SCRIPT = pathlib.Path(__file__).parent / "linen_nnx_converter_model_order.py"
# One of each way to arrange layers, and two of which there is no proof; the script goes through all families.
PROVEN = ("deepseek3-671b", "envy-test", "gemma3-4b", "gemma4-31b", "llama2-7b", "qwen3-next-80b-a3b")
REFUSED = {
    "qwen3.5-35b-a3b": "no proof .*expected scanned layers applied in the order decoder/layers 0, ",
    "simple": "and no proof by MaxText's models",
}


@pytest.mark.integration
class ModelOrderTest(unittest.TestCase):

  def test_as_the_tables_have_it_or_refused(self):
    command = [os.environ["MAXTEXT_0_2_5_PYTHON"], SCRIPT, f"--models={','.join((*PROVEN, *REFUSED))}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    self.assertEqual(done.returncode, 0, done.stderr[-5000:])
    found = dict(line.strip("| ").split(" | ", 1) for line in done.stdout.splitlines() if line.startswith("| "))
    self.assertEqual({model: found[model] for model in PROVEN}, dict.fromkeys(PROVEN, "proven"))
    for model, reason in REFUSED.items():
      self.assertRegex(found[model], reason)


if __name__ == "__main__":
  absltest.main()
