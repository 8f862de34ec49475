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


"""MaxText's trainers go on from what others saved: at the right step, from the same optimizer state.

Others are Tunix, MaxText's distillation in it, its own training engine, and its emergency checkpoints.

Needs Pythons with the trainers of two releases in MAXTEXT_PYTHON (`maxtext-0.2.4.txt`) and MAXTEXT_0_2_5_PYTHON
(`maxtext-0.2.5.txt`).
"""

from concurrent import futures
import pathlib
import shutil
import tempfile

from absl.testing import absltest
import linen_nnx_converter_trainer as trainer
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter

FIXTURES = pathlib.Path(__file__).parents[1] / "assets" / "linen_nnx_converter"
# Moments that decay by nothing and take up nothing: after a step of MaxText's they are what it read, to the bit.
KEEP_MOMENTS = {"adam_b1": 1.0, "adam_b2": 1.0}
PYTHONS = {"0.2.4": "MAXTEXT_PYTHON", "0.2.5": "MAXTEXT_0_2_5_PYTHON"}
RUNS = {
    # The folder, the updates that are done in it, who goes on from it, and with what settings.
    "sft_in_0_2_4": ("tunix/sft", 4, "0.2.4", trainer.NNX | {"base_num_decoder_layers": 3}),
    "rl_in_0_2_5": ("tunix/rl", 4, "0.2.5", {"weight_dtype": "bfloat16", "base_num_decoder_layers": 3}),
    "distillation_in_0_2_5": ("tunix/distillation", 2, "0.2.5", {"base_num_decoder_layers": 3}),
    "engine_in_0_2_5": ("training_engine/complete", 2, "0.2.5", {}),
    "emergency_in_0_2_5": ("emergency/maxtext-0.2.4", 3, "0.2.5", {}),
}
LOSSES = {"distillation_in_0_2_5": "2.207"}  # What the run that was never interrupted lost in that step.


@pytest.mark.integration
class GoesOnTest(absltest.TestCase):

  def test_maxtext_goes_on(self):
    self.tmp = pathlib.Path(tempfile.mkdtemp())
    self.addCleanup(shutil.rmtree, self.tmp)
    with futures.ThreadPoolExecutor(2) as pool:
      results = dict(zip(RUNS, pool.map(self.resumed, RUNS)))
    for name, losses in results.items():
      with self.subTest(name):
        step = RUNS[name][1]
        self.assertEqual(list(losses), [step])
        self.assertEqual(losses[step][0], LOSSES.get(name, losses[step][0]))
        checkpoints = trainer.checkpoints(self.tmp / name)
        read, written = (converter.load_checkpoint(checkpoints / str(folder)) for folder in (step - 1, step))
        self.assertEqual((int(read["step"]), int(written["step"])), (step, step + 1))
        for moment in ("mu", "nu"):
          self.assertEqual(*(trainer.bits(state["opt_state"][0][moment]) for state in (read, written)))
        for place in (0, 2):
          counts = [int(state["opt_state"][place]["count"]) for state in (read, written)]
          self.assertEqual(counts, [step, step + 1])

  def resumed(self, name):
    """What MaxText's trainer prints of the one step that it does."""
    source, step, release, config = RUNS[name]
    converter.convert_checkpoint(FIXTURES / source, trainer.checkpoints(self.tmp / name), maxtext_release=release)
    config = config | KEEP_MOMENTS | {"steps": step + 1, "checkpoint_period": 1}
    return trainer.train(self.tmp / name, PYTHONS[release], **config)


if __name__ == "__main__":
  absltest.main()
