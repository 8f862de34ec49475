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
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

from absl.testing import absltest
import jax
import numpy as np
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter

STEPS, SAVED = 6, 2  # Runs have six steps; that of step 2 is converted.
LINEN = {"enable_nnx": False, "pure_nnx": False, "pure_nnx_decoder": False}
NNX = {"enable_nnx": True, "pure_nnx": True, "pure_nnx_decoder": True}
TINY = {
    "run_name": "run",
    "hardware": "cpu",
    "skip_jax_distributed_system": True,
    "dataset_type": "synthetic",
    "steps": STEPS,
    "checkpoint_period": SAVED,
    "async_checkpointing": False,
    "attention": "dot_product",
    "base_emb_dim": 32,
    "base_mlp_dim": 64,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 4,
    "head_dim": 8,
    "base_num_decoder_layers": 4,
    "vocab_size": 256,
    "max_target_length": 16,
    "per_device_batch_size": 1,
    "enable_goodput_recording": False,
    "monitor_goodput": False,
    "enable_checkpoint_cloud_logger": False,
    "dtype": "float32",  # So that scanned and unscanned layers compute the same to the printed digits.
}


def train(folder: pathlib.Path, **config) -> dict[int, str]:
  """Runs MaxText's trainer, and returns what it printed of each step: loss and perplexity."""
  python = os.environ["MAXTEXT_PYTHON"]
  find = "import importlib.util as u; print(u.find_spec('maxtext').submodule_search_locations[0])"
  package = subprocess.run([python, "-c", find], capture_output=True, text=True, check=True).stdout.strip()
  settings = TINY | {"base_output_directory": folder} | config
  command = [python, "-m", "maxtext.trainers.pre_train.train", f"{package}/configs/base.yml"]
  done = subprocess.run(
      command + [f"{name}={value}" for name, value in settings.items()],
      capture_output=True,
      text=True,
      check=False,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  output = done.stdout + done.stderr
  assert done.returncode == 0, output[-5000:]
  found = re.findall(r"completed step: (\d+),.*? loss: (\S+),.* perplexity: (\S+)", output)
  return {int(step): (loss.strip(","), perplexity) for step, loss, perplexity in found}


def checkpoints(folder: pathlib.Path) -> pathlib.Path:
  return folder / "run" / "checkpoints"


def bits(tree):
  return {
      jax.tree_util.keystr(path): (np.asarray(leaf).dtype.str, np.asarray(leaf).shape, np.asarray(leaf).tobytes())
      for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
  }


@pytest.mark.integration
class ResumeTest(absltest.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.tmp = pathlib.Path(tempfile.mkdtemp())
    cls.addClassCleanup(shutil.rmtree, cls.tmp)
    with futures.ThreadPoolExecutor(2) as pool:
      linen = pool.submit(train, cls.tmp / "linen", **LINEN)
      nnx = pool.submit(train, cls.tmp / "nnx", **NNX)
      cls.losses = {"linen": linen.result(), "nnx": nnx.result()}

  def converted(self, source: pathlib.Path, name: str, **options) -> pathlib.Path:
    """Converts the checkpoints of a run into those of another, and returns its folder."""
    step = checkpoints(source) / str(SAVED)
    converter.convert_checkpoint(step, checkpoints(self.tmp / name), **options)
    return self.tmp / name

  def assert_resumes(self, run: pathlib.Path, like: str, **config):
    """The trainer goes on from step 2 with the very losses of the run that was never interrupted."""
    losses = train(run, **config)
    self.assertEqual(sorted(losses), list(range(SAVED + 1, STEPS)))
    self.assertEqual(losses, {step: self.losses[like][step] for step in losses})

  def assert_same_leaves(self, one: pathlib.Path, other: pathlib.Path):
    trees = [converter.load_checkpoint(checkpoints(run) / str(SAVED)) for run in (one, other)]
    self.assertEqual(*map(bits, trees))

  def test_linen_to_nnx_and_back(self):
    there = self.converted(self.tmp / "linen", "linen_as_nnx")
    back = self.converted(there, "linen_from_nnx")
    self.assert_same_leaves(back, self.tmp / "linen")
    self.assert_resumes(back, "linen", **LINEN)

  def test_nnx_run_to_nnx_and_back(self):
    there = self.converted(self.tmp / "nnx", "nnx_as_nnx", nnx_values="all_boxed")
    back = self.converted(there, "nnx_from_nnx")
    self.assert_same_leaves(back, self.tmp / "nnx")
    self.assert_resumes(back, "nnx", **NNX)

  def test_scanned_to_unscanned_and_back(self):
    there = self.converted(self.tmp / "linen", "unscanned", direction="linen_to_linen", scan_layers=False)
    back = self.converted(there, "scanned", direction="linen_to_linen", scan_layers=True)
    self.assert_same_leaves(back, self.tmp / "linen")
    self.assert_resumes(there, "linen", scan_layers=False, **LINEN)

  def test_linen_run_goes_on_unscanned_in_nnx(self):
    """Another arrangement and another trainer at once."""
    nnx = self.converted(self.tmp / "linen", "linen_as_nested_nnx", scan_layers=False)
    linen = self.converted(nnx, "linen_for_nnx_trainer")
    self.assert_resumes(linen, "linen", scan_layers=False, **NNX)


if __name__ == "__main__":
  absltest.main()
