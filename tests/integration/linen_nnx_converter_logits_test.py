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

"""The numbers, not only the names: MaxText's forward pass gives the same logits before and after a conversion.

One process takes shrunk models from checkpoint to checkpoint, in the script beside this file, which has one of each
arrangement for `docs/conformance.md`. Those with the fewest layers are tested here.

Needs a Python with MaxText 0.2.4, its trainer's dependencies and this package in MAXTEXT_PYTHON.
"""

import os
import pathlib
import subprocess
import unittest

from absl.testing import absltest
import pytest

SCRIPT = pathlib.Path(__file__).parent / "linen_nnx_converter_logits.py"
# Of the largest logit. A loop over layers and layers one by one may be fused, and so rounded, in different ways: float32.
TOLERANCE = 5e-5
MODELS = ("llama2-7b", "deepseek3-671b", "gpt-oss-20b")
WRONG = 100 * TOLERANCE  # What a wrong conversion would change, at least.


@pytest.mark.integration
class LogitsTest(unittest.TestCase):

  def test_logits(self):
    command = [os.environ["MAXTEXT_PYTHON"], SCRIPT, f"--models={','.join(MODELS)}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    self.assertEqual(done.returncode, 0, done.stderr[-5000:])
    print(done.stdout)
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    self.assertEqual([model for model, *_ in rows], list(MODELS))
    for model, _, *numbers in rows:
      with self.subTest(model):
        *converted, transposed, exchanged = map(float, numbers)
        self.assertLess(max(converted), TOLERANCE)
        self.assertGreater(min(transposed, exchanged), WRONG)


if __name__ == "__main__":
  absltest.main()
