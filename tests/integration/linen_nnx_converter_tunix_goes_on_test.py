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

"""Tunix's own trainer goes on from a step of MaxText's, with the losses of a run that was never interrupted.

Needs a Python with MaxText's trainer and Tunix in MAXTEXT_PYTHON (`maxtext-0.2.4.txt`).
"""

import pathlib
import shutil
import tempfile

from absl.testing import absltest
import linen_nnx_converter_trainer as trainer
import pytest

SAVED, STEPS = 2, 4
# Trains by MaxText's SFT in Tunix, takes step 2 to MaxText's layout and back, and goes on from that.
RUNS = r"""
import json, pathlib, sys
import jax, numpy as np
from flax.linen import partitioning
from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.configs import pyconfig
from maxtext.trainers.post_train.sft import train_sft
import maxtext

folder, *settings = sys.argv[1:]
folder, base = pathlib.Path(folder), f"{list(maxtext.__path__)[0]}/configs/base.yml"

def config_of(name):
  return pyconfig.initialize_pydantic(["", base, *settings, f"base_output_directory={folder / name}"])

def batch(config, step):
  tokens = np.random.default_rng(step).integers(1, config.vocab_size, (1, config.max_target_length + 1), np.int32)
  at, ones = np.arange(config.max_target_length, dtype=np.int32)[None], np.ones_like(tokens[:, 1:])
  sides = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
  return sides | {f"{side}_{name}": of for side in sides for name, of in (("position", at), ("segmentation", ones))}

def losses(name):
  # What each step of the run loses, as hexadecimal digits.
  config, found = config_of(name), {}
  run, mesh = train_sft.setup_trainer_state(config)
  run.data_hooks = run.training_hooks = None  # They want a data set that is downloaded.
  buffer = run._buffer_metrics
  def and_keep(metrics, loss, step, **more):
    found[step] = float(loss).hex()
    return buffer(metrics, loss=loss, step=step, **more)
  run._buffer_metrics = and_keep
  with jax.set_mesh(mesh), partitioning.axis_rules(config.logical_axis_rules):
    run.train([batch(config, step) for step in range(config.steps)])
  run.close()
  return found

uninterrupted = losses("uninterrupted")
steps = lambda name: folder / name / "run" / "checkpoints"
converter.convert_checkpoint(steps("uninterrupted") / "2", folder / "maxtext", maxtext_release="0.2.4")
config = pyconfig.initialize(["", base, *settings, f"base_output_directory={folder / 'resumed'}"])
done = converter.convert_checkpoint(folder / "maxtext", config=config, target_layout="tunix", init_rngs=True)
resumed = losses("resumed")
flat = lambda at: jax.tree_util.tree_flatten_with_path(converter.load_checkpoint(at))[0]
bits = lambda at: {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in flat(at)}
differ = {}
for step in (2, 4):
  one, other = (bits(steps(name) / str(step)) for name in ("uninterrupted", "resumed"))
  differ[step] = [path for path in {**one, **other} if one.get(path) != other.get(path)]
print(json.dumps({"uninterrupted": uninterrupted, "resumed": resumed, "differ": differ, "leaves": len(one)}))
"""


@pytest.mark.integration
class ToTunixTest(absltest.TestCase):

  def test_tunix_goes_on(self):
    tmp = pathlib.Path(tempfile.mkdtemp())
    self.addCleanup(shutil.rmtree, tmp)
    settings = trainer.TINY | trainer.NNX | {"steps": STEPS, "checkpoint_period": SAVED, "base_num_decoder_layers": 2}
    found = trainer.said(RUNS, tmp, **settings)
    self.assertCountEqual(found["uninterrupted"], ["0", "1", "2", "3"])
    self.assertEqual(found["resumed"], {step: found["uninterrupted"][step] for step in ("2", "3")})
    self.assertEqual(found["differ"], {"2": [], "4": []})
    self.assertGreater(found["leaves"], 60)


if __name__ == "__main__":
  absltest.main()
