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

"""The inspector with a MaxText config, run by MaxText 0.2.5's own Python.

Needs a Python with MaxText 0.2.5, its trainer's dependencies and this package in MAXTEXT_0_2_5_PYTHON.
"""

import os
import pathlib
import subprocess

from absl.testing import absltest
from absl.testing import parameterized
import linen_nnx_converter_trainer as trainer
import pytest

SOURCE = pathlib.Path(__file__).parents[1] / "assets" / "linen_nnx_converter" / "maxtext-0.2.4" / "linen_scan"


@pytest.mark.integration
class ConfigTest(parameterized.TestCase):

  @parameterized.parameters(
      ({}, 0, "MaxText 0.2.5 (nnx): all 39 leaves fit"),
      ({"scan_layers": False}, 0, "MaxText 0.2.5 (nnx), in the form that it reads: all 120 leaves fit"),
      (
          {"base_mlp_dim": 128},
          1,
          "unlike      params/params/decoder/layers/mlp/wo/kernel  (64, 4, 32) float32, not (128, 4, 32) float32",
      ),
      (
          {"base_num_decoder_layers": 3, "scan_layers": False},
          1,
          "has more    params/params/decoder/layers_3/mlp/wi_0…1/kernel  (32, 64) float32",
      ),
      ({"weight_dtype": "bfloat16"}, 0, "is cast     params/params/token_embedder/embedding  (256, 32) float32, not"),
      ({"num_heads": 3}, 2, "expected a config that the installed MaxText can read"),
  )
  def test_where_the_checkpoint_and_the_model_differ(self, settings, code, said):
    command = [os.environ["MAXTEXT_0_2_5_PYTHON"], "-m", "maxtext.checkpoint_conversion.linen_nnx_inspector", SOURCE]
    command += ["base.yml", *(f"{name}={value}" for name, value in (trainer.TINY | settings).items())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    self.assertEqual(done.returncode, code, done.stderr)
    self.assertIn(said, done.stdout if code < 2 else done.stderr)


if __name__ == "__main__":
  absltest.main()
