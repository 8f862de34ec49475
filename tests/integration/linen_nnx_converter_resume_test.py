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

"""MaxText 0.2.4's own trainers go on from converted checkpoints with the losses that they would have had.

Needs a Python that has MaxText's trainer (`maxtext-0.2.4.txt`) in the environment variable MAXTEXT_PYTHON. Each start of
the trainer takes about half a minute.
"""

from concurrent import futures
import pathlib
import shutil
import tempfile

from absl.testing import absltest
import linen_nnx_converter_trainer as trainer
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter


@pytest.mark.integration
class ResumeTest(absltest.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.tmp = pathlib.Path(tempfile.mkdtemp())
    cls.addClassCleanup(shutil.rmtree, cls.tmp)
    with futures.ThreadPoolExecutor(2) as pool:
      linen = pool.submit(trainer.train, cls.tmp / "linen", **trainer.LINEN)
      nnx = pool.submit(trainer.train, cls.tmp / "nnx", **trainer.NNX)
      cls.losses = {"linen": linen.result(), "nnx": nnx.result()}

  def converted(self, source: pathlib.Path, name: str, **options) -> pathlib.Path:
    """Converts the checkpoints of a run into those of another, and returns its folder."""
    step = trainer.checkpoints(source) / str(trainer.SAVED)
    converter.convert_checkpoint(step, trainer.checkpoints(self.tmp / name), **options)
    return self.tmp / name

  def assert_resumes(self, run: pathlib.Path, like: str, **config):
    """The trainer goes on from step 2 with the very losses of the run that was never interrupted."""
    losses = trainer.train(run, **config)
    self.assertEqual(sorted(losses), list(range(trainer.SAVED + 1, trainer.STEPS)))
    self.assertEqual(losses, {step: self.losses[like][step] for step in losses})

  def assert_same_leaves(self, one: pathlib.Path, other: pathlib.Path):
    trees = [converter.load_checkpoint(trainer.checkpoints(run) / str(trainer.SAVED)) for run in (one, other)]
    self.assertEqual(*map(trainer.bits, trees))

  def test_linen_to_nnx_and_back(self):
    there = self.converted(self.tmp / "linen", "linen_as_nnx")
    back = self.converted(there, "linen_from_nnx")
    self.assert_same_leaves(back, self.tmp / "linen")
    self.assert_resumes(back, "linen", **trainer.LINEN)

  def test_nnx_run_to_nnx_and_back(self):
    there = self.converted(self.tmp / "nnx", "nnx_as_nnx", nnx_values="all_boxed")
    back = self.converted(there, "nnx_from_nnx")
    self.assert_same_leaves(back, self.tmp / "nnx")
    self.assert_resumes(back, "nnx", **trainer.NNX)

  def test_scanned_to_unscanned_and_back(self):
    there = self.converted(self.tmp / "linen", "unscanned", direction="linen_to_linen", scan_layers=False)
    back = self.converted(there, "scanned", direction="linen_to_linen", scan_layers=True)
    self.assert_same_leaves(back, self.tmp / "linen")
    self.assert_resumes(there, "linen", scan_layers=False, **trainer.LINEN)

  def test_linen_run_goes_on_unscanned_in_nnx(self):
    """Another arrangement and another trainer at once."""
    nnx = self.converted(self.tmp / "linen", "linen_as_nested_nnx", scan_layers=False)
    linen = self.converted(nnx, "linen_for_nnx_trainer")
    self.assert_resumes(linen, "linen", scan_layers=False, **trainer.NNX)


if __name__ == "__main__":
  absltest.main()
