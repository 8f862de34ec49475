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

"""Prints how the converter fares with every model of the installed MaxText, at its real size.

  python linen_nnx_converter_conformance.py [--models=gemma3-4b,…] [--processes=2]

Needs a Python with MaxText 0.2.4, its trainer's dependencies and this package. Both trainers' states of each
`configs/models/*.yml`, with its optimizer, scanned and unscanned, are traced from MaxText itself: all layers, real
shapes, no weights. Each is planned into the others, by the model's own config. Models of one decoder that fare alike
share a row; standard error has a row for each model:

  ok       every leaf landed on MaxText's own (path, shape, dtype), and there was no other, both ways
  –        MaxText has no such state; the reason is below the table
  refused  by the converter; the reason is below the table
  differs  MaxText's two states do not have the same weights, as `KNOWN` says
  FAILED   none of these
"""

from collections.abc import Callable, Iterator
import concurrent.futures
import dataclasses
import math
import multiprocessing
import os
import pathlib
import re
import sys
import tempfile
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("HF_TOKEN", "unused")  # Engram's config asks for one even when the tokenizer is a local folder.

# pylint: disable=g-import-not-at-top,wrong-import-position
from absl import app
from absl import flags
from absl import logging
from flax import nnx
import jax
from jax._src.interpreters import partial_eval
import linen_nnx_converter_conformance_page as conformance_page

import maxtext
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import options as options_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.maxtext_model import run_config
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import planner
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.common import train_state_nnx

_MODELS = flags.DEFINE_list("models", [], "Models to go through; all when empty.")
_PROCESSES = flags.DEFINE_integer("processes", os.cpu_count(), "Number of models under way at a time.")

SETTINGS = (
    "run_name=conformance",
    "base_output_directory=unused",
    "hardware=cpu",
    "skip_jax_distributed_system=True",
    "dataset_type=synthetic",
    "enable_checkpointing=False",
    "log_config=False",
    "attention=dot_product",
)
ARRANGEMENTS = (
    LINEN_SCANNED := ("linen", True),
    LINEN_UNSCANNED := ("linen", False),
    NNX_SCANNED := ("nnx", True),
    NNX_UNSCANNED := ("nnx", False),
)
REFUSED = "refused: "
KNOWN = {
    (
        "deepseek-custom",
        "Unscanned: Linen ↔ NNX",
    ): "MaxText's unscanned NNX model lacks the engram modules of its Linen model",
}


@dataclasses.dataclass(frozen=True)
class Traced:
  """MaxText's own abstract states of a model, in one arrangement by one trainer.

  Attributes:
    config: the model's config.
    saved: what the trainer saves, in the Linen layout.
    train_state: the pure dict of `TrainStateNNX`; None for the Linen trainer.
    params: the paths in `train_state` that are Params or the optimizer's; the others are RNG streams and the like.
  """

  config: Any
  saved: abstract_state.AbstractState
  train_state: abstract_state.AbstractState | None = None
  params: frozenset[abstract_state.Path] = frozenset()

  def saved_params(self) -> abstract_state.AbstractState:
    return _select(self.saved, lambda path: path[0] != layouts.NNX_AUX)

  def train_state_params(self) -> abstract_state.AbstractState:
    return _select(self.train_state, lambda path: path in self.params)


def trace(model: str, trainer: str, scan_layers: bool) -> Traced:
  """Traces a model.

  Raises:
    ConfigError: MaxText refuses the config, or cannot trace the model.
  """
  is_nnx = trainer == "nnx"
  arguments = ["base.yml", f"model_name={model}", f"scan_layers={scan_layers}", *SETTINGS]
  arguments += [f"{name}={is_nnx}" for name in ("enable_nnx", "pure_nnx", "pure_nnx_decoder")]
  if model == "deepseek-custom":
    arguments += [f"tokenizer_path={tiny_tokenizer()}"]
  config = run_config.load(arguments)
  if not is_nnx:
    return Traced(config, run_config.saved_state(config, trainer))
  try:
    state = run_config.nnx_state(config)
  except Exception as e:  # As saved_state does.  pylint: disable=broad-except
    raise errors.ConfigError(model, "a model that MaxText can trace", str(e), "") from e
  kinds = {tuple(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
  params = frozenset(path for path, v in kinds.items() if path[0] == "optimizer" or isinstance(v, nnx.Param))
  return Traced(config, _flatten(train_state_nnx.to_checkpoint_dict(state)), _flatten(state.to_pure_dict()), params)


def _flatten(tree) -> abstract_state.AbstractState:
  return abstract_state.abstract(abstract_state.flatten(tree))


def _select(state, keep: Callable[[abstract_state.Path], bool]) -> abstract_state.AbstractState:
  return dataclasses.replace(state, leaves={path: leaf for path, leaf in state.leaves.items() if keep(path)})


def tiny_tokenizer() -> str:
  """Folder of a made-up Hugging Face tokenizer; engram reads its vocabulary when the model is built."""
  import tokenizers
  import transformers

  words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "a", "b", "A", "B"])}
  model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
  folder = tempfile.mkdtemp()
  special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
  transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special).save_pretrained(folder)
  return folder


def rearranged(a: Traced, b: Traced, trainer: str) -> Iterator[str]:
  """What goes wrong between the scanned and the unscanned state of one trainer, both ways."""
  for source, target in ((a, b), (b, a)):
    yield from mismatch(source.saved, target.saved_params(), *by_config(target, trainer, nnx_aux="drop"))
    if trainer == "nnx":
      within_nnx = by_config(target, trainer, direction="nnx_to_nnx", nnx_aux="drop")
      yield from mismatch(source.train_state, target.train_state_params(), *within_nnx)


def exchanged(linen: Traced, of_nnx: Traced) -> Iterator[str]:
  """What goes wrong between the trainers' states of one arrangement, both ways."""
  to_linen = by_config(linen, "linen", nnx_aux="drop")
  yield from mismatch(linen.saved, of_nnx.saved_params(), *by_config(of_nnx, "nnx"))
  to_train_state = by_config(of_nnx, "nnx", direction="linen_to_nnx", nnx_values="plain")
  yield from mismatch(linen.saved, of_nnx.train_state_params(), *to_train_state)
  yield from mismatch(of_nnx.saved, linen.saved, *to_linen)
  yield from mismatch(of_nnx.train_state, linen.saved, *to_linen)


def saved_and_restored(of_nnx: Traced) -> Iterator[str]:
  """What goes wrong between the NNX trainer's two forms, with every RNG stream and other variable."""
  yield from mismatch(of_nnx.train_state, of_nnx.saved, *by_config(of_nnx, "nnx"))
  to_train_state = by_config(of_nnx, "nnx", direction="linen_to_nnx", nnx_values="plain")
  yield from mismatch(of_nnx.saved, of_nnx.train_state, *to_train_state)


def by_config(target: Traced, trainer: str, **keywords) -> tuple[options_lib.Options, planner.Run]:
  """The options, and the run, that the command takes from the target's config."""
  options = run_config.with_config(options_lib.Options.of(**keywords), target.config)
  return options, dataclasses.replace(run_config.run(target.config, None), trainer=trainer)


def mismatch(source, wanted, options, run) -> Iterator[str]:
  """Plans a conversion, and yields a line if its target is not the wanted state to the leaf."""
  try:
    found = planner.plan_conversion(source, options, run).target
  except errors.ConversionError as e:
    yield f"{REFUSED}{e}"
    return
  described = [{path: plan_lib.described(leaf) for path, leaf in s.leaves.items()} for s in (found, wanted)]
  paths = [path for path in described[0] | described[1] if described[0].get(path) != described[1].get(path)]
  if paths:
    leaf, other = (each.get(paths[0], "nothing") for each in described)
    yield f"{len(paths)} leaves differ, {'/'.join(paths[0])}: {leaf}, in MaxText {other}"
  elif found.lists != wanted.lists:
    yield f"the lists differ: {sorted(found.lists ^ wanted.lists)[0]}"


def checked(model: str) -> conformance_page.Checked:
  """Traces a model, and plans its states into each other."""
  jax.config.update("jax_default_prng_impl", "unsafe_rbg")  # As the trainers do.
  logging.set_verbosity("fatal")
  traced, reasons = {}, {}
  for trainer, scan_layers in ARRANGEMENTS:
    try:
      # A tracer has no sharding, and JAX searches the whole program for where it came from, to say so in an error that
      # Flax catches at once: without that search, DeepSeek-V3's 61 layers take seconds instead of minutes.
      with mock.patch.object(partial_eval.DynamicJaxprTracer, "_origin_msg", lambda _: ""):
        traced[trainer, scan_layers] = trace(model, trainer, scan_layers)
    except errors.ConfigError as e:
      reasons.setdefault(short(e.found), []).append(f"{trainer} {'scanned' if scan_layers else 'unscanned'}")
  problems = {
      "Linen: scanned ↔ unscanned": _problems(traced, (LINEN_SCANNED, LINEN_UNSCANNED), rearranged, "linen"),
      "NNX: scanned ↔ unscanned": _problems(traced, (NNX_SCANNED, NNX_UNSCANNED), rearranged, "nnx"),
      "Scanned: Linen ↔ NNX": _problems(traced, (LINEN_SCANNED, NNX_SCANNED), exchanged),
      "Unscanned: Linen ↔ NNX": _problems(traced, (LINEN_UNSCANNED, NNX_UNSCANNED), exchanged),
  }
  for which, column in ((NNX_SCANNED, "Scanned: Linen ↔ NNX"), (NNX_UNSCANNED, "Unscanned: Linen ↔ NNX")):
    if own := _problems(traced, (which,), saved_and_restored):
      problems[column] = own
  verdicts = tuple(verdict(model, column, problems[column]) for column in conformance_page.CHECKS)
  for column, cell in zip(conformance_page.CHECKS, verdicts):
    if cell in ("refused", "FAILED", "differs"):
      reason = KNOWN.get((model, column)) or problems[column][0].removeprefix(REFUSED)
      reasons.setdefault(f"{cell}: {reason}", []).append(column)
  jax.clear_caches()  # What one model traced is of no use to the next.
  notes = {reason.replace(model, "…"): tuple(which) for reason, which in reasons.items()}
  return conformance_page.Checked(tuple(facts(model, traced)), verdicts, notes)


def _problems(traced, which, check, *options) -> list[str] | None:
  """What goes wrong between some of the states; None where MaxText lacks one of them."""
  return list(check(*(traced[key] for key in which), *options)) if traced.keys() >= set(which) else None


def verdict(model: str, column: str, problems: list[str] | None) -> str:
  """The text of a cell."""
  if problems is None:
    return "–"
  if (model, column) in KNOWN:
    return "differs" if problems else "FAILED"
  if all(problem.startswith(REFUSED) for problem in problems):
    return "refused" if problems else "ok"
  return "FAILED"


def short(reason: str) -> str:
  """The gist of an error of MaxText's."""
  found = re.search(r"Value error, (.*?) \[type=", reason)
  return found[1] if found else f"{reason[:80]}…" if len(reason) > 80 else reason


def facts(model: str, traced) -> list[str]:
  """The model's name, family, size and numbers of leaves, params and optimizer."""
  if not traced:
    return [model, *["–"] * 5]
  config, saved = (some := next(iter(traced.values()))).config, some.saved
  size = sum(math.prod(leaf.shape) for path, leaf in saved.leaves.items() if path[0] == "params")
  leaves = []
  for is_scanned in (True, False):
    found = [t for (_, scan_layers), t in traced.items() if scan_layers == is_scanned]
    leaves.append(str(len(found[-1].saved_params().leaves)) if found else "–")
  block = getattr(config.decoder_block, "value", config.decoder_block)
  params = f"{size / 1e9:,.1f} B" if size > 1e9 else f"{size / 1e6:,.1f} M"
  return [model, block, str(config.num_decoder_layers), params, *leaves]


def main(argv):
  if len(argv) > 1:
    raise app.UsageError("Too many arguments.")
  folder = pathlib.Path(maxtext.__file__).parent / "configs" / "models"
  models = _MODELS.value or sorted(path.stem for path in folder.glob("*.yml"))
  print(conformance_page.line(conformance_page.FACTS + conformance_page.CHECKS), file=sys.stderr)
  results = []
  spawn = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(_PROCESSES.value, mp_context=spawn) as pool:
    for result in pool.map(checked, models):
      print(conformance_page.line(result.facts + result.verdicts), file=sys.stderr, flush=True)
      results.append(result)
  print(*conformance_page.page(results), sep="\n")


if __name__ == "__main__":
  app.run(main)
