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

"""MaxText's trainer goes on from a checkpoint that was put into a pipeline, or taken out of one, with equal losses.

Needs a Python with MaxText 0.2.5's trainer and this package in MAXTEXT_0_2_5_PYTHON. The pipelines have two stages, on
two devices of the CPU.
"""

from concurrent import futures
import os
import pathlib
import shutil
import subprocess
import tempfile
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import linen_nnx_converter_trainer as trainer
import pytest

# Weights that move fast, so that layers in another order would give other losses.
FAST = {"python": "MAXTEXT_0_2_5_PYTHON", "learning_rate": 0.02}
STAGES = {"ici_pipeline_parallelism": 2, "num_pipeline_microbatches": 2}
ARRANGEMENTS = {
    "scanned": {},
    "circular": STAGES,
    "two_scanned_layers": STAGES | {"num_layers_per_pipeline_stage": 2, "scan_layers_per_stage": True},
}


@pytest.mark.integration
class PipelineTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.tmp = pathlib.Path(tempfile.mkdtemp())
    cls.addClassCleanup(shutil.rmtree, cls.tmp)
    cls.enterClassContext(mock.patch.dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=2"))
    runs = ("scanned", "circular")
    with futures.ThreadPoolExecutor(2) as pool:
      cls.losses = dict(zip(runs, pool.map(lambda run: cls.train(run, run), runs)))

  @classmethod
  def train(cls, folder, arrangement):
    return trainer.train(cls.tmp / folder, **FAST, **ARRANGEMENTS[arrangement])

  def convert(self, source, folder, arrangement):
    """By the command, with the config of the run that shall go on; its model is compared with the target leaf by leaf."""
    settings = trainer.TINY | {"base_output_directory": self.tmp / folder} | FAST | ARRANGEMENTS[arrangement]
    command = [os.environ[settings.pop("python")], "-m", "maxtext.checkpoint_conversion.linen_nnx_converter"]
    # The layers of a stage, and those that are not scanned, share RNG state in NNX.
    command += [f"--source_path={trainer.checkpoints(self.tmp / source) / str(trainer.SAVED)}", "--nnx_aux=drop"]
    command += ["base.yml", *(f"{key}={value}" for key, value in settings.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    self.assertEqual(done.returncode, 0, done.stderr)

  @parameterized.parameters(("scanned", "circular"), ("circular", "scanned"), ("circular", "two_scanned_layers"))
  def test_the_trainer_goes_on(self, source, target):
    """From step 2, with the losses of the run that was never converted; layers in another order give others by 0.3."""
    folder = f"{source}_as_{target}"
    self.convert(source, folder, target)
    losses = self.train(folder, target)
    self.assertEqual(sorted(losses), list(range(trainer.SAVED + 1, trainer.STEPS)))
    for step, (loss, _) in losses.items():
      self.assertAlmostEqual(float(loss), float(self.losses[source][step][0]), delta=0.002)


if __name__ == "__main__":
  absltest.main()
