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

"""Runs of MaxText's own trainers, tiny and on the CPU."""

import json
import os
import pathlib
import re
import subprocess

import jax
import numpy as np

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
# Runs MaxText's trainer once for each of the settings, with images where the model takes them: of which shape, and behind
# which token, is said here. What runs for six steps is not worth optimizing.
_RUNS = r"""
import contextlib, json, os, pathlib, sys
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
import jax
from maxtext.input_pipeline import synthetic_data_processing as synthetic
from maxtext.trainers.pre_train import train
import maxtext

IMAGES = {"gemma3-4b": ((1, 896, 896, 3), 262144), "qwen3-omni-30b-a3b": ((3, 2, 64, 64), 151655)}
base, losses = f"{list(maxtext.__path__)[0]}/configs/base.yml", {}
text_alone = synthetic.SyntheticDataIterator.raw_generate_synthetic_data

def with_images(config, data):
  batch = text_alone(config, data)
  if config.model_name in IMAGES:
    shape, token = IMAGES[config.model_name]
    batch["images"] = jax.random.uniform(jax.random.key(1), (len(batch["inputs"]), *shape))
    batch["inputs"] = batch["inputs"].at[:, 2:6].set(token)
  return batch

synthetic.SyntheticDataIterator.raw_generate_synthetic_data = staticmethod(with_images)
for folder, settings in json.loads(sys.argv[1]).items():
  metrics = pathlib.Path(folder) / "metrics"
  metrics.parent.mkdir(parents=True, exist_ok=True)
  places = [f"base_output_directory={folder}", f"metrics_file={metrics}"]
  with contextlib.redirect_stdout(sys.stderr):
    train.main(["", base, *places, *(f"{name}={value}" for name, value in settings.items())])
  lines = map(json.loads, metrics.read_text().splitlines())
  losses[folder] = {int(line["step"]): line["learning/loss"] for line in lines}
print(json.dumps(losses))
"""


def train_all(runs: dict[pathlib.Path, dict], python: str = "MAXTEXT_PYTHON") -> dict[pathlib.Path, dict[int, float]]:
  """Trains one run after the other in one process, whose start costs more than a run, and returns what each step lost.

  Args:
    runs: the folder of each run, and its settings besides `TINY`.
    python: as `run` has it.
  """
  settings = {str(folder): TINY | config for folder, config in runs.items()}
  losses = said(_RUNS, json.dumps(settings), python=python) if runs else {}
  return {folder: {int(step): loss for step, loss in losses[str(folder)].items()} for folder in runs}


def train(folder: pathlib.Path, python: str = "MAXTEXT_PYTHON", **config) -> dict[int, tuple[str, str]]:
  """Runs MaxText's trainer, as `run` does, and returns what it printed of each step: loss and perplexity."""
  output = run("maxtext.trainers.pre_train.train", folder, python, **config)
  found = re.findall(r"completed step: (\d+),.*? loss: (\S+),.* perplexity: (\S+)", output)
  return {int(step): (loss.strip(","), perplexity) for step, loss, perplexity in found}


def run(module: str, folder: pathlib.Path, python: str = "MAXTEXT_PYTHON", **config) -> str:
  """Runs one of MaxText's commands, and returns what it printed.

  Args:
    module: the command.
    folder: where it writes its checkpoints.
    python: the environment variable that names a Python with MaxText's trainer.
    **config: MaxText's settings.
  """
  python = os.environ[python]
  find = "import importlib.util as u; print(u.find_spec('maxtext').submodule_search_locations[0])"
  package = subprocess.run([python, "-c", find], capture_output=True, text=True, check=True).stdout.strip()
  settings = TINY | {"base_output_directory": folder} | config
  command = [python, "-m", module, f"{package}/configs/base.yml"]
  done = subprocess.run(
      command + [f"{name}={value}" for name, value in settings.items()],
      capture_output=True,
      text=True,
      check=False,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  output = done.stdout + done.stderr
  assert done.returncode == 0, output[-5000:]
  return output


def said(script: str, *arguments, python: str = "MAXTEXT_PYTHON", **config):
  """Runs a script with MaxText's settings after its arguments, and returns the JSON object that it printed."""
  command = [os.environ[python], "-c", script, *arguments, *(f"{name}={value}" for name, value in config.items())]
  env = os.environ | {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
  lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
  assert len(lines) == 1, done.stderr[-5000:]
  return json.loads(lines[0])


def checkpoints(folder: pathlib.Path) -> pathlib.Path:
  return folder / "run" / "checkpoints"


def bits(tree):
  return {
      jax.tree_util.keystr(path): (np.asarray(leaf).dtype.str, np.asarray(leaf).shape, np.asarray(leaf).tobytes())
      for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
  }
