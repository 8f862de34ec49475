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

"""Weights into which adapters are merged make MaxText's own model say what it says with the adapters beside the base.

Needs a Python with MaxText's trainer and Tunix in MAXTEXT_PYTHON (`maxtext-0.2.4.txt`).
"""

import pathlib
import shutil
import tempfile

from absl.testing import absltest
import linen_nnx_converter_trainer as trainer
import pytest

ROOT = pathlib.Path(__file__).parent.parent
BASE = ROOT / "assets" / "linen_nnx_converter" / "maxtext-0.2.4" / "nnx_scan" / "2" / "items"
# Trains adapters of a base by MaxText's SFT, merges them, and compares the logits of the models.
RUNS = r"""
import json, pathlib, sys
import jax, numpy as np
from flax.linen import partitioning
from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.configs import pyconfig
from maxtext.trainers.post_train.sft import train_sft
from maxtext.utils import model_creation_utils
import maxtext

folder, source, *settings = sys.argv[1:]
folder, base = pathlib.Path(folder), f"{list(maxtext.__path__)[0]}/configs/base.yml"
lora = ["lora.enable_lora=True", "lora.lora_rank=2", "lora.lora_alpha=8.0"]

def config_of(weights, *more):
  return pyconfig.initialize_pydantic(
      ["", base, *settings, f"load_parameters_path={weights}", f"base_output_directory={folder / 'sft'}", *more]
  )

def batch(config, step):
  tokens = np.random.default_rng(step).integers(1, config.vocab_size, (1, config.max_target_length + 1), np.int32)
  at, ones = np.arange(config.max_target_length, dtype=np.int32)[None], np.ones_like(tokens[:, 1:])
  sides = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
  return sides | {f"{side}_{name}": of for side in sides for name, of in (("position", at), ("segmentation", ones))}

def logits(model, mesh, config):
  of = batch(config, 99)
  with jax.set_mesh(mesh), partitioning.axis_rules(config.logical_axis_rules):
    return np.asarray(
        model(of["inputs"], of["inputs_position"], of["inputs_segmentation"], enable_dropout=False), np.float64
    )

def of_weights(weights, *more):
  config = config_of(weights, *more)
  return logits(*model_creation_utils.from_pretrained(config), config)

config = config_of(source, *lora)
run, mesh = train_sft.setup_trainer_state(config)
run.data_hooks = run.training_hooks = None  # They want a data set that is downloaded.
with jax.set_mesh(mesh), partitioning.axis_rules(config.logical_axis_rules):
  run.train([batch(config, step) for step in range(config.steps)])
adapted = logits(run.model, mesh, config)
run.close()
found, adapters = {"base": of_weights(source)}, folder / "sft" / "run" / "checkpoints"
for name, scan_layers in (("scanned", True), ("unscanned", False)):
  done = converter.convert_checkpoint(
      source,
      folder / name,
      params_only=True,
      scan_layers=scan_layers,
      lora_restore_path=str(adapters),
      lora_alpha=8.0,
  )
  found[name] = of_weights(done.target, f"scan_layers={scan_layers}")
far = {name: float(np.abs(other - adapted).max()) for name, other in found.items()}
print(json.dumps({"far": far, "largest": float(np.abs(adapted).max())}))
"""


@pytest.mark.integration
class LoraTest(absltest.TestCase):

  def test_the_logits(self):
    tmp = pathlib.Path(tempfile.mkdtemp())
    self.addCleanup(shutil.rmtree, tmp)
    settings = (
        trainer.TINY | trainer.NNX | {"steps": 3, "checkpoint_period": 3, "learning_rate": 0.05, "dtype": "float32"}
    )
    found = trainer.said(RUNS, tmp, BASE, **settings)
    self.assertGreater(found["far"]["base"], 0.5)  # Of logits whose largest is 3.6.
    self.assertLess(found["far"]["scanned"], 1e-4)
    self.assertLess(found["far"]["unscanned"], 1e-4)


if __name__ == "__main__":
  absltest.main()
