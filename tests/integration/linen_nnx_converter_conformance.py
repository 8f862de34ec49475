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

  python linen_nnx_converter_conformance.py [--models=gemma3-4b,…] [--processes=2] [--write_linen=FOLDER]
  python linen_nnx_converter_conformance.py --read_linen=FOLDER …

Needs a Python with MaxText 0.2.3 or later, its trainer's dependencies and this package. The trainers' states of each
`configs/models/*.yml`, with its optimizer, scanned and unscanned, are traced from MaxText itself: all layers, real
shapes, no weights. Each is planned into the others, by the model's own config. MaxText 0.2.5 has no Linen trainer: the
Linen states are then those that 0.2.4 had written to a folder. Each model gets a row, whose last cell has a mark for
each of `CHECKS`, and a line for each reason of a mark that is not ✓:

  ✓  every leaf landed on MaxText's own (path, shape, dtype), and there was no other
  –  MaxText has no such state
  r  refused by the converter
  m  as ✓, but something is missing, because it has no place in the target
  d  MaxText's two states differ: they do not have the same weights, as `KNOWN` says
  F  failed: none of these
"""

from collections.abc import Iterable, Iterator
import concurrent.futures
import dataclasses
import functools
import math
import multiprocessing
import os
import pathlib
import re
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("HF_TOKEN", "unused")  # Engram's config asks for one even when the tokenizer is a local folder.

# pylint: disable=g-import-not-at-top,wrong-import-position
from absl import app
from absl import flags
from absl import logging
import jax
from jax._src.interpreters import partial_eval
import linen_nnx_converter_conformance_states as states

import maxtext
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.maxtext_model import run_config
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import planner
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.state import releases

_MODELS = flags.DEFINE_list("models", [], "Models to go through; all when empty.")
_PROCESSES = flags.DEFINE_integer("processes", os.cpu_count(), "Number of models under way at a time.")
_WRITE_LINEN = flags.DEFINE_string("write_linen", None, "Folder to keep the Linen trainer's states in.")
_READ_LINEN = flags.DEFINE_string("read_linen", None, "Folder of the Linen states of a release that has them.")

FACTS = ("Model", "Decoder", "Layers", "Params", "Leaves, scanned", "Unscanned", "Results")
REFUSED, REDUCED = "refused: ", "reduced: "
MARKS = {REFUSED: "r", REDUCED: "m"}
_NO_ENGRAM = "MaxText's unscanned NNX model lacks the engram modules of its other models"
KNOWN = {
    ("deepseek-custom", "NNX: scanned ↔ unscanned"): _NO_ENGRAM,
    ("deepseek-custom", "Unscanned: Linen → NNX"): _NO_ENGRAM,
    ("deepseek-custom", "Unscanned: NNX → Linen"): _NO_ENGRAM,
}


def is_aux(path: abstract_state.Path) -> bool:
  return path[0] == layouts.NNX_AUX


def rearranged(a: states.Traced, b: states.Traced) -> Iterator[str]:
  """What goes wrong between the scanned and the unscanned state of one trainer, both ways."""
  for source, target in ((a, b), (b, a)):
    yield from mismatch(source.saved, target.saved_params(), target, nnx_aux="drop")
    if target.train_state is not None:
      wanted = target.train_state_params()
      yield from mismatch(source.train_state, wanted, target, direction="nnx_to_nnx", nnx_aux="drop")


def to_nnx(linen: states.Traced, of_nnx: states.Traced) -> Iterator[str]:
  """What goes wrong from the Linen trainer's state to the NNX trainer's, whose own variables it may lack.

  Of two releases, to what the newer one saves alone: with a direction, no release's changes are asked for.
  """
  yield from mismatch(linen.saved, of_nnx.saved, of_nnx, exempt=lambda path, found: not found and is_aux(path))
  if linen.run.release == of_nnx.run.release:
    as_model = {"direction": "linen_to_nnx", "nnx_values": "plain"}
    is_other = lambda path, found: not found and path not in of_nnx.params
    yield from mismatch(linen.saved, of_nnx.train_state, of_nnx, exempt=is_other, **as_model)


def to_linen(linen: states.Traced, of_nnx: states.Traced) -> Iterator[str]:
  """What goes wrong from both forms of the NNX trainer's state to the Linen trainer's, NNX's own variables beside it."""
  for source in (of_nnx.saved, of_nnx.train_state):
    yield from mismatch(source, linen.saved, linen, exempt=lambda path, _: is_aux(path))


def saved_and_restored(of_nnx: states.Traced) -> Iterator[str]:
  """What goes wrong between the NNX trainer's two forms, with all that the release saves."""
  saves_all = any(map(is_aux, of_nnx.saved.leaves))  # As MaxText does from 0.2.4 on.
  yield from mismatch(of_nnx.train_state, of_nnx.saved, of_nnx, nnx_aux="keep" if saves_all else "drop")
  wanted = of_nnx.train_state if saves_all else of_nnx.train_state_params()
  yield from mismatch(of_nnx.saved, wanted, of_nnx, direction="linen_to_nnx", nnx_values="plain")


_LINEN_SCANNED, _LINEN_UNSCANNED, _NNX_SCANNED, _NNX_UNSCANNED = states.ARRANGEMENTS
# Of each column, what is checked between which states.
CHECKS = {
    "NNX: saved ↔ TrainStateNNX": (saved_and_restored, ((_NNX_SCANNED,), (_NNX_UNSCANNED,))),
    "NNX: scanned ↔ unscanned": (rearranged, ((_NNX_SCANNED, _NNX_UNSCANNED),)),
    "Linen: scanned ↔ unscanned": (rearranged, ((_LINEN_SCANNED, _LINEN_UNSCANNED),)),
    "Scanned: Linen → NNX": (to_nnx, ((_LINEN_SCANNED, _NNX_SCANNED),)),
    "Unscanned: Linen → NNX": (to_nnx, ((_LINEN_UNSCANNED, _NNX_UNSCANNED),)),
    "Scanned: NNX → Linen": (to_linen, ((_LINEN_SCANNED, _NNX_SCANNED),)),
    "Unscanned: NNX → Linen": (to_linen, ((_LINEN_UNSCANNED, _NNX_UNSCANNED),)),
}


def mismatch(source, wanted, target: states.Traced, *, exempt=lambda path, found: False, **keywords) -> Iterator[str]:
  """Plans a conversion by the target's config, and yields a line if it does not give the wanted state to the leaf.

  Another line says what of the source has no place there. Leaves that are exempt, by path and by whether the plan has
  them, are not compared.
  """
  try:
    plan = planner.plan_conversion(source, dataclasses.replace(target.options, **keywords), target.run)
  except errors.ConversionError as e:
    yield f"{REFUSED}{e}"
    return
  found, dropped = plan.target, {reason for reason in plan.dropped.values() if not reason.startswith("--")}
  described = [{path: plan_lib.described(leaf) for path, leaf in s.leaves.items()} for s in (found, wanted)]
  paths = [path for path in described[0] | described[1] if described[0].get(path) != described[1].get(path)]
  if paths := [path for path in paths if not exempt(path, path in found.leaves)]:
    leaf, other = (each.get(paths[0], "nothing") for each in described)
    yield f"{len(paths)} leaves differ, {'/'.join(paths[0])}: {leaf}, in MaxText {other}"
  elif found.lists != wanted.lists:
    yield f"the lists differ: {sorted(found.lists ^ wanted.lists)[0]}"
  elif dropped:
    yield f"{REDUCED}{', '.join(sorted(dropped))}"


def checked(model: str, *, write_linen: str | None, read_linen: str | None) -> str:
  """Traces a model, and plans its states into each other; returns its row, and a line for each reason."""
  jax.config.update("jax_default_prng_impl", "unsafe_rbg")  # As the trainers do.
  logging.set_verbosity("fatal")
  traced, reasons = {}, {}
  for trainer, scan_layers in states.ARRANGEMENTS:
    try:
      # A tracer has no sharding, and JAX searches the whole program for where it came from, to say so in an error that
      # Flax catches at once: without that search, DeepSeek-V3's 61 layers take seconds instead of minutes.
      with mock.patch.object(partial_eval.DynamicJaxprTracer, "_origin_msg", lambda _: ""):
        traced[trainer, scan_layers] = traced_or_read(model, trainer, scan_layers, read_linen)
    except errors.ConfigError as e:
      reasons.setdefault(short(e.found), []).append(f"{trainer} {'scanned' if scan_layers else 'unscanned'}")
  if write_linen:
    states.write(write_linen, model, {key: found for key, found in traced.items() if key[0] == "linen"})
  marks = ""
  for column, (check, wholes) in CHECKS.items():
    problems = [list(check(*map(traced.get, keys))) for keys in wholes if traced.keys() >= set(keys)]
    marks += mark(model, column, problems)
    if marks[-1] not in "✓–":
      reasons.setdefault(KNOWN.get((model, column)) or next(filter(None, problems))[0], []).append(column)
  jax.clear_caches()  # What one model traced is of no use to the next.
  lines = [f"{reason} ({', '.join(of)})" for reason, of in reasons.items()]
  return "\n".join((line((*facts(model, traced), marks)), *lines))


def traced_or_read(model: str, trainer: str, scan_layers: bool, folder: str | None) -> states.Traced:
  """A state of the installed MaxText, or the Linen one of the release that wrote to the folder.

  Raises:
    ConfigError: there is none.
  """
  if trainer == "nnx" or run_config.version() <= releases.LINEN_UNTIL:
    return states.trace(model, trainer, scan_layers)
  found = states.read(folder, model) if folder else {}
  if (trainer, scan_layers) not in found:
    raise errors.ConfigError(model, "a Linen state", "no Linen trainer, and MaxText 0.2.4 had no such state", "")
  return found[trainer, scan_layers]


def mark(model: str, column: str, problems: list[list[str]]) -> str:
  """The mark of a check, of what went wrong in each pair of states that MaxText has."""
  found = [problem for each in problems for problem in each]
  if not problems:
    return "–"
  if KNOWN.get((model, column)):
    return "d" if found else "F"
  for kind, letter in MARKS.items():
    if found and all(problem.startswith(kind) for problem in found):
      return letter
  return "F" if found else "✓"


def line(cells: Iterable[str]) -> str:
  return f"| {' | '.join(cells)} |"


def short(reason: str) -> str:
  """The gist of an error of MaxText's."""
  found = re.search(r"Value error, (.*?) \[type=", reason)
  return found[1] if found else f"{reason[:80]}…" if len(reason) > 80 else reason


def facts(model: str, traced) -> list[str]:
  """The model's name, family, size and numbers of leaves, params and optimizer."""
  if not traced:
    return [model, *["–"] * 5]
  some = traced.get(_NNX_SCANNED) or list(traced.values())[-1]
  size = sum(math.prod(leaf.shape) for path, leaf in some.saved.leaves.items() if path[0] == "params")
  leaves = []
  for is_scanned in (True, False):
    found = [t for (_, scan_layers), t in traced.items() if scan_layers == is_scanned]
    leaves.append(str(len(found[-1].saved_params().leaves)) if found else "–")
  params = f"{size / 1e9:,.1f} B" if size > 1e9 else f"{size / 1e6:,.1f} M"
  return [model, some.run.decoder.block, str(some.run.decoder.num_layers), params, *leaves]


def main(argv):
  if len(argv) > 1:
    raise app.UsageError("Too many arguments.")
  folder = pathlib.Path(maxtext.__file__).parent / "configs" / "models"
  models = _MODELS.value or sorted(path.stem for path in folder.glob("*.yml"))
  check = functools.partial(checked, write_linen=_WRITE_LINEN.value, read_linen=_READ_LINEN.value)
  print(line(FACTS))
  spawn = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(_PROCESSES.value, mp_context=spawn) as pool:
    for result in pool.map(check, models):
      print(result, flush=True)


if __name__ == "__main__":
  app.run(main)
