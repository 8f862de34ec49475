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

"""MaxText 0.2.5 goes on from what the Linen trainers of 0.2.3 and 0.2.4 saved: same step, same losses.

0.2.4's with optimizers of each form; 0.2.3's from a checkpoint on file, with the losses that its run printed after it.

Needs Pythons with the trainers of both releases in MAXTEXT_PYTHON (`maxtext-0.2.4.txt`) and MAXTEXT_0_2_5_PYTHON
(`maxtext-0.2.5.txt`).
"""

from concurrent import futures
import pathlib
import shutil
import tempfile

from absl.testing import absltest
import linen_nnx_converter_trainer as trainer
import numpy as np
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter

FIXTURES = pathlib.Path(__file__).parents[1] / "assets" / "linen_nnx_converter"
SOURCE = FIXTURES / "maxtext-0.2.4" / "linen_scan"
OPTIMIZERS = {
    "adamw": {},
    "muon": {"opt_type": "muon"},
    "skip_step": {"skip_step_on_spikes": True},
    "trainable_mask": {"trainable_parameters_mask": "['.*mlp.*']", "skip_step_on_spikes": True},
}
# So fast that moments that start at zero, as they do where they are not found, would show in the losses.
FAST = {"learning_rate": 0.02, "learning_rate_schedule_steps": 10, "warmup_steps_fraction": 0.1}
LOSSES_OF_0_2_3 = {3: 2.208, 4: 1.448, 5: 0.925}


@pytest.mark.integration
class AcrossReleasesTest(absltest.TestCase):

  def test_linen_runs_go_on_in_0_2_5(self):
    tmp = pathlib.Path(tempfile.mkdtemp())
    self.addCleanup(shutil.rmtree, tmp)
    with futures.ThreadPoolExecutor(2) as pool:
      results = dict(zip(OPTIMIZERS, pool.map(lambda name: self.resumed(tmp / name, OPTIMIZERS[name]), OPTIMIZERS)))
    for name, (uninterrupted, resumed) in results.items():
      with self.subTest(name):
        self.assertEqual(sorted(resumed), [3, 4, 5])
        for step, (loss, _) in resumed.items():
          # Printed to three digits; the releases' own arithmetic differs in the last.
          np.testing.assert_allclose(float(loss), float(uninterrupted[step][0]), atol=0.0021)

  def test_a_linen_run_of_0_2_3_goes_on_in_0_2_5(self):
    tmp = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    source = FIXTURES / "maxtext-0.2.3" / "linen_scan"
    converter.convert_checkpoint(source, trainer.checkpoints(tmp), maxtext_release="0.2.5")
    resumed = trainer.train(tmp, "MAXTEXT_0_2_5_PYTHON", **FAST)
    self.assertEqual(sorted(resumed), [3, 4, 5])
    for step, uninterrupted in LOSSES_OF_0_2_3.items():
      self.assertAlmostEqual(float(resumed[step][0]), uninterrupted, delta=0.0021)

  def test_the_params_alone_for_load_parameters_path(self):
    """In each trainer the first losses are those of a run that takes the weights from the source itself."""
    tmp = pathlib.Path(tempfile.mkdtemp())
    self.addCleanup(shutil.rmtree, tmp)
    converter.convert_checkpoint(SOURCE, tmp / "params", params_only=True)
    converter.convert_checkpoint(SOURCE, tmp / "nnx", direction="linen_to_nnx", nnx_values="plain")
    converter.convert_checkpoint(tmp / "nnx", tmp / "params_of_nnx", params_only=True)
    params, of_nnx = (trainer.bits(converter.load_checkpoint(tmp / name)) for name in ("params", "params_of_nnx"))
    self.assertEqual(params, of_nnx)
    trainers = ("MAXTEXT_PYTHON", trainer.NNX), ("MAXTEXT_0_2_5_PYTHON", {})

    def losses(number, folder):
      python, settings = trainers[number]
      run = settings | {"steps": 2, "load_parameters_path": folder / "2" / "items"}
      return trainer.train(tmp / f"{number}-{folder.name}", python, **run)

    cases = [(number, folder) for number in range(len(trainers)) for folder in (SOURCE, tmp / "params")]
    with futures.ThreadPoolExecutor(2) as pool:
      found = list(pool.map(lambda case: losses(*case), cases))
    for number, (python, settings) in enumerate(trainers):
      with self.subTest(python, **settings):
        of_source, of_params = found[2 * number : 2 * number + 2]
        self.assertEqual(sorted(of_source), [0, 1])
        self.assertEqual(of_params, of_source)

  def resumed(self, folder, optimizer):
    """The losses of a Linen run, and those of 0.2.5 from the run's step 2 on."""
    uninterrupted = trainer.train(folder / "linen", **trainer.LINEN, **FAST, **optimizer)
    source = trainer.checkpoints(folder / "linen") / str(trainer.SAVED)
    target = trainer.checkpoints(folder / "nnx")
    converter.convert_checkpoint(source, target, maxtext_release="0.2.5")
    before, after = (converter.load_checkpoint(path) for path in (source, target))
    self.assertEqual(sorted(map(sum_of_bits, leaves(before))), sorted(map(sum_of_bits, leaves(after))))
    return uninterrupted, trainer.train(folder / "nnx", "MAXTEXT_0_2_5_PYTHON", **FAST, **optimizer)


def leaves(tree):
  """All arrays of the optimizer's state, wherever they stand."""
  return [leaf for leaf in trainer.bits(tree["opt_state"]).values()]


def sum_of_bits(leaf):
  return str(leaf)


if __name__ == "__main__":
  absltest.main()
