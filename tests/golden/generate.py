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


"""Writes MaxText's own abstract train states as text, to test checkpoint layouts against.

Run it with the Python of an environment that holds one MaxText release:

  python generate.py --out DIR [--only CASE,CASE]

It asks that release for the train state of every model in CASES, by tracing alone, and writes
`DIR/<release>/<case>.<form>.<scanned|unscanned>.txt`, one leaf per line:

  <path joined by '/'> <shape> <dtype> <kind>

Forms:
  linen   the Flax TrainState of the Linen trainer, with the names that Orbax gives it
  nnx     the pure dict of TrainStateNNX
  ondisk  what the NNX trainer of this release hands to Orbax

`kind` is the NNX Variable type, for Linen the collection, and OptState outside the model. An empty node (an optax
EmptyState, a masked leaf) is written `<path> None`, an empty dict `<path> {}`. `<case>.config.json` beside them holds
the settings that decide the layout, and `<case>.skipped.txt` says why a file is missing. Files that exist are kept.
`python -m zipfile -c <release>.zip <release>` in DIR makes the archive that the tests read.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import inspect
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# pylint: disable=g-import-not-at-top,wrong-import-position
from absl import app
from absl import flags
from cases import Case
from cases import CASES
from cases import SMALL
import jax
from settings import LAYOUT_KEYS
from settings import RUN
import tree_lines

_OUT = flags.DEFINE_string("out", None, "Folder to write to; a subfolder per release is made.", required=True)
_ONLY = flags.DEFINE_list("only", [], "Cases to write; all when empty.")
_DEVICES = flags.DEFINE_integer("devices", 1, "Number of fake CPU devices; set by the script for cases that need more.")
_TIMEOUT = flags.DEFINE_integer("timeout", 300, "Seconds after which the tracing of one state is given up.")

RELEASE = importlib.metadata.version("maxtext")
HAS_LINEN = tuple(int(part) for part in RELEASE.split(".")[:3]) < (0, 2, 5)


def package_dir() -> pathlib.Path:
  """The folder of the installed package; finding it imports nothing heavy."""
  return pathlib.Path(importlib.util.find_spec("maxtext").origin).parent


@functools.cache
def known_settings() -> frozenset[str]:
  """Names of the settings that this release has."""
  from maxtext.configs import types

  return frozenset(types.MaxTextConfig.model_fields)


@functools.cache
def tiny_tokenizer() -> str:
  """Folder of a made-up Hugging Face tokenizer; Engram reads its vocabulary when the model is built."""
  import tokenizers
  import transformers

  words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "a", "b", "A", "B"])}
  model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
  folder = tempfile.mkdtemp()
  fast = transformers.PreTrainedTokenizerFast(
      tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
  )
  fast.save_pretrained(folder)
  return folder


def make_config(case: Case, linen: bool, scan: bool):
  """The release's configuration object of a case. Settings that the release lacks are left out."""
  from maxtext.configs import pyconfig

  wanted = {**RUN, **SMALL, **case.overrides, "scan_layers": scan}
  wanted |= dict.fromkeys(("enable_nnx", "pure_nnx", "pure_nnx_decoder"), not linen)
  if "engram_layers" in wanted:
    wanted["tokenizer_path"] = tiny_tokenizer()
    os.environ.setdefault("HF_TOKEN", "unused")  # MaxText asks for one even when the tokenizer is a local folder.
  settings = {k: v for k, v in wanted.items() if k in known_settings()}
  model = settings.get("model_name")
  if model and not (package_dir() / "configs" / "models" / f"{model}.yml").exists():
    raise LookupError(f"MaxText {RELEASE} has no model {model}")
  return pyconfig.initialize(["golden", str(package_dir() / "configs" / "base.yml")], **settings)


def make_optimizer(config, model, mesh):
  """The optax transformation that the trainer of this release would use."""
  from maxtext.utils import train_utils

  make = train_utils.create_training_optimizer
  extra = {"mesh": mesh} if "mesh" in inspect.signature(make).parameters else {}
  return make(config, model, **extra)[1]


def linen_state(config, mesh) -> dict[str, Any]:
  """The abstract state of the Linen trainer: what Orbax sees of its TrainState."""
  from flax.core import meta

  from maxtext.utils import maxtext_utils
  from maxtext.utils import model_creation_utils

  model = model_creation_utils.from_config(config, mesh=mesh)
  tx = make_optimizer(config, model, mesh)
  key = jax.random.PRNGKey(0)
  init = functools.partial(maxtext_utils.init_initial_state, model, tx, config, True, key)
  # Where an array lies does not matter here, and some releases' constraints fail on a CPU mesh.
  with mock.patch.object(jax.lax, "with_sharding_constraint", lambda x, *_, **__: x):
    state = meta.unbox(jax.eval_shape(init))
  return {"params": state.params, "opt_state": state.opt_state, "step": state.step}


def nnx_state(config, mesh):
  """The abstract nnx.State of the NNX trainer's TrainStateNNX."""
  from flax import nnx

  from maxtext.common import train_state_nnx
  from maxtext.utils import model_creation_utils

  create_model, model = model_creation_utils.create_nnx_abstract_model(config, mesh)
  tx = make_optimizer(config, model, mesh)

  def create_state():
    model = create_model()
    return train_state_nnx.TrainStateNNX(model, nnx.Optimizer(model, tx, wrt=nnx.Param))

  return nnx.state(nnx.eval_shape(create_state))


def saved_state(state) -> dict[str, Any]:
  """What the NNX trainer of this release hands to Orbax."""
  from maxtext.common import train_state_nnx

  if hasattr(train_state_nnx, "to_checkpoint_dict"):
    return train_state_nnx.to_checkpoint_dict(state)
  return train_state_nnx.to_linen_checkpoint_dict(state.to_pure_dict())


@contextlib.contextmanager
def time_limit(seconds: int):
  """Raises TimeoutError in the body after so many seconds."""

  def stop(*_):
    raise TimeoutError(f"not traced within {seconds} s")

  previous = signal.signal(signal.SIGALRM, stop)
  signal.alarm(seconds)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def trace(case: Case, linen: bool, scan: bool):
  """Forms of one arrangement of a case with their lines, and the settings that decided the layout."""
  from flax import linen as nn

  from maxtext.utils import maxtext_utils

  config = make_config(case, linen, scan)
  mesh = maxtext_utils.get_mesh_from_config(config)
  with nn.logical_axis_rules(config.logical_axis_rules):
    if linen:
      forms = {"linen": tree_lines.lines_of_linen(linen_state(config, mesh))}
    else:
      state = nnx_state(config, mesh)
      kinds = tree_lines.variable_kinds(state)
      forms = {
          "nnx": tree_lines.lines_of_nnx(state.to_pure_dict(), kinds),
          "ondisk": tree_lines.lines_of_nnx(saved_state(state), kinds),
      }
  return forms, layout_settings(config)


def layout_settings(config) -> dict[str, Any]:
  """The settings that decide a layout, as plain values."""
  found = {}
  for key in LAYOUT_KEYS:
    if hasattr(config, key):
      value = getattr(config, key)
      value = getattr(value, "value", value)
      found[key] = value if isinstance(value, (int, float, str, list, type(None))) else str(value)
  return found


def reason(error: BaseException) -> str:
  """An exception as one line."""
  text = " ".join(str(error).split())
  return f"{type(error).__name__}: {text[:400]}"


def write_case(folder: pathlib.Path, name: str) -> None:
  """Writes the files of one case that are not there yet, and the reasons for those that cannot be written."""
  case, skipped = CASES[name], []
  for linen in (True, False) if HAS_LINEN else (False,):
    for scan in case.scan:
      arrangement = "scanned" if scan else "unscanned"
      forms = ("linen",) if linen else ("nnx", "ondisk")
      files = {form: folder / f"{name}.{form}.{arrangement}.txt" for form in forms}
      if all(file.exists() for file in files.values()):
        continue
      start = time.time()
      try:
        with time_limit(_TIMEOUT.value):
          texts, settings = trace(case, linen, scan)
      except (KeyboardInterrupt, SystemExit):
        raise
      except BaseException as error:  # pylint: disable=broad-exception-caught
        skipped.append(f"{forms[0]} {arrangement}: {reason(error)}")
        print(f"{name} {skipped[-1][:200]}", flush=True)
        continue
      for form, file in files.items():
        file.write_text("\n".join(texts[form]) + "\n")
      (folder / f"{name}.config.json").write_text(json.dumps(settings, indent=2) + "\n")
      print(f"{name} {forms[0]} {arrangement} {len(texts[forms[0]])} leaves {time.time() - start:.1f} s", flush=True)
  note = folder / f"{name}.skipped.txt"
  if skipped:
    note.write_text("\n".join(skipped) + "\n")
  else:
    note.unlink(missing_ok=True)


def run_with_devices(devices: int, names: list[str]) -> None:
  """Runs cases in a process of its own, for the number of devices is fixed once JAX is up."""
  command = [sys.executable, __file__, f"--out={_OUT.value}", f"--only={','.join(names)}", f"--devices={devices}"]
  subprocess.run(command + [f"--timeout={_TIMEOUT.value}"], check=False)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError("Too many arguments.")
  if unknown := set(_ONLY.value) - set(CASES):
    raise app.UsageError(f"No such case: {', '.join(sorted(unknown))}")
  jax.config.update("jax_num_cpu_devices", _DEVICES.value)
  # The trainer draws its keys with this generator, which decides the length of raw key data.
  jax.config.update("jax_default_prng_impl", "unsafe_rbg")
  folder = pathlib.Path(_OUT.value) / RELEASE
  folder.mkdir(parents=True, exist_ok=True)
  names = _ONLY.value or list(CASES)
  elsewhere = {}
  for name in names:
    if CASES[name].devices == _DEVICES.value:
      write_case(folder, name)
    else:
      elsewhere.setdefault(CASES[name].devices, []).append(name)
  for devices, others in elsewhere.items():
    run_with_devices(devices, others)


if __name__ == "__main__":
  app.run(main)
