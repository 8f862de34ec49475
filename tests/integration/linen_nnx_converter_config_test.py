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

"""The command with a MaxText config, run by MaxText 0.2.5's own Python, checked against the model of that config.

Needs a Python with MaxText 0.2.5, its trainer's dependencies and this package in MAXTEXT_0_2_5_PYTHON, and one with
0.2.4's trainer in MAXTEXT_PYTHON.
"""

import os
import pathlib
import shutil
import subprocess
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import linen_nnx_converter_trainer as trainer
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter

SOURCE = pathlib.Path(__file__).parents[1] / "assets" / "linen_nnx_converter" / "maxtext-0.2.4" / "linen_scan"


@pytest.mark.integration
class ConfigTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.tmp = pathlib.Path(tempfile.mkdtemp())
    self.addCleanup(shutil.rmtree, self.tmp)

  def run_command(self, *flags, source=SOURCE, **settings):
    settings = trainer.TINY | {"base_output_directory": self.tmp} | settings
    command = [os.environ["MAXTEXT_0_2_5_PYTHON"], "-m", "maxtext.checkpoint_conversion.linen_nnx_converter"]
    command += [f"--source_path={source}", *flags, "base.yml", *(f"{name}={value}" for name, value in settings.items())]
    return subprocess.run(command, capture_output=True, text=True, check=False)

  @parameterized.parameters((True,), (False,))
  def test_a_config_gives_arrangement_target_and_release(self, scan_layers):
    done = self.run_command(scan_layers=scan_layers)
    self.assertEqual((done.returncode, done.stderr), (0, ""))  # MaxText and its libraries have their say elsewhere.
    self.assertIn("converted Linen TrainState -> Linen layout of the NNX trainer", done.stdout)
    decoder = converter.load_checkpoint(trainer.checkpoints(self.tmp))["params"]["params"]["decoder"]
    self.assertIn("layers" if scan_layers else "layers_3", decoder)

  @parameterized.parameters(
      (
          {"base_num_decoder_layers": 5},
          "decoder/layers: expected 5 layers, as the config says, found 4 in the checkpoint",
      ),
      ({"base_mlp_dim": 48}, "mlp/wi_0/kernel: expected (32, 4, 48) float32, found (32, 4, 64) float32"),
      ({"opt_type": "muon"}, "opt_state/inner_states/adam/inner_state/0/count: expected () int32, found nothing"),
      ({"no_such_setting": 1}, "expected a config that the installed MaxText can read"),
  )
  def test_a_config_of_another_model_is_refused(self, settings, message):
    done = self.run_command(**settings)
    self.assertEqual(done.returncode, 1)
    self.assertIn(message, done.stderr.splitlines()[-1])
    self.assertEmpty(list(self.tmp.iterdir()))

  def test_floats_of_another_width_are_noted_and_the_run_goes_on(self):
    """With bfloat16 weights MaxText 0.2.4 saves adamw's mu in float32 for a while, where 0.2.5's model has bfloat16."""
    settings = {"weight_dtype": "bfloat16", "learning_rate": 0.02}
    uninterrupted = trainer.train(self.tmp / "linen", **trainer.LINEN, **settings)
    source = trainer.checkpoints(self.tmp / "linen") / str(trainer.SAVED)
    done = self.run_command(source=source, scan_layers=False, **settings)
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertRegex(done.stdout, r"MaxText will cast \d+ leaves when it loads them, .* is float32, not bfloat16")
    resumed = trainer.train(self.tmp, "MAXTEXT_0_2_5_PYTHON", scan_layers=False, **settings)
    self.assertEqual(sorted(resumed), [3, 4, 5])
    for step, (loss, _) in resumed.items():
      self.assertAlmostEqual(float(loss), float(uninterrupted[step][0]), delta=0.0021)

  def test_the_check_can_be_left_out(self):
    self.assertEqual(self.run_command("--nocheck_model", opt_type="muon").returncode, 0)


if __name__ == "__main__":
  absltest.main()
